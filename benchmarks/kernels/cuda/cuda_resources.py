"""Resources of the compiled CUDA kernels, without a GPU: registers, spills, instructions.

    python benchmarks/kernels/cuda/cuda_resources.py [--arch 80 90a] [--file stem] [--out DIR]

Compiles every file of csrc/cuda/ for each architecture and analyzes the machine code. Faults, with
exit status 1, are warnings, spills, arrays in local memory, and missing instructions that a kernel
depends on (tensor cores, ldmatrix, asynchronous copies, 16-byte accesses). Requires nvcc, and
cuobjdump from the toolkit or from Triton's wheel.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_resnet.bench.harness import save
from fused_resnet.bench.machine import provenance

CSRC = Path(__file__).parents[3] / "csrc"
ARCHS = ("80", "90a")

# Required instructions: pattern of a kernel's name -> architectures -> instructions.
REQUIRED: dict[str, dict[str, tuple[str, ...]]] = {
    r"elementwise_kernel": {"80 90a": (r"LDG\S*\.128", r"STG\S*\.128")},
    # <dtype, channels_last, elements per access, ...>: 1 element is for misaligned data.
    r"bn_\w+_kernel<\w+, \w+, (?!1,)": {"80 90a": (r"LDG\S*\.128",)},
    r"stem_kernel": {"80 90a": (r"HMMA", r"LDSM", r"STG\S*\.128")},
    r"implicit_gemm_sm80_kernel": {"80 90a": (r"HMMA", r"LDSM", r"LDGSTS\S*\.128", r"STG\S*\.128")},
    r"implicit_gemm_sm90_kernel": {"90a": (r"HGMMA", r"UTMALDG", r"UTMASTG", r"USETMAXREG")},
    r"implicit_gemm_sm80_kernel.*NormPrologue": {
        "80 90a": (r"LDG\S*\.128", r"LDS\S*\.128", r"STS\S*\.128")
    },
    r"implicit_gemm_sm90_kernel.*Sm90Prologue": {
        "90a": (r"LDG\S*\.128", r"LDS\S*\.128", r"STS\S*\.128")
    },
}


class Kernel(NamedTuple):
    """One kernel for one architecture."""

    file: str
    arch: str
    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int  # static; convolutions use dynamic shared memory
    opcodes: collections.Counter[str]

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.opcodes.items() if re.match(pattern, name))

    def faults(self) -> list[str]:
        messages = []
        spills = self.count("STL|LDL")
        if spills or self.stack_bytes:
            messages.append(f"{self.stack_bytes} bytes of stack, {spills} accesses to it")
        for kernel, by_arch in REQUIRED.items():
            for archs, patterns in by_arch.items():
                if re.search(kernel, self.name) and self.arch in archs.split():
                    messages += [f"has no {p}" for p in patterns if not self.count(p)]
        return messages


def find(tool: str, *folders: Path | str) -> str:
    path = shutil.which(tool, path=os.pathsep.join([*map(str, folders), os.environ["PATH"]]))
    if path is None:
        sys.exit(f"cuda_resources: {tool} was not found")
    return path


def toolkit() -> list[Path]:
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return [Path(root) / "bin" for root in roots if root]


def binaries() -> list[Path]:
    """Folders in addition to the toolkit's that may contain cuobjdump."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return []
    return [Path(spec.origin).parent / "backends" / "nvidia" / "bin"]


def name_of(source: Path) -> str:
    """add_relu.cu, convolution/stem.cu, ..."""
    return str(source.relative_to(CSRC / "cuda"))


def compiled(source: Path, arch: str, folder: Path) -> tuple[Path, float, list[str]]:
    """Compile a file: the path of the cubin, the seconds taken, and the compiler's warnings."""
    target = folder / f"{name_of(source).replace('/', '-')}-{arch}.cubin"
    include = Path(torch.__file__).parent / "include"
    command = [
        find("nvcc", *toolkit()), "-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-O3",
        "-std=c++20", "-DUSE_CUDA", "-Xcompiler=-Wall", f"-I{CSRC}", "-isystem", str(include),
        "-isystem", str(include / "torch/csrc/api/include"), str(source), "-o", str(target),
    ]  # fmt: skip
    begin_s = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(f"cuda_resources: {name_of(source)} does not compile for sm_{arch}\n{run.stderr}")
    lines = (run.stdout + run.stderr).splitlines()
    return target, time.perf_counter() - begin_s, [x for x in lines if "warning" in x.lower()]


def kernels_of(cubin: Path, file: str, arch: str) -> Iterator[Kernel]:
    tool = find("cuobjdump", *toolkit(), *binaries())
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True)
    code: dict[str, collections.Counter[str]] = {}
    for part in re.split(r"^\s*Function : ", sass.stdout, flags=re.M)[1:]:
        name, _, body = part.partition("\n")
        opcodes = re.findall(
            r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", body, flags=re.M
        )
        code[name.strip()] = collections.Counter(opcodes)
    for name, line in re.findall(r"Function (\S+?):?\s*\n\s*(.+)", usage.stdout + usage.stderr):
        usage_of = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        stack = usage_of.get("STACK", 0) + usage_of.get("LOCAL", 0)
        opcodes = code.get(name, collections.Counter())
        resources = (usage_of.get("REG", 0), stack, usage_of.get("SHARED", 0))
        yield Kernel(file, arch, plain(name), *resources, opcodes)


def plain(symbol: str) -> str:
    """The name and template arguments of a kernel as in the source."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True).stdout.strip()
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = name.replace("fused_resnet::", "").replace("__nv_bfloat16", "bfloat16_t")
    name = name.replace("__half", "float16_t")
    depth = 0
    for i, letter in enumerate(name):  # strip the function parameters
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


COLUMNS = {
    "tensor": "HMMA|HGMMA",
    "ldmatrix": "LDSM",
    "async": r"LDGSTS|UTMALDG",
    "ld16": r"LDG\S*\.128",
    "st16": r"STG\S*\.128|UTMASTG",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Resources of the CUDA kernels, without a GPU.")
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--file", default="", help="only sources whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="write a results file into this folder")
    args = parser.parse_args()
    sources = sorted(s for s in (CSRC / "cuda").rglob("*.cu") if args.file in name_of(s))
    pairs = [(source, arch) for arch in args.arch for source in sources]
    table, files, broken = [], [], 0
    line = "{:4s} {:>4s} {:>5s} {:>6s} {:>8s} {:>5s} {:>5s} {:>5s} {:>6s}  {}"
    print(line.format("sm", "regs", "stack", *COLUMNS, "size", "kernel"))
    begin_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(lambda pair: compiled(*pair, Path(name)), pairs)
        for (source, arch), (cubin, time_s, warnings) in zip(pairs, results, strict=True):
            files.append({"file": name_of(source), "arch": arch, "compile_s": round(time_s, 1)})
            for warning in warnings:
                print(f"FAULT: {warning}")
            broken += len(warnings)
            for kernel in kernels_of(cubin, name_of(source), arch):
                faults = kernel.faults()
                counts = {key: kernel.count(pattern) for key, pattern in COLUMNS.items()}
                size = sum(kernel.opcodes.values())
                cells = (kernel.registers, kernel.stack_bytes, *counts.values(), size)
                print(line.format(arch, *map(str, cells), kernel.name), flush=True)
                if faults:
                    print(f"     FAULT: {'; '.join(faults)}")
                broken += bool(faults)
                row: dict[str, Any] = {**kernel._asdict(), **counts, "instructions": size}
                del row["opcodes"]
                table.append(row)
    total_s = time.perf_counter() - begin_s
    longest = max(files, key=lambda f: f["compile_s"])
    print(
        f"{len(table)} kernels in {total_s:.0f} s, longest {longest['file']} for "
        f"sm_{longest['arch']}, {longest['compile_s']} s: {broken or 'no'} faults"
    )
    if args.out:
        head = provenance("cuda_resources", "cpu")
        versions = subprocess.run(
            [find("nvcc", *toolkit()), "--version"], capture_output=True, text=True
        ).stdout
        release = re.search(r"V([\d.]+)", versions)
        head["nvcc"] = release[1] if release else "unknown"
        times = {"jobs": args.jobs, "total_s": round(total_s, 1), "files": files}
        print(save({**head, **times, "kernels": table}, args.out))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
