"""A convolution described as a matrix product, by which GPU kernels are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Geometry(NamedTuple):
    """Stride, padding and dilation in pixels, each (height, width)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def geometry_of(*sizes: Sequence[int]) -> Geometry:
    """A `Geometry` from the stride, padding and dilation arguments of an op."""
    pairs = [(int(size[0]), int(size[1])) for size in sizes]
    return Geometry(*pairs)


class Problem(NamedTuple):
    """One convolution as a matrix product.

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
    """`Problem.operands` for `dtype`: TF32 only if torch.backends.cudnn.allow_tf32 is set."""
    if dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        return "tf32"
    return str(dtype).removeprefix("torch.")


class Layer(NamedTuple):
    """A convolution of a model: the shapes of x, weight and y, the geometry and the groups."""

    x_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    geometry: Geometry
    groups: int


def problem_of(layer: Layer, dtype: torch.dtype) -> Problem:
    """The matrix product of a layer with operands of `dtype`."""
    K, C, R, S = layer.weight_shape
    N, _, P, Q = layer.y_shape
    stride = layer.geometry.stride[1]
    return Problem(N * P * Q, K, C, R, S, layer.groups, stride, operands_of(dtype))


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
    sizes = tuple(
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            shape[2:], weight_shape[2:], stride, padding, dilation, strict=True
        )
    )
    return None if min(sizes) < 1 else (shape[0], weight_shape[0], *sizes)
