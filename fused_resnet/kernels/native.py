"""The compiled kernels as the package uses them, or why they are unavailable.

Loading them registers the C++ kernels as ``torch.ops.fused_resnet_native.*``. It never initialises
CUDA.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch

from . import library

_OPS = f"{library.OPS}::"


@functools.cache
def _loaded() -> tuple[library.Library | None, str | None]:
    try:
        return library.load(), None
    except library.Unavailable as reason:
        return None, str(reason)


@functools.cache
def load() -> str | None:
    """Loads the library once. Returns None if it is available, else the reason in one line."""
    return _loaded()[1]


def _ask(name: str, otherwise: Any, *arguments: Any) -> Any:
    """What the library's function `name` returns; `otherwise` without the library."""
    loaded = _loaded()[0]
    return otherwise if loaded is None else getattr(loaded, name)(*arguments)


def build_info() -> dict[str, object]:
    """Build details: compiler, flags, torch and CUDA versions, CUDA architectures and kernels, and
    the instruction set that the CPU kernels use on this machine. Empty without the library."""
    info = dict(_ask("build_info", {}))
    return {**info, "cuda_kernels": _cuda_kernels(info["cuda_archs"])} if info else info


def _cuda_kernels(archs: object) -> str:
    """Which CUDA kernels are in a build for these architectures."""
    if archs is None:
        return "none: built with FUSED_RESNET_CUDA=0 or without a CUDA toolkit"
    if "9.0a" in re.split("[; ]", str(archs)):
        return "for sm_80 and later, and Hopper's own (TMA, wgmma)"
    return (
        "for sm_80 and later; not Hopper's own (TMA, wgmma): built without 9.0 in "
        "TORCH_CUDA_ARCH_LIST"
    )


@functools.cache
def gemm_tiles() -> list[dict[str, int]]:
    """The tiles of the CUDA convolutions in the build, in the order of their indices:
    architecture, block_m, block_n, warps, stages, and whether kernels exist that apply a norm and
    a ReLU to their input as they read it. Empty without the library."""
    return list(_ask("gemm_tiles", []))


@functools.cache
def built_for(architecture: str) -> bool:
    """Whether the CUDA kernels were built for `architecture`, named as in TORCH_CUDA_ARCH_LIST."""
    return architecture in re.split("[; ]", str(build_info().get("cuda_archs")))


def code_for(capability: tuple[int, int]) -> str | None:
    """The code in the build that a GPU of this compute capability runs: "machine" (its own, or that
    of an older minor version), "PTX" (of any older version, which the driver compiles), or None."""
    found = None
    for name in re.split("[; ]", str(build_info().get("cuda_archs"))):
        match = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", name)
        if match is None:
            continue
        built = int(match[1]), int(match[2])
        if built == capability or (
            not match[3] and built[0] == capability[0] and built < capability
        ):
            return "machine"
        if match[4] and not match[3] and built < capability:
            found = "PTX"
    return found


def driver() -> str | None:
    """The CUDA version that the driver supports, "13.0"; None without one."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    version = ask() if ask is not None else 0
    return f"{version // 1000}.{version % 1000 // 10}" if version else None


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")[:2]))


def cuda_reason(capability: tuple[int, int], architecture: str) -> str | None:
    """Why the CUDA kernels of this build do not run with this torch and driver on a GPU of this
    compute capability; None if they do."""
    info = build_info()
    code, built, archs = code_for(capability), info.get("cuda_version"), info.get("cuda_archs")
    if built is None:
        return None if code else f"the native build ({archs}) has no code for {architecture}"
    theirs, supported = torch.version.cuda, driver()
    if theirs is not None and _version(theirs)[0] != _version(str(built))[0]:
        return (
            f"the native kernels are built for CUDA {built}, this torch is for CUDA {theirs}: "
            "install the wheel of torch's CUDA, or build from source"
        )
    if code is None:
        return f"the native build ({archs}) has no code for {architecture}"
    # Code of a newer minor version runs; the driver compiles PTX of its own version at most.
    needed = _version(str(built))[: 2 if code == "PTX" else 1]
    if supported is not None and _version(supported)[: len(needed)] < needed:
        return (
            f"the native kernels need a driver for CUDA {built} on {architecture}, this driver is "
            f"for CUDA {supported}"
        )
    return None


def convolution_reason(
    weight_shape: Sequence[int], dtype: object, dilation: Sequence[int], groups: int
) -> str | None:
    """Why no CPU kernel computes a convolution with packed weights (K, C / groups, R, S) of tensors
    of `dtype`, a torch.dtype; None if one does."""
    loaded, missing = _loaded()
    if loaded is None:
        return missing
    return loaded.convolution_reason(weight_shape, str(dtype)[6:], dilation, groups)


def training_reason(
    work: str, weight_shape: Sequence[int], dtype: object, geometry: Sequence[int]
) -> str | None:
    """Why no CPU kernel computes a pass of a training step ("convolution", "input_gradient" or
    "weight_gradient") of a convolution with weight (K, C / groups, R, S) of tensors of `dtype`, a
    torch.dtype; None if one does. geometry: stride, padding and dilation, (height, width) each, and
    groups."""
    loaded, missing = _loaded()
    if loaded is None:
        return missing
    return loaded.training_reason(work, weight_shape, str(dtype)[6:], geometry)


def widens_bfloat16() -> bool:
    """Whether bfloat16 convolutions on the CPU multiply in float32: where the processor has no
    bfloat16 dot product, or a slower one."""
    return bool(_ask("widens_bfloat16", False))


def widen_bfloat16(choice: bool | None) -> None:
    """Makes bfloat16 convolutions on the CPU multiply in float32 (True), by the bfloat16 dot
    product where available (False), or by the faster of the two (None). Weights that are already
    packed are unaffected."""
    _ask("widen_bfloat16", None, choice)


def kernels() -> list[dict[str, object]]:
    """One entry per kernel: name, device, architecture. On a machine with a GPU, entries of CUDA
    kernels also hold registers and shared memory; querying those initialises CUDA."""
    if load() is not None:
        return []
    ops = {op.split(".")[0] for op in torch._C._dispatch_get_all_op_names()}
    on_cpu = [
        op.removeprefix(_OPS) for op in sorted(ops)
        if op.startswith(_OPS) and torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU")
    ]  # fmt: skip
    common = {"device": "cpu", "arch": build_info()["cpu_isa"]}
    cpu = [{"name": name, **common, "registers": None, "shared_bytes": None} for name in on_cpu]
    return [*cpu, *({"device": "cuda", **kernel} for kernel in _ask("cuda_kernels", []))]


def memory() -> dict[str, int]:
    """Bytes of the CPU memory pool that training steps reuse: `used_bytes` by live tensors,
    `free_bytes`, and `peak_bytes`, the maximum of `used_bytes` since `reset_memory_peak`. Empty
    without the library."""
    return dict(_ask("memory", {}))


def reset_memory_peak() -> None:
    _ask("reset_memory_peak", None)


def release_memory() -> int:
    """Returns the unused memory of the CPU training pool to the system.

    A training step on the CPU reuses the memory of the previous step, because fresh memory costs a
    page fault per 4 KiB. Memory unused for several steps is released automatically. Call this when
    training is over and the process continues. Returns the number of bytes released.
    """
    return int(_ask("release_memory", 0))
