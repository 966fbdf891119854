"""Every example runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.py")), ids=lambda f: f.stem)
def test_examples(file: Path) -> None:
    for package in ("timm", "torchvision"):
        if re.search(rf"^import {package}$", file.read_text(), re.M):
            pytest.importorskip(package)
    run = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and run.stdout, run.stderr
