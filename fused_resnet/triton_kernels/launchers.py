"""The ops by Triton, with the signatures that ops.py calls every backend's kernels by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backward, convolution
from .batch_norm import bn_add_relu, bn_add_relu_backward
from .convolution import Geometry
from .elementwise import add_relu, add_relu_backward, add_relu_out

__all__ = [
    "add_relu",
    "add_relu_backward",
    "add_relu_out",
    "bn_add_relu",
    "bn_add_relu_backward",
    "conv_bn_relu",
    "convolution_dweight",
    "convolution_dx",
]


def _geometry(*sizes: Sequence[int]) -> Geometry:
    pairs = [(int(size[0]), int(size[1])) for size in sizes]
    return Geometry(*pairs)


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """x: (N, C, H, W), weight: (K, C / groups, R, S), residual: (N, K, P, Q), of any strides;
    scale, shift: (K,) float32 -> y (N, K, P, Q), channels_last."""
    geometry = _geometry(stride, padding, dilation)
    return convolution.conv_bn_relu(x, weight, scale, shift, residual, relu, geometry, groups)


def convolution_dx(
    g: Tensor,
    weight: Tensor,
    x_shape: torch.Size,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor | None:
    """g: (N, K, P, Q), weight: (K, C / groups, R, S) -> dx, x_shape; None where not served."""
    return backward.convolution_dx(g, weight, x_shape, _geometry(stride, padding, dilation), groups)


def convolution_dweight(
    g: Tensor,
    x: Tensor,
    weight_shape: torch.Size,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """g: (N, K, P, Q), x: (N, C, H, W) -> dweight, weight_shape, float32."""
    return backward.convolution_dweight(
        g, x, weight_shape, _geometry(stride, padding, dilation), groups
    )
