"""Output shapes of the CPU's inference ops, for graphs that call them: without data, a compiler or
torch.export asks for no more."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# The order of values in csrc/cpu/convolution/conv_bn_relu.h and csrc/cpu/block/block.h.
_R, _S, _STRIDE, _PADDING, _DILATION, _K, _RUN, _COPIED, _COUNT = 0, 1, 2, 4, 6, 8, 9, 10, 11
_CONVS, _SHORTCUT, _KERNEL, _BLOCK_VALUES = 0, 1, 5, 11
_PROJECTION = 2


def _convolved(x: Tensor, geometry: Sequence[int]) -> Tensor:
    """x: (N, C, H, W); geometry: one convolution's. Returns (N, K, P, Q), channels_last."""
    g = geometry
    # A tap of a convolution that copies x reads a row of several.
    extents = g[_R], g[_RUN] // g[_COPIED] if g[_COPIED] else g[_S]
    sizes = [
        (size + 2 * g[_PADDING + i] - g[_DILATION + i] * (extents[i] - 1) - 1) // g[_STRIDE + i] + 1
        for i, size in enumerate(x.shape[2:])
    ]
    shape: Any = (x.shape[0], g[_K], *sizes)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _conv_bn_relu(
    x: Tensor, weight: Tensor, winograd: Tensor, scale: Tensor, shift: Tensor,
    first_channel: Tensor, residual: Tensor | None, overwrite: bool, activation: int,
    geometry: Sequence[int],
) -> Tensor:  # fmt: skip
    return _convolved(x, geometry)


def _block_inference(
    x: Tensor, tensors: Sequence[Tensor], geometry: Sequence[int], eps: Sequence[float],
    activations: Sequence[int], blocks: Sequence[int], overwrite: bool,
) -> Tensor:  # fmt: skip
    at = 0
    for i in range(0, len(blocks), _BLOCK_VALUES):
        count = blocks[i + _CONVS]
        for j in range(count - (blocks[i + _SHORTCUT] == _PROJECTION)):
            x = _convolved(x, geometry[(at + j) * _COUNT : (at + j + 1) * _COUNT])
        at += count
        window = blocks[i + _KERNEL : i + _BLOCK_VALUES]
        if window[0]:
            x = _max_pool2d(x, window[:2], window[2:4], window[4:])
    return x


def _max_pool2d(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    shape: list[Any] = list(x.shape)
    for i in range(2):
        shape[2 + i] = (shape[2 + i] + 2 * padding[i] - kernel_size[i]) // stride[i] + 1
    return torch.empty(
        tuple(shape), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


@functools.cache
def register() -> None:
    """Tells PyTorch the shapes. The ops' library must be loaded."""
    for name, fake in (
        ("conv_bn_relu", _conv_bn_relu), ("block_inference", _block_inference),
        ("max_pool2d", _max_pool2d),
    ):  # fmt: skip
        torch.library.register_fake(f"fused_resnet_native::{name}", fake)
