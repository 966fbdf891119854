"""The README's snippets run, its commands exist, its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

import fused_resnet as fr
from tests import ROOT

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", [code for kind, code in BLOCKS if kind == "python"])
def test_snippets_run(code):
    if "import torchvision" in code:
        pytest.importorskip("torchvision")
    run = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", code],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_commands_exist():
    pytest.importorskip("typer")
    commands = re.findall(
        r"^(?:make|fused-resnet) .*$", "\n".join(c for k, c in BLOCKS if not k), re.M
    )
    assert len(commands) >= 5
    from typer.testing import CliRunner

    from fused_resnet.cli import application

    for command in commands:
        words = command.split("#")[0].split()
        if words[0] == "fused-resnet":
            options = [w for w in words if w.startswith("--")]
            arguments = [words[1], "--help"]
            found = CliRunner().invoke(application(), arguments, env={"COLUMNS": "200"})
            assert all(option in found.output for option in options), command
        elif (ROOT / "Makefile").exists():
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), command


def test_public_names_are_documented():
    for name in fr.__all__:
        assert getattr(fr, name).__doc__, name
    for name in ("add_relu", "bn_add_relu", "conv_bn_relu", "conv_norm_relu"):
        assert name in TEXT and "Source:" in getattr(fr, name).__doc__


@pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not in a checkout")
def test_links_and_files_are_there():
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert link.startswith("http") or (ROOT / link).exists(), link
    table = TEXT[TEXT.index("| to change | look in |") : TEXT.index("## Limits")]
    places = re.findall(r"`([\w./<>]+)`", table)
    assert len(places) > 25
    folder = ROOT
    for place in places:
        if "/" in place.rstrip("/"):
            folder = ROOT / place if place.endswith("/") else (ROOT / place).parent
        pattern = re.sub(r"<\w+>", "*", place.rstrip("/"))
        # A name alone is a file or folder beside the one before it.
        assert list(ROOT.glob(pattern)) or list(folder.glob(pattern)), place
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not in a checkout")
def test_the_drawing_shows_the_tiers():
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    tiers = [name for row in contracts[0]["layers"] for name in row.split(" | ")]
    drawn = (ROOT / "docs" / "architecture.svg").read_text()
    titles = re.findall(r'font-weight="bold" fill="#111827" xml:space="preserve">([^<]+)<', drawn)
    names = [name for title in titles for name in re.split(r"[ ,]+", title)]
    assert sorted(names) == sorted(tiers)
