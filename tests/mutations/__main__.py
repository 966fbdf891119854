"""Mutation testing: changes one text of the code at a time and expects a test to fail.

    python -m tests.mutations [-k NAME] [--native] [--cuda] [--part 1/2]

Each mutation is applied to a copy of the package in a temporary folder; the working tree is never
modified. The exit status is 1 if one survives. `--native` adds mutations of the C++ code, each of
which needs a build; `--cuda` adds those of the CUDA kernels, compiled for and run in the emulator.
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
from tests.mutations.compilers import COMPILERS
from tests.mutations.cuda import ASAN, CUDA
from tests.mutations.gpu import GPU_PYTHON
from tests.mutations.memory import MEMORY
from tests.mutations.native import AVX2, AVX512, CPP
from tests.mutations.packages import PACKAGES
from tests.mutations.python import PYTHON


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str  # arguments to pytest, after ASAN where only AddressSanitizer can notice


# Builds the emulator where it can run; elsewhere tests that require it are skipped.
EMULATE = """
from tests.emulator import emulation
emulation.unavailable() or emulation.load()
"""


class Workspace:
    """A copy of the package in which mutations are made one after another. What a mutation rebuilt is
    put back after it, so that the next one compiles only its own file."""

    def __init__(self, folder: Path) -> None:
        self._copy, self._built = folder / "copy", folder / "built"
        for name in ("fused_resnet", "tests", "csrc", "wheels", "torch-ext", "benchmarks"):
            hidden = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, self._copy / name, ignore=hidden)
        # The emulator's objects are named after what they were compiled from.
        for path in ROOT.glob("build/emulated-*"):
            shutil.copytree(path, self._copy / path.relative_to(ROOT))
        for name in ("pyproject.toml", "setup.py", "build.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self._copy)
        environment = {"PYTHONPATH": str(self._copy), "FUSED_RESNET_CUDA": "0"}
        self._environment = {**os.environ, **environment}
        (self._copy / "build").mkdir(exist_ok=True)

    def python(self, *arguments: str) -> int:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=self._copy, capture_output=True, env=self._environment
        ).returncode

    def prepare(self, build: list[str]) -> None:
        """Builds without a mutation, and remembers the result."""
        if self.python(*build) != 0:
            raise RuntimeError(f"mutations: {' '.join(build)} fails without any mutation")
        shutil.rmtree(self._built, ignore_errors=True)
        self._exchange(self._copy, self._built)

    def _exchange(self, source: Path, target: Path) -> None:
        """Copies everything built, with its times: ninja compares them."""
        shutil.rmtree(target / "build", ignore_errors=True)
        shutil.copytree(source / "build", target / "build")
        (target / "fused_resnet").mkdir(parents=True, exist_ok=True)
        for extension in (source / "fused_resnet").glob("*.so"):
            shutil.copy2(extension, target / "fused_resnet")

    def survives(self, mutation: Mutation, build: list[str]) -> str | None:
        """None if a test fails, else the reason why none did. build: arguments to python, [] if the
        mutated file needs no build."""
        target = self._copy / mutation.file
        text, times = target.read_text(), target.stat()
        if text.count(mutation.old) == 0:
            return "its text is not in the file: update the table"
        target.write_text(text.replace(mutation.old, mutation.new, 1))
        try:
            if build and self.python(*build) != 0:
                return "it does not compile"
            return self._tested(mutation.tests)
        finally:
            target.write_text(text)
            os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
            if build:
                self._exchange(self._built, self._copy)

    def _tested(self, tests: str) -> str | None:
        # pytest accepts one -k, so several selections are several runs; any of them may fail.
        sanitized = tests.startswith(ASAN)
        words = shlex.split(tests.removeprefix(ASAN))
        runs: list[list[str]] = [[]]
        for i, word in enumerate(words):
            runs[-1].append(word)
            if i and words[i - 1] == "-k":
                runs.append([])
        for run in filter(None, runs):
            start = ["-m", "tests.emulator.emulation"] if sanitized else ["-m"]
            status = self.python(*start, "pytest", "-x", "-q", "-p", "no:cacheprovider", *run)
            if status == 1 or status < 0:  # a test failed, or pytest crashed
                return None
            if status != 0:
                return f"pytest exited with {status} for {' '.join(run)}"
        return "every test passed"


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutation testing.")
    parser.add_argument("-k", default="", help="only mutations whose name contains this")
    parser.add_argument("--native", action="store_true", help="also mutate the C++ code")
    parser.add_argument("--cuda", action="store_true", help="also mutate the CUDA kernels")
    parser.add_argument("--skip-python", action="store_true", help="only those two")
    parser.add_argument("--part", default="1/1", help="i/n: every n-th mutation, from the i-th on")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    native = ["setup.py", "-q", "build_ext", "--inplace"]
    of_isa = {"avx512": AVX512, "avx2": AVX2}.get(str(native_kernels.build_info()["cpu_isa"]), [])
    tables: list[tuple[list[str], list[Mutation]]] = [
        (
            [],
            [
                Mutation(*row)
                for row in PYTHON + PACKAGES + COMPILERS + MEMORY + GPU_PYTHON
                if not args.skip_python
            ],
        ),
        (["-c", EMULATE], [Mutation(*row) for row in CUDA if args.cuda]),
        (native, [Mutation(*row) for row in CPP + of_isa if args.native]),
    ]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        workspace.prepare(["-c", EMULATE])  # tests of Python mutations use it too
        for build, mutations in tables:
            selected = [m for m in mutations if args.k in m.name][part - 1 :: parts]
            if selected and build == native:
                workspace.prepare(build)
            for mutation in selected:
                begin = time.perf_counter()
                reason = workspace.survives(mutation, build)
                survivors += reason is not None
                outcome = "detected" if reason is None else f"SURVIVES: {reason}"
                seconds = time.perf_counter() - begin
                print(f"{mutation.name:45s} {seconds:5.0f} s  {outcome}", flush=True)
    print(f"{survivors} survive" if survivors else "all detected")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
