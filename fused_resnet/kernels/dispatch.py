"""Which fused convolution serves a weight, and the dtype it computes in."""

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
    """The dtype that fused convolutions of such tensors of `dtype` compute in; None: not served.

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
    return dtype if cpu_convolution.serves(dtype) or onednn.serves(dtype) else torch.float32


def conv_kind(
    weight_shape: Sequence[int],
    dtype: torch.dtype,
    dilation: Sequence[int],
    groups: int,
    device_type: str,
) -> Kind | None:
    """The fused convolution that computes it in `dtype` (of `conv_dtype`); None: not served."""
    backend = choose("conv_bn_relu", device_type)
    if backend != "reference" and gpu_kernels(device_type):
        return GpuConv
    if backend not in ("native", "vendor"):
        return None
    native_can = (
        backend == "native"
        and cpu_convolution.serves(dtype)
        and cpu_convolution.covers(weight_shape, dtype, dilation, groups)
    )
    # oneDNN multiplies bfloat16 by tiles where the processor can, which the native kernel does not.
    tiles = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() and forced() is None
    if native_can and not tiles:
        return cpu_convolution.NativeConv
    if onednn.unavailable() is None and onednn.serves(dtype):
        return onednn.PackedConv
    return cpu_convolution.NativeConv if native_can else None
