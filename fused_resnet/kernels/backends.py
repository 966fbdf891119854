"""The one place that chooses who computes an op.

`_PREFERENCE` lists, per device type and op, the implementations from best to last resort. The first
one that is there serves the op, unless `use_backend` or FUSED_RESNET_BACKEND forces one.

    native      this package's C++ (and CUDA) kernels; a convolution they do not cover is vendor's
    triton      this package's Triton kernels: on GPUs; on the CPU, in Triton's interpreter, only
                where they are forced
    vendor      fused ops that PyTorch carries: oneDNN's on the CPU, cuDNN's on GPUs
    reference   the eager specification; as a forced choice it also makes every block of the ResNet
                family run exactly torchvision's path
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch

from . import native
from .convolution import Kind
from .cpu import convolution as native_conv
from .cpu import onednn as vendor

OPS = ("add_relu", "bn_add_relu", "conv_bn_relu")
BACKENDS = ("native", "triton", "vendor", "reference")

_PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "add_relu": ("native", "reference", "triton"),
        "bn_add_relu": ("native", "reference", "triton"),
        "conv_bn_relu": ("native", "vendor", "reference", "triton"),
    },
    "cuda": {
        "add_relu": ("native", "triton", "reference"),
        "bn_add_relu": ("native", "triton", "reference"),
        # The order for shapes that nobody has measured; `tuning` knows the fastest of the others.
        "conv_bn_relu": ("triton", "native", "vendor", "reference"),
    },
}

# Where a backend's kernels are, under the ops' names. Triton is imported where it is used.
KERNELS: dict[str, Callable[[], Any]] = {
    "native": lambda: torch.ops.fused_resnet_native,
    "triton": lambda: importlib.import_module("fused_resnet.kernels.triton.launchers"),
}

_forced: ContextVar[str | None] = ContextVar("fused_resnet_backend", default=None)


@functools.cache
def missing(op: str, backend: str, device_type: str) -> str | None:
    """None when `backend` serves `op` on `device_type`, else the reason why not, in one line."""
    if backend == "reference":
        return None
    if backend not in _PREFERENCE.get(device_type, {}).get(op, ()):
        return f"{backend} has no {op} for {device_type}"
    if backend == "vendor":
        if device_type == "cuda":
            return importlib.import_module("fused_resnet.kernels.cuda.cudnn").unavailable()
        return vendor.unavailable()
    if backend == "triton":
        # Asked for here and not above: importing fused_resnet imports no Triton.
        support = importlib.import_module("fused_resnet.kernels.triton.support")
        return support.unavailable(device_type)
    reason = native.load()
    if reason is not None:
        return reason
    key = "CUDA" if device_type == "cuda" else "CPU"
    gemm = op == "conv_bn_relu" and device_type == "cuda"
    name = f"fused_resnet_native::{'implicit_gemm' if gemm else op}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
        return f"the native build has no {key} code: rebuild it where a CUDA toolkit is installed"
    if device_type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if not native.runs_on(capability):
            archs = native.build_info()["cuda_archs"]
            return f"the native build ({archs}) has no code for sm_{capability[0]}{capability[1]}"
    if op == "conv_bn_relu" and not gemm and not native_conv.serves(torch.float32):
        return "the native convolution needs a processor with AVX2"
    return None


def _validate(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
    reasons = [
        missing(op, name, device)
        for device, table in _PREFERENCE.items()
        for op, order in table.items()
        if name in order
    ]
    if name != "reference" and all(reasons):
        raise RuntimeError(f"use_backend: {name!r} is not available: {reasons[0]}")
    return name


@functools.cache
def _from_environment() -> str | None:
    name = os.environ.get("FUSED_RESNET_BACKEND")
    return _validate(name) if name else None


def forced() -> str | None:
    """The backend that `use_backend` or FUSED_RESNET_BACKEND asks for, or None."""
    return _forced.get() or _from_environment()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within it, `name` serves every op that has it; other ops keep their own order.

    name: "native", "triton", "vendor" or "reference". With "reference", models of the family run
    exactly torchvision's path. Raises ValueError for an unknown name and RuntimeError for a backend
    that is not there, saying how to get it. The choice belongs to the current thread (or task).
    """
    token = _forced.set(_validate(name))
    try:
        yield
    finally:
        _forced.reset(token)


def choose(op: str, device_type: str) -> str:
    """The name of the backend that serves `op` on `device_type` now."""
    return _forced_for(op, device_type) or _preferred_and_said(op, device_type)


def _forced_for(op: str, device_type: str) -> str | None:
    name = forced()
    return name if name is not None and missing(op, name, device_type) is None else None


@functools.cache
def _preferred(op: str, device_type: str) -> str:
    """The first in the table that is there."""
    order = _PREFERENCE.get(device_type, {}).get(op, ("reference",))
    return next(name for name in order if missing(op, name, device_type) is None)


@functools.cache
def _preferred_and_said(op: str, device_type: str) -> str:
    """The same; a line says so where it is not the first choice."""
    first = _PREFERENCE.get(device_type, {}).get(op, ("reference",))[0]
    reason = missing(op, first, device_type)
    if reason is not None:
        # One message whatever serves instead, so that one cause is said once.
        _say_once(f"fused_resnet: {reason}; PyTorch's or other kernels serve until then")
    return _preferred(op, device_type)


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def table(device_type: str) -> list[dict[str, str | None]]:
    """One row per op and backend: who serves it on `device_type`, and why another does not."""
    serving = {op: _forced_for(op, device_type) or _preferred(op, device_type) for op in OPS}
    return [
        {
            "op": op,
            "backend": backend,
            "serves": "yes" if backend == serving[op] else "no",
            "missing": missing(op, backend, device_type),
        }
        for op in OPS
        for backend in _PREFERENCE.get(device_type, {}).get(op, ("reference",))
    ]


# --- convolutions -----------------------------------------------------------------------------


def gpu_kernels(device_type: str) -> bool:
    """Whether such tensors are for kernels of GPUs: on the CPU, in an interpreter or emulator."""
    return device_type == "cuda" or forced() in ("triton", "emulated")


def conv_contenders() -> tuple[str, ...]:
    """The backends that may compute a convolution on a GPU now, the preferred one first."""
    name = forced()
    if name is None:
        return _conv_contenders()
    # The emulated kernels are the native ones.
    return () if name == "reference" else ("native" if name == "emulated" else name,)


@functools.cache
def _conv_contenders() -> tuple[str, ...]:
    op, device = "conv_bn_relu", "cuda"
    found = (b for b in _PREFERENCE[device][op] if missing(op, b, device) is None)
    return tuple(b for b in found if b != "reference")


def conv_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype | None:
    """What fused convolutions of such tensors of `dtype` are computed in; None: not served.

    On the CPU, float16 is computed in float32, which is more accurate and, on processors without
    float16 instructions, far faster; so is bfloat16 where there are no bfloat16 instructions.
    """
    if gpu_kernels(device_type):
        return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else None
    return _conv_dtype_on_cpu(dtype)


@functools.cache
def _conv_dtype_on_cpu(dtype: torch.dtype) -> torch.dtype | None:
    if dtype in (torch.float32, torch.float16):
        return torch.float32
    if dtype != torch.bfloat16:
        return None
    return dtype if native_conv.serves(dtype) or vendor.serves(dtype) else torch.float32


def conv_kind(
    weight_shape: Sequence[int],
    dtype: torch.dtype,
    dilation: Sequence[int],
    groups: int,
    device_type: str,
) -> Kind | None:
    """Who computes such a convolution in `dtype` (of `conv_dtype`); None: nobody."""
    backend = choose("conv_bn_relu", device_type)
    if backend != "reference" and gpu_kernels(device_type):
        return importlib.import_module("fused_resnet.kernels.cuda.convolution").GpuConv
    if backend not in ("native", "vendor"):
        return None
    native_can = (
        backend == "native"
        and native_conv.serves(dtype)
        and native_conv.covers(weight_shape, dtype, dilation, groups)
    )
    # oneDNN multiplies bfloat16 by tiles where the processor can, which the native kernel does not.
    tiles = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() and forced() is None
    if native_can and not tiles:
        return native_conv.NativeConv
    if vendor.unavailable() is None and vendor.serves(dtype):
        return vendor.PackedConv
    return native_conv.NativeConv if native_can else None
