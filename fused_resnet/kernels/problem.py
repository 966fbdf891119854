"""A convolution seen as a matrix product: what GPU kernels are chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Geometry(NamedTuple):
    """stride, padding and dilation in pixels, over height and width."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def geometry_of(*sizes: Sequence[int]) -> Geometry:
    """From stride, padding and dilation as an op's arguments give them."""
    pairs = [(int(size[0]), int(size[1])) for size in sizes]
    return Geometry(*pairs)


class Problem(NamedTuple):
    """One convolution as a matrix product: M = N * P * Q pixels, K outputs, groups times C * R * S
    products each; stride over the width, which decides what a row of a tile reads; and what the
    operands are."""

    M: int
    K: int
    C: int  # per group
    R: int
    S: int
    groups: int
    stride: int
    operands: str  # "bfloat16", "float16", "tf32" or "float32"


def operands_of(dtype: torch.dtype) -> str:
    """What is multiplied (see `Problem`): TF32 only where PyTorch's own switch allows it."""
    if dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        return "tf32"
    return str(dtype).removeprefix("torch.")


class Layer(NamedTuple):
    """A convolution of a model: x's, the weight's and y's shape, and how they meet."""

    x_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    geometry: Geometry
    groups: int


def problem_of(layer: Layer, dtype: torch.dtype) -> Problem:
    """The matrix product that a layer is, of operands of `dtype`."""
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
    """(N, C, H, W) -> (N, K, P, Q) of a convolution; None where such an x does not fit."""
    if len(shape) != 4 or shape[1] != weight_shape[1] * groups or 0 in shape:
        return None
    sizes = tuple(
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            shape[2:], weight_shape[2:], stride, padding, dilation, strict=True
        )
    )
    return None if min(sizes) < 1 else (shape[0], weight_shape[0], *sizes)
