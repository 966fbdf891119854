"""Runs the CUDA kernels on CPU tensors: csrc/cuda/ compiled for the host against emulator.h.

`load()` builds the library if necessary, loads it, and registers "emulated" as a CPU backend.

    python -m tests.emulator.emulation pytest -k emulated tests

runs a Python module under AddressSanitizer, which checks every access of the kernels to shared and
global memory. See README.md in this folder.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_resnet.kernels import native, providers, registry, target
from fused_resnet.kernels.problem import Problem
from fused_resnet.kernels.target import Target
from tests import ROOT

SANITIZER = os.environ.get("FUSED_RESNET_EMULATION", "")
ACCESSES = ("load", "store", "async_store", "ldmatrix", "stmatrix")


def asan_environment() -> dict[str, str]:
    """The environment for a process that runs the emulated kernels under AddressSanitizer."""
    compiler = os.environ.get("CXX", "g++")
    # libstdc++ too: AddressSanitizer looks up its `throw` when it is loaded, and the Python
    # executable does not link libstdc++.
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        **os.environ,
        "FUSED_RESNET_EMULATION": "asan",
        "LD_PRELOAD": ":".join(map(os.path.realpath, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }


def _headers(source: Path, seen: set[Path] | None = None) -> set[Path]:
    """The headers of this repository that a source includes, directly or indirectly."""
    seen = set() if seen is None else seen
    for name in re.findall(r'^ *# *include "(.+)"', source.read_text(), re.M):
        for header in (ROOT / "csrc" / name, ROOT / "tests/emulator" / name):
            if header.exists() and header not in seen:
                seen.add(header)
                _headers(header, seen)
    return seen


def _build() -> Path:
    """Compiles changed sources and links the library; concurrent processes wait for a lock."""
    torch_include = Path(torch.__file__).parent / "include"
    # Only relative paths to this checkout: copies of it can reuse the object files.
    flags = [
        *("-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden"),
        "-fno-strict-aliasing",  # packs are reinterpreted as uint4 and back
        *("-Wall", "-Wextra", "-Werror"),
        *("-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-psabi"),
        *("-DFUSED_RESNET_EMULATED", "-Itests/emulator", "-Icsrc", "-isystem", str(torch_include)),
    ]
    if SANITIZER:
        flags += ["-fsanitize=address", "-fno-omit-frame-pointer"]
    compiler = os.environ.get("CXX", "g++")
    kernels = [*(ROOT / "csrc/cuda").rglob("*.cu")]
    # The list of kernels needs the CUDA runtime, which is unavailable.
    kernels.remove(ROOT / "csrc/cuda/kernel_list.cu")
    sources = sorted([*(ROOT / "tests/emulator").glob("*.cpp"), *kernels])
    shared = hashlib.sha256(" ".join([compiler, torch.__version__, *flags]).encode())
    folder = ROOT / "build" / ("emulated-" + (SANITIZER or "plain"))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def compiled(source: Path) -> tuple[Path, bool]:
            digest = shared.copy()
            for file in (source, *sorted(_headers(source))):
                digest.update(file.read_bytes())
            name = "-".join(source.relative_to(ROOT).with_suffix("").parts)
            target = folder / f"{name}-{digest.hexdigest()[:16]}.o"
            if target.exists():
                return target, False
            for old in folder.glob(f"{name}-{'?' * 16}.o"):
                old.unlink()
            command = [compiler, *flags, "-x", "c++", "-c", str(source.relative_to(ROOT))]
            command += ["-o", f"{target}.part"]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode != 0:
                raise RuntimeError(f"emulation: compiling {source} failed\n{done.stderr}")
            os.replace(f"{target}.part", target)
            return target, True

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, sources))
        library = folder / "libemulated.so"
        if not library.exists() or any(new for _, new in objects):
            torch_lib = Path(torch.__file__).parent / "lib"
            command = [compiler, "-shared", *flags[1:3], *(str(o) for o, _ in objects)]
            command += [
                "-o",
                f"{library}.part",
                f"-L{torch_lib}",
                "-ltorch",
                "-ltorch_cpu",
                "-lc10",
            ]
            if SANITIZER:
                command.append("-fsanitize=address")
            subprocess.run(command, check=True)
            os.replace(f"{library}.part", library)
    return library


@functools.cache
def unavailable() -> str | None:
    """None if the emulated kernels can be built and loaded, otherwise the reason."""
    if native.load() is not None:
        return native.load()
    if os.uname().machine != "x86_64":
        return "the emulator of the CUDA kernels requires an x86-64 processor"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "the emulator of the CUDA kernels requires a C++ compiler"
    return None


_architecture = 90


class Emulated(providers.NativeCuda):
    """The CUDA kernels for CPU tensors, on the GPU that `device` sets."""

    def supports(self, problem: Problem, target: Target) -> str | None:
        return providers.GpuProvider.supports(self, problem, target)

    def target(self, device: torch.device) -> Target:
        return Target("nvidia", "sm_90a" if _architecture == 90 else f"sm_{_architecture}")

    def kernels(self) -> Any:
        return torch.ops.fused_resnet_emulated


@functools.cache
def load() -> ctypes.CDLL:
    """Builds and loads the library and registers the backend "emulated"."""
    library = _build()
    native.load()  # declares the ops
    schemas = torch.library.Library("fused_resnet_emulated", "DEF")
    globals()["_schemas"] = schemas  # must live as long as the process
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("fused_resnet_native::"):
            packet = getattr(torch.ops.fused_resnet_native, name.split("::")[1])
            schemas.define(str(packet.default._schema).split("::")[1])
    torch.ops.load_library(str(library))
    registry.register("emulated", "cpu", Emulated())
    target.MULTIPROCESSORS["cpu"] = 3  # more than one wave of tiles
    return ctypes.CDLL(str(library))


def seed(number: int) -> None:
    """Seeds the order of threads and asynchronous operations."""
    load().emulated_seed(ctypes.c_uint64(number))


@contextmanager
def device(multiprocessors: int = 3, architecture: int = 90) -> Iterator[None]:
    """Sets the GPU that host code sees: multiprocessors and architecture (80, 86, 90)."""
    global _architecture
    load().emulated_device(multiprocessors, architecture)
    _architecture = architecture
    try:
        yield
    finally:
        load().emulated_device(3, 90)
        _architecture = 90


class Launch(NamedTuple):
    blocks: int
    threads: int
    shared_bytes: int
    cooperative: bool


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Yields a list; on exit it is filled with the launches of this thread, in order."""
    capacity, found = 64, []
    values = (ctypes.c_int64 * (4 * capacity))()
    load().emulated_launches(values, 0)
    try:
        yield found
    finally:
        count = load().emulated_launches(values, capacity)
        rows = (values[4 * i : 4 * i + 4] for i in range(min(count, capacity)))
        found += [Launch(*row[:3], bool(row[3])) for row in rows]


@contextmanager
def wavefronts() -> Iterator[dict[str, tuple[int, int]]]:
    """Yields a dict; on exit it maps each kind of access to (wavefronts needed, ideal)."""
    library, found = load(), {}
    library.emulated_wavefronts.restype = ctypes.c_int64
    for kind in range(len(ACCESSES)):
        library.emulated_wavefronts(kind, 0), library.emulated_wavefronts(kind, 1)
    library.emulated_record(1)
    try:
        yield found
    finally:
        library.emulated_record(0)
        for kind, name in enumerate(ACCESSES):
            found[name] = tuple(library.emulated_wavefronts(kind, ideal) for ideal in (0, 1))


if __name__ == "__main__":
    command = [sys.executable, "-m", *sys.argv[1:]]
    sys.exit(subprocess.run(command, env=asan_environment(), check=False).returncode)
