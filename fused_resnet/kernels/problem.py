"""What a provider of kernels is asked: an op and, for a convolution, dtype, shapes and geometry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fused_resnet.dtypes import convolves_in_tf32

from .activation import Activation


class Geometry(NamedTuple):
    """A convolution's stride, padding and dilation in pixels, (height, width), and its groups."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int = 1


def pair(v: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from a setting of a module, which may be one value for both."""
    if isinstance(v, int):
        return v, v
    return (v[0], v[0]) if len(v) == 1 else (v[0], v[1])


def output_shape(
    shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, ...] | None:
    """(N, C, H, W) -> (N, K, P, Q) of a convolution; None if x is empty or does not fit."""
    if len(shape) != 4 or shape[1] != weight_shape[1] * groups or 0 in shape:
        return None
    _, _, R, S = weight_shape
    P = (shape[2] + 2 * padding[0] - dilation[0] * (R - 1) - 1) // stride[0] + 1
    Q = (shape[3] + 2 * padding[1] - dilation[1] * (S - 1) - 1) // stride[1] + 1
    return None if min(P, Q) < 1 else (shape[0], weight_shape[0], P, Q)


class Gemm(NamedTuple):
    """One convolution as a matrix product, by which the kernels of GPUs are measured and chosen.

    M = N * P * Q pixels, K output channels, C * R * S products per output in each of `groups`
    groups. stride: over the width, which determines what a row of a tile reads. operands: the type
    that is multiplied.
    """

    M: int
    K: int
    C: int  # per group
    R: int
    S: int
    groups: int
    stride: int
    operands: str  # "bfloat16", "float16", "tf32" or "float32"


def operands_of(dtype: torch.dtype) -> str:
    """`Gemm.operands` for `dtype`: TF32 only if PyTorch allows it."""
    if dtype == torch.float32 and convolves_in_tf32():
        return "tf32"
    return str(dtype).removeprefix("torch.")


class Problem(NamedTuple):
    """One op, in general (only `op` is given), or one convolution.

    dtype: in which the convolution computes. weight_shape: (K, C/groups, R, S). x_shape: (N, C, H,
    W), or empty if it is not known yet; for the CPU's kernels it does not matter.
    """

    op: str
    dtype: torch.dtype | None = None
    weight_shape: tuple[int, ...] = ()
    geometry: Geometry = Geometry((1, 1), (0, 0), (1, 1))
    x_shape: tuple[int, ...] = ()
    activation: Activation = Activation.RELU

    @property
    def y_shape(self) -> tuple[int, ...]:
        """(N, K, P, Q)."""
        shape = output_shape(self.x_shape, self.weight_shape, *self.geometry)
        assert shape is not None, self
        return shape

    def gemm(self) -> Gemm:
        """The convolution as a matrix product; of one pixel if x's shape is not known."""
        assert self.dtype is not None
        N, _, P, Q = self.y_shape if self.x_shape else (1, 0, 1, 1)
        K, C, R, S = self.weight_shape
        g = self.geometry
        return Gemm(N * P * Q, K, C, R, S, g.groups, g.stride[1], operands_of(self.dtype))


def convolution(
    weight_shape: Sequence[int],
    dtype: torch.dtype | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: Activation = Activation.RELU,
) -> Problem:
    """The `Problem` of conv_bn_relu with these arguments, computed in `dtype`."""
    geometry = Geometry(
        (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups
    )
    return Problem("conv_bn_relu", dtype, tuple(weight_shape), geometry, (), activation)
