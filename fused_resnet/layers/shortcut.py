"""The shortcut without parameters: He et al. 2015 (1512.03385), section 3.3, option A."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

__all__ = ["PadShortcut"]

# The values of the enum in csrc/cpu/block/block.h.
SHORTCUTS = {"none": 0, "identity": 1, "projection": 2, "pad": 3}


class PadShortcut(nn.Module):
    """y[:, c] = x[:, c, ::stride, ::stride] for c < in_channels, 0 for the other channels.

    x: (N, in_channels, H, W) -> y: (N, out_channels, ceil(H / stride), ceil(W / stride)), in x's
    dtype. Raises ValueError if out_channels < in_channels.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if not 0 < in_channels <= out_channels:
            raise ValueError(
                f"PadShortcut: out_channels must be at least in_channels, {in_channels}, "
                f"got {out_channels}"
            )
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        y = x[:, :, :: self.stride, :: self.stride]
        return pad(y, [0, 0, 0, 0, 0, self.out_channels - self.in_channels])

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of y for an x of `shape` (N, in_channels, H, W)."""
        N, C, H, W = shape
        extra = self.out_channels - self.in_channels
        return N, C + extra, -(-H // self.stride), -(-W // self.stride)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


def padded(x: Tensor, channels: int, stride: int) -> Tensor:
    """PadShortcut's output for x (N, C, H, W): (N, channels, P, Q), in x's memory format."""
    nchw = x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.contiguous_format if nchw else torch.channels_last
    strided = x[:, :, ::stride, ::stride]
    shape = (x.shape[0], channels, *strided.shape[2:])
    y = torch.zeros(shape, dtype=x.dtype, device=x.device).contiguous(memory_format=memory_format)
    y[:, : x.shape[1]] = strided
    return y


def add_padded_gradient(dx: Tensor, dy: Tensor, stride: int) -> Tensor:
    """dx (N, C, H, W) plus the gradient of `padded` for dy (N, channels, P, Q), in place."""
    dx[:, :, ::stride, ::stride] += dy[:, : dx.shape[1]]
    return dx
