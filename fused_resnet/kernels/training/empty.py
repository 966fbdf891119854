"""The passes of an empty batch on one of several processes with synchronised norms: it takes part
in the collectives with a count of 0, and its gradients are zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet.dtypes import accumulate_dtype
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.problem import Geometry

from . import collectives
from .native import Native
from .protocol import Normed, NormGradients


class Empty(Native):
    """`Native` for tensors (0, C, H, W): the same collectives in the same order."""

    def supports(
        self, weight: Tensor, dtype: torch.dtype, g: Geometry, work: str = "convolution"
    ) -> bool:
        return False  # PyTorch's convolutions take empty batches

    def statistics(
        self, x: Tensor, group: Any = None, fused: tuple[Any, ...] | None = None
    ) -> tuple[Any, ...]:
        zeros = x.new_zeros(2, x.shape[1], dtype=torch.float64)
        return collectives.merge(zeros, 0, group)

    def apply(
        self, normed: Normed, residual: Tensor | Normed | None, activation: Activation
    ) -> Tensor:
        return torch.empty_like(normed.x)

    def norm_gradients(
        self, dy: Tensor, y: Tensor | None, normed: Normed, other: Normed | None = None, *,
        has_residual: bool, masked: bool = False,
    ) -> tuple[NormGradients, NormGradients | None, Tensor | None]:  # fmt: skip
        sums = normed.x.new_zeros(3, normed.x.shape[1], dtype=torch.float64)
        collectives.reduce(sums, normed.norm.group)

        def gradients(of: Normed) -> NormGradients:
            zeros = sums[0].to(accumulate_dtype(of.x.dtype))
            return NormGradients(torch.empty_like(of.x), zeros, zeros)

        second = None if other is None else gradients(other)
        return gradients(normed), second, dy if masked or other is not None else None
