"""What breaks silently when files move: sources that are not compiled, headers that trigger no
rebuild, files that are not shipped."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fused_resnet.kernels import tuning
from tests import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not in a checkout")

SOURCES = {str(f.relative_to(ROOT)) for f in (ROOT / "csrc").rglob("*") if f.is_file()}


def endings(*wanted: str) -> set[str]:
    return {f for f in SOURCES if f.endswith(wanted)}


@pytest.fixture
def extension(monkeypatch) -> Any:
    """The extension that setup.py would build, without CUDA code."""
    captured: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: captured.update(options))
    monkeypatch.setenv("FUSED_RESNET_CUDA", "0")
    monkeypatch.delenv("FUSED_RESNET_NATIVE", raising=False)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    if not captured:
        pytest.skip("there is no C++ compiler")
    (found,) = captured["ext_modules"]
    return found


def test_every_source_is_compiled_and_every_header_triggers_a_rebuild(extension):
    assert set(extension.sources) == endings(".cpp")
    assert set(extension.depends) == endings(".h", ".cuh")
    assert endings(".cpp", ".cu", ".h", ".cuh") == SOURCES


@pytest.mark.parametrize("file", ["csrc/cpu/isa/vec.h", "csrc/cuda/convolution/sm90/kernel.cuh"])
def test_make_builds_anew_where_a_header_in_a_folder_changed(file, tmp_path):
    assert file in SOURCES
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    for stamp in ("requirements.stamp", "build.stamp"):
        (tmp_path / stamp).touch()

    def commands(*words: str) -> str:
        make = ["make", "--dry-run", f"VENV={tmp_path}", *words, "build"]
        done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "build_ext" in commands("--what-if", file)
    assert "build_ext" not in commands()


def test_lint_sees_every_c_file():
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    done = subprocess.run(
        ["make", "--dry-run", "lint"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (line,) = [line for line in done.stdout.splitlines() if "clang-format" in line]
    emulator = {str(f.relative_to(ROOT)) for f in (ROOT / "tests").rglob("*.cpp")}
    assert emulator and SOURCES | emulator <= set(line.split())


def test_scripts_that_make_and_ci_run_exist(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    for stamp in ("requirements.stamp", "build.stamp"):
        (tmp_path / stamp).touch()
    words = ["make", "--dry-run", f"VENV={tmp_path}", "bench", "tables", "quick", "test"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    loop = re.search(r"for op in (.+); do", done.stdout)
    assert loop is not None
    text = done.stdout + (ROOT / ".ci" / "run").read_text()
    named = set(re.findall(r"\b((?:tests|benchmarks)/[\w/$]+(?:\.py)?)", text))
    paths = {p.replace("$op", op) for p in named for op in loop[1].split()}
    kernels = ("hopper", "implicit_gemm", "stem")
    paths = {p.replace("$name", name) for p in paths for name in kernels}
    paths = {p for p in paths if not p.startswith("benchmarks/results/")}  # written by them
    assert len(paths) > 20 and not [p for p in paths if not (ROOT / p).exists()]


def test_the_sdist_holds_every_source_and_every_module_and_tuned_results(tmp_path):
    """From a copy, in which a tuned result is shipped."""
    copy = tmp_path / "copy"
    hidden = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("fused_resnet", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=hidden)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    package = Path(tuning.__file__).parents[1]
    tuned = copy / "fused_resnet" / tuning.SHIPPED.relative_to(package) / "a-gpu.json"
    tuned.parent.mkdir(exist_ok=True)
    tuned.write_text("{}")
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    modules = {str(f.relative_to(copy)) for f in (copy / "fused_resnet").rglob("*.py")}
    assert len(modules) > 100
    assert not (SOURCES | modules | {str(tuned.relative_to(copy))}) - inside
    # And a wheel has them too.
    wheel = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path)]
    environment = {**os.environ, "FUSED_RESNET_NATIVE": "0"}
    done = subprocess.run(wheel, cwd=copy, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(archive).namelist())
    assert not (modules | {str(tuned.relative_to(copy)), "fused_resnet/py.typed"}) - inside
