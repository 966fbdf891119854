"""Breaks the code on purpose, one line at a time, and expects the tests to notice.

    python -m tests.mutations [-k NAME] [--native] [--cuda]

Each mutation is made in a copy of the package in a temporary folder; the working tree is never
touched. Exit status 1 when one survives. `--native` adds the C++ ones, each of which is a build;
`--cuda` those of the CUDA kernels, which run in the emulator: their own sources are compiled.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from fused_resnet.kernels import native as native_kernels
from tests import ROOT
from tests.mutations.cuda import CUDA
from tests.mutations.gpu import GPU_PYTHON
from tests.mutations.native import AVX2, AVX512, CPP
from tests.mutations.python import PYTHON


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str  # arguments to pytest


# Where emulated kernels cannot run, the tests that want them are skipped.
EMULATE = """
from tests.emulator import emulation
emulation.unavailable() or emulation.load()
"""


def survives(mutation: Mutation, build: list[str]) -> str | None:
    """None when the tests notice; else why not. build: arguments to python, none for Python."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        # What the emulator's build made is good in the copy too, but for the mutated sources.
        emulated = [str(path.relative_to(ROOT)) for path in ROOT.glob("build/emulated-*")]
        for name in ("fused_resnet", "tests", "csrc", *emulated):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        target = copy / mutation.file
        text = target.read_text()
        if text.count(mutation.old) == 0:
            return "its text is not there any more: mend the table"
        target.write_text(text.replace(mutation.old, mutation.new, 1))
        environment = {**os.environ, "PYTHONPATH": folder, "FUSED_RESNET_CUDA": "0"}
        if build:
            command = [sys.executable, *build]
            built = subprocess.run(command, cwd=copy, capture_output=True, env=environment)
            if built.returncode:
                return "it does not compile"
        # pytest takes one -k: several selections are several runs, any of which may notice.
        words = shlex.split(mutation.tests)
        runs: list[list[str]] = [[]]
        for i, word in enumerate(words):
            runs[-1].append(word)
            if i and words[i - 1] == "-k":
                runs.append([])
        for run in filter(None, runs):
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *run]
            result = subprocess.run(command, cwd=copy, capture_output=True, env=environment)
            if result.returncode == 1 or result.returncode < 0:  # a test failed, or all crashed
                return None
            if result.returncode != 0:
                return f"pytest gave {result.returncode} for {' '.join(run)}"
    return "every test passed"


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the code; see the tests fail.")
    parser.add_argument("-k", default="", help="only mutations whose name holds this")
    parser.add_argument("--native", action="store_true", help="C++ mutations too: a build each")
    parser.add_argument("--cuda", action="store_true", help="mutations of the CUDA kernels too")
    args = parser.parse_args()
    subprocess.run([sys.executable, "-c", EMULATE], cwd=ROOT, check=True)
    survivors = 0
    native = ["setup.py", "-q", "build_ext", "--inplace", "--force"]
    table: list[tuple[tuple[str, ...], list[str]]] = [(row, []) for row in PYTHON + GPU_PYTHON]
    of_isa = {"avx512": AVX512, "avx2": AVX2}.get(str(native_kernels.build_info()["cpu_isa"]), [])
    table += [(row, native) for row in CPP + of_isa if args.native]
    table += [(row, ["-c", EMULATE]) for row in CUDA if args.cuda]
    for row, build in table:
        mutation = Mutation(*row)
        if args.k not in mutation.name:
            continue
        begin = time.perf_counter()
        reason = survives(mutation, build)
        survivors += reason is not None
        outcome = "noticed" if reason is None else f"SURVIVES: {reason}"
        print(f"{mutation.name:45s} {time.perf_counter() - begin:5.0f} s  {outcome}", flush=True)
    print(f"{survivors} survive" if survivors else "all noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
