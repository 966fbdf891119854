"""The Triton implementations of the ops, with the signatures that ops/ uses for every provider."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_resnet.kernels.problem import geometry_of

from . import backward
from .batch_norm import bn_add_relu, bn_add_relu_backward
from .elementwise import add_relu, add_relu_backward, add_relu_out

__all__ = [
    "add_relu",
    "add_relu_backward",
    "add_relu_out",
    "bn_add_relu",
    "bn_add_relu_backward",
    "convolution_dweight",
    "convolution_dx",
]


def convolution_dx(
    g: Tensor,
    weight: Tensor,
    x_shape: torch.Size,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor | None:
    """g: (N, K, P, Q), weight: (K, C / groups, R, S) -> dx, x_shape; None if not supported."""
    return backward.convolution_dx(
        g, weight, x_shape, geometry_of(stride, padding, dilation), groups
    )


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
        g, x, weight_shape, geometry_of(stride, padding, dilation), groups
    )
