"""Memory layouts: the layout of a tensor, and conversion of another tensor to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of x (N, C, H, W), or of the tensor it is a view of: channels_last or contiguous.

    A tensor that is both (one channel or one pixel) counts as contiguous. A view that is neither
    counts as channels_last if its channels are adjacent in memory.
    """
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.shape[1] > 1 and x.stride(1) == 1 and x.stride(3) >= x.shape[1]:
        return torch.channels_last
    return torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """x itself if it is dense in either layout, else a copy in the layout of `memory_format`."""
    return x.contiguous(memory_format=memory_format(x))


def exactly(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """t (N, C, H, W) in this layout, with its strides also for dimensions of one element."""
    t = t.contiguous(memory_format=memory_format)
    if 1 not in t.shape:
        return t
    _, C, H, W = t.shape
    last = memory_format == torch.channels_last
    strides = channels_last_strides(t.shape) if last else (C * H * W, H * W, W, 1)
    return t if t.stride() == strides else t.as_strided(t.shape, strides)


def normed(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """t (N, C, H, W) in this layout, with the strides of an output of PyTorch's norms: a tensor in
    both layouts (one channel or one pixel) has those of contiguous."""
    t = t.contiguous(memory_format=memory_format)
    return exactly(t, torch.contiguous_format) if t.is_contiguous() else t


def like(t: Tensor, x: Tensor) -> Tensor:
    """t, or a copy of it, with the strides of x, which is dense and has t's shape."""
    if t.stride() == x.stride():
        return t
    return torch.empty_strided(x.shape, x.stride(), dtype=t.dtype, device=t.device).copy_(t)


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised tensor with exactly the strides of x, which is dense. torch.empty_like
    changes the strides of dimensions of size one, but only on fake and meta tensors."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def empty(
    shape: Sequence[int | torch.SymInt],
    x: Tensor,
    memory_format: torch.memory_format,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """An uninitialised tensor on x's device; its strides depend only on shape and layout."""
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format)


def channels_last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense channels_last tensor of shape (N, C, H, W)."""
    _, C, H, W = shape
    return H * W * C, 1, W * C, C


def channels_last_empty(shape: Sequence[int], x: Tensor) -> Tensor:
    """An uninitialised channels_last tensor of x's dtype on its device."""
    strides = channels_last_strides(shape)
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)


def channels_last(t: Tensor) -> Tensor:
    """t, or a copy of it, with exactly the strides of channels_last.

    PyTorch does not normalise the strides of dimensions of size one, and GPU kernels read all four.
    """
    t = t.contiguous(memory_format=torch.channels_last)
    strides = channels_last_strides(t.shape)
    return t if t.stride() == strides else t.as_strided(t.shape, strides)
