"""Resources of the Triton kernels compiled for several architectures, without a GPU.

    python benchmarks/kernels/triton/triton_resources.py              print the table
    python benchmarks/kernels/triton/triton_resources.py --out DIR    also write a results file
    python benchmarks/kernels/triton/triton_resources.py --arch 90 --kernel conv

For each kernel, tile configuration, dtype and architecture: registers per thread, spilled bytes,
shared memory, and counts of tensor core instructions and 16-byte global accesses. Exit status 1 if
a kernel spills, exceeds shared memory or approximates a division or root, or if a convolution of 16
bits has no tensor core instructions or loads its operands element by element.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled here, not interpreted

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_resnet.bench.harness import save
from fused_resnet.bench.machine import provenance
from fused_resnet.kernels import tuning
from fused_resnet.kernels.problem import Gemm
from fused_resnet.kernels.target import Target
from fused_resnet.kernels.triton import (
    backward,
    batch_norm,
    configs,
    convolution,
    elementwise,
    support,
)

ARCHS = (80, 90, 100, 120)
# Maximum shared memory of a program, bytes: CUDA programming guide, table of compute capabilities.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# Tensor core instructions in a cubin: mma.sync, wgmma, tcgen05.
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA|UTCMMA|UTC.MMA|HMMA", 120: "HMMA"}
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Job:
    """One kernel to be compiled. args: name -> a type such as "*bf16" or "i32", or the value of a
    constant. Arguments divisible by 16 at ResNet's shapes are marked as such, as in a launch."""

    kernel: str
    variant: str
    dtype: str
    arch: int
    args: dict[str, Any]
    warps: int
    stages: int = 3
    registers: int = 0  # maximum; 0: not limited by the launch
    tensor_cores: bool = False
    found: dict[str, Any] = field(default_factory=dict)


KERNELS = {
    k.fn.__name__: k
    for module in (elementwise, batch_norm, convolution, backward)
    for k in vars(module).values()
    if isinstance(k, triton.runtime.JITFunction) and k.fn.__name__.endswith("_kernel")
}


def elementwise_jobs(dtype: str, arch: int) -> Iterator[Job]:
    p = POINTERS[dtype]
    constants = {"n": "i64", "BLOCK": elementwise.BLOCK, "ACC": tl.float32}
    names = {
        "add_relu_kernel": ("x_ptr", "residual_ptr", "y_ptr"),
        "add_relu_backward_kernel": ("dy_ptr", "y_ptr", "dx_ptr"),
    }
    for kernel, pointers in names.items():
        args = {**dict.fromkeys(pointers, p), **constants}
        yield Job(kernel, "", dtype, arch, args, elementwise.WARPS)
    if dtype == "float32":
        args = {"x_ptr": p, "y_ptr": p, "n": "i64", "BLOCK": elementwise.BLOCK}
        yield Job("round_to_tf32_kernel", "", dtype, arch, args, elementwise.WARPS)


def batch_norm_jobs(dtype: str, arch: int) -> Iterator[Job]:
    p, f = POINTERS[dtype], "*fp32"
    for layout in ("channels_last", "contiguous"):
        last = layout == "channels_last"
        block_c = batch_norm.ROW_BYTES // (4 if dtype == "float32" else 2) if last else 1
        tile = {
            "M": "i32", "C": "i32", "HW": "i32", "BLOCK_M": batch_norm.TILE // block_c,
            "BLOCK_C": block_c, "CHANNELS_LAST": last, "ACC": tl.float32, "INDEX": tl.int32,
        }  # fmt: skip
        part = {**tile, "pixels_per_part": "i32"}
        tables: dict[str, dict[str, Any]] = {
            "bn_stats_kernel": {"x_ptr": p, "parts_ptr": f, **part},
            "bn_apply_kernel": {
                "x_ptr": p, "residual_ptr": p, "y_ptr": p, "folded_ptr": f, "bias_ptr": f,
                "ACTIVATION": 1, **tile,
            },
            "bn_reduce_kernel": {
                "dy_ptr": p, "x_ptr": p, "y_ptr": p, "dresidual_ptr": p, "mean_ptr": f,
                "parts_ptr": f, **part,
            },
            "bn_backward_kernel": {
                "g_ptr": p, "x_ptr": p, "y_ptr": None, "dx_ptr": p, "mean_ptr": f, "folded_ptr": f,
                **tile,
            },
        }  # fmt: skip
        for kernel, args in tables.items():
            yield Job(kernel, layout, dtype, arch, args, batch_norm.WARPS)
    if dtype != "float32":
        return
    merge = {
        **dict.fromkeys(("M", "C", "parts"), "i32"), "EPS": 1e-5, "ACC": tl.float32,
        "BLOCK_P": batch_norm.MERGE_PARTS, "BLOCK_C": batch_norm.MERGE_CHANNELS,
    }  # fmt: skip
    vectors = ("parts_ptr", "weight_ptr", "mean_ptr", "var_ptr", "folded_ptr")
    args = {**dict.fromkeys(vectors, f), "pixels_per_part": "i32", **merge}
    yield Job("bn_stats_merge_kernel", "", dtype, arch, args, 4)
    vectors = ("parts_ptr", "weight_ptr", "var_ptr", "dweight_ptr", "dbias_ptr", "folded_ptr")
    yield Job("bn_reduce_merge_kernel", "", dtype, arch, {**dict.fromkeys(vectors, f), **merge}, 4)


# variant -> R, S, whether it is a matrix product (POINTWISE), outputs per group, and the divisor of
# C and of the strides of x (UNIT)
SHAPES = {
    "1x1": (1, 1, True, 256, 16),
    "3x3": (3, 3, False, 256, 16),
    "groups of 4": (3, 3, False, 4, 4),
    "stem": (7, 1, False, 64, 4),
}


def convolution_jobs(dtype: str, arch: int) -> Iterator[Job]:
    p, f = POINTERS[dtype], "*fp32"
    sizes = ("M", "K", "H", "W", "P", "Q", "units_of_c", "units_of_x_n", "units_of_x_h",
             "units_of_x_w", "y_n", "y_p", "y_q", "stride_h", "stride_w", "pad_h", "pad_w",
             "dilation_h", "dilation_w", "tiles_m", "tiles_n", "tiles_per_group")  # fmt: skip
    operands = ("tf32", "float32") if dtype == "float32" else (dtype,)
    target = Target("nvidia", f"sm_{arch}")
    candidates = [(o, c) for o in operands for c in configs.configs(o, target)]
    for kind, config in candidates:
        for name, (R, S, pointwise, outputs, unit) in SHAPES.items():
            groups = 1
            if name == "groups of 4":
                if config.block_n != 32:
                    continue  # narrow groups use narrow tiles
                gemm = Gemm(0, 32 * outputs, 4, R, S, 32, 1, kind)
                groups = configs.groups_per_tile(gemm, config.block_n, config.block_k)
            if name == "stem" and config.block_k != 32:
                continue
            for splits in (1, 4):
                if splits > 1 and (groups > 1 or config.block_m > tuning.MAX_SPLIT_ROWS):
                    continue
                args = {
                    "x_ptr": p, "weight_ptr": p, "scale_ptr": f, "shift_ptr": f,
                    "residual_ptr": p, "y_ptr": p, "sums_ptr": f if splits > 1 else None,
                    **dict.fromkeys(sizes, "i32"),
                    # Triton specializes arguments equal to 1 as constants.
                    **({} if name == "stem" else dict.fromkeys(("stride_h", "stride_w"), 1)),
                    "dilation_h": 1, "dilation_w": 1,
                    "R": R, "S": S, "UNIT": unit, "POINTWISE": pointwise, "GROUPS": groups,
                    "OUTPUTS": outputs, "ACTIVATION": 1, "SPLITS": splits,
                    "GROUP_M": config.group_m, "BLOCK_M": config.block_m,
                    "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
                    "PRECISION": "tf32" if kind == "tf32" else "ieee", "INDEX": tl.int32,
                }  # fmt: skip
                shape = f"{config.block_m}x{config.block_n}x{config.block_k}"
                variant = f"{shape}, {name}" + (", split" if splits > 1 else "")
                variant += ", TF32" if kind == "tf32" else ""
                yield Job(
                    "conv_bn_relu_kernel", variant, dtype, arch, args, config.warps, config.stages,
                    config.registers, tensor_cores=kind != "float32",
                )  # fmt: skip
    args = {
        "sums_ptr": f, "scale_ptr": f, "shift_ptr": f, "residual_ptr": p, "y_ptr": p,
        **dict.fromkeys(("M", "K", "P", "Q", "y_n", "y_p", "y_q", "splits"), "i32"),
        "ACTIVATION": 1, "BLOCK_M": convolution.MERGE_M, "BLOCK_N": convolution.MERGE_N,
        "INDEX": tl.int32,
    }  # fmt: skip
    yield Job("conv_merge_kernel", "", dtype, arch, args, 4)
    sizes = ("M", "H", "W", "P", "Q", "C", "K", "outputs", "x_n", "x_h", "x_w", "stride_h",
             "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "pixels_per_part",
             "tiles_k", "tiles_c")  # fmt: skip
    for kind in operands:
        tile = backward.tile_for(kind)
        args = {
            "g_ptr": p, "x_ptr": p, "parts_ptr": f, **dict.fromkeys(sizes, "i32"), "R": 3, "S": 3,
            "BLOCK_K": backward.BLOCK_K, "BLOCK_C": backward.BLOCK_C, "BLOCK_M": tile.block_m,
            "PRECISION": "tf32" if kind == "tf32" else "ieee", "INDEX": tl.int32,
        }  # fmt: skip
        yield Job(
            "conv_dweight_kernel", "TF32" if kind == "tf32" else "", dtype, arch, args, tile.warps,
            tile.stages, backward.REGISTERS, tensor_cores=kind != "float32",
        )  # fmt: skip


def sizes_of_one(job: Job) -> Job:
    """The same kernel with every size equal to 1."""
    args = {k: 1 if v in ("i32", "i64") else v for k, v in job.args.items()}
    return replace(job, variant="sizes of one", args=args, tensor_cores=False, found={})


def jobs(archs: list[int], dtypes: list[str], only: str) -> list[Job]:
    every = []
    for arch in archs:
        for dtype in dtypes:
            sources = (elementwise_jobs, batch_norm_jobs, convolution_jobs)
            listed = [job for of in sources for job in of(dtype, arch) if only in job.kernel]
            first = {job.kernel: job for job in reversed(listed)}
            every += listed
            every += [sizes_of_one(job) for job in first.values() if dtype != "float16"]
    return every


# Divisible by 16 for every convolution of a ResNet except the stem; strides of the taps are not.
DIVISIBLE = {
    "M",
    "K",
    "C",
    "HW",
    "x_n",
    "x_h",
    "x_w",
    "y_n",
    "y_p",
    "y_q",
    "n",
    "outputs",
    "pixels_per_part",
}


def compiled(job: Job) -> Job:
    """Compile `job` and set `found` to the resources in its cubin."""
    kernel = KERNELS[job.kernel]
    typed = {
        k: v
        for k, v in job.args.items()
        if isinstance(v, str) and v.startswith(("*", "i32", "i64", "fp32"))
    }
    signature = {name: typed.get(name, "constexpr") for name in kernel.arg_names}
    constants = {(i,): job.args[n] for i, n in enumerate(kernel.arg_names) if n not in typed}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in typed and (typed[name].startswith("*") or name in DIVISIBLE)
    }
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", job.arch, 32)
    options = {"num_warps": job.warps, "num_stages": job.stages, **support.OPTIONS}
    if job.registers:
        options["maxnreg"] = job.registers
    try:
        binary = triton.compile(source, target=target, options=options)
    except Exception as error:
        job.found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        return job
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True
        )
        sass = subprocess.run([BIN / "nvdisasm", "-c", file.name], capture_output=True, text=True)
    usage_of = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
    opcodes = collections.Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)",
                                             sass.stdout, re.M))  # fmt: skip
    patterns = {
        "tensor": TENSOR_CORES[job.arch],
        "loads16": r"LDG\S*\.128|LDGSTS\S*\.128|UTMALDG\S*",
        "stores16": r"STG\S*\.128|UTMASTG\S*",
        "spills": r"(?:STL|LDL)\S*",
        "narrow": r"LDG\S*\.[US]\d+\b",
    }
    counts = {
        key: sum(n for name, n in opcodes.items() if re.match(f"(?:{pattern})", name))
        for key, pattern in patterns.items()
    }
    job.found = {
        "registers": int(usage_of.get("REG", 0)),
        "stack_bytes": int(usage_of.get("STACK", 0)) + int(usage_of.get("LOCAL", 0)),
        "shared_bytes": binary.metadata.shared,
        "instructions": sum(opcodes.values()),
        "approximate": sorted(set(re.findall(r"\w+\.(?:approx|full)\S*", binary.asm["ptx"]))),
        **counts,
    }
    return job


def faults(job: Job) -> list[str]:
    found = job.found
    if "error" in found:
        return [found["error"]]
    messages = []
    if found["spills"]:  # a stack frame without spills, as ptxas sometimes emits, costs nothing
        messages.append(f"spills {found['stack_bytes']} bytes in {found['spills']} instructions")
    if found["shared_bytes"] > SHARED_BYTES[job.arch]:
        messages.append(f"needs {found['shared_bytes']} bytes of shared memory")
    if found["approximate"]:
        messages.append(f"uses {', '.join(found['approximate'])}")
    if job.tensor_cores and not found["tensor"]:
        messages.append("has no tensor core instructions")
    if job.tensor_cores and found["narrow"]:
        messages.append(f"loads element by element ({found['narrow']} instructions)")
    return messages


def main() -> int:
    parser = argparse.ArgumentParser(description="Resources of the Triton kernels, without a GPU.")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--dtype", nargs="+", default=list(POINTERS), choices=list(POINTERS))
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="write a results file into this folder")
    args = parser.parse_args()
    header = (
        "kernel",
        "variant",
        "dtype",
        "sm",
        "regs",
        "spill",
        "shared",
        "tensor",
        "ld16",
        "st16",
    )
    line = "{:24s} {:30s} {:8s} {:>4s} {:>4s} {:>5s} {:>7s} {:>6s} {:>5s} {:>5s}"
    print(line.format(*header))
    done, broken = [], 0
    with ProcessPoolExecutor(args.jobs) as pool:
        for job in pool.map(compiled, jobs(args.arch, args.dtype, args.kernel)):
            f, messages = job.found, faults(job)
            keys = ("registers", "spills", "shared_bytes", "tensor", "loads16", "stores16")
            cells = [str(f.get(key, "-")) for key in keys]
            print(
                line.format(job.kernel, job.variant, job.dtype, str(job.arch), *cells)
                + (f"  FAULT: {'; '.join(messages)}" if messages else ""),
                flush=True,
            )
            broken += bool(messages)
            done.append(job)
    print(f"{len(done)} kernels, Triton {triton.__version__}: {broken or 'no'} faults")
    if args.out:
        columns = ("kernel", "variant", "dtype", "arch", "warps", "stages", "found")
        table = [{k: v for k, v in asdict(job).items() if k in columns} for job in done]
        head = {**provenance("triton_resources", "cpu"), "triton": triton.__version__}
        print(save({**head, "shared_bytes": SHARED_BYTES, "kernels": table}, args.out))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
