"""Chooses the fused convolution for a weight, and the dtype it computes in."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from .convolution import Kind
from .cpu import convolution as cpu_convolution
from .cpu import onednn
from .cuda.convolution import GpuConv
from .registry import choose, forced, gpu_kernels


def conv_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype | None:
    """The dtype in which fused convolutions of `dtype` tensors compute; None if unsupported.

    On the CPU, float16 is computed in float32, which is more accurate and, on processors without
    float16 instructions, far faster. So is bfloat16 on processors without bfloat16 instructions.
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
    return dtype if cpu_convolution.supports(dtype) or onednn.supports(dtype) else torch.float32


def conv_kind(
    weight_shape: Sequence[int],
    dtype: torch.dtype,
    dilation: Sequence[int],
    groups: int,
    device_type: str,
) -> Kind | None:
    """The fused convolution class for `dtype`, as returned by `conv_dtype`; None if unsupported."""
    backend = choose("conv_bn_relu", device_type)
    if backend != "reference" and gpu_kernels(device_type):
        return GpuConv
    if backend not in ("native", "vendor"):
        return None
    native_supported = (
        backend == "native"
        and cpu_convolution.supports(dtype)
        and cpu_convolution.covers(weight_shape, dtype, dilation, groups)
    )
    # oneDNN uses AMX tiles for bfloat16 where the processor has them; the native kernel does not.
    use_amx = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() and forced() is None
    if native_supported and not use_amx:
        return cpu_convolution.NativeConv
    if onednn.unavailable() is None and onednn.supports(dtype):
        return onednn.PackedConv
    return cpu_convolution.NativeConv if native_supported else None
