"""Runs the command line."""

from __future__ import annotations

import os
import subprocess
import sys


def run(*arguments: str, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    start = f"{code}\nfrom fused_resnet.cli import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", start, *arguments],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "COLUMNS": "160", **environment},
    )  # fmt: skip
