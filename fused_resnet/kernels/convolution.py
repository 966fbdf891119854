"""The base class of fused convolutions. Weights are packed once; batch normalisation, residual and
ReLU are applied as the result is stored.

    y = relu(conv(x, weight) * scale[k] + shift[k] + residual)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .problem import output_shape


class FusedConv:
    """One convolution with folded batch normalisation and its weights packed in `dtype`.

    weight: (K, C/groups, R, S); scale, shift: (K,).
    """

    # Whether `run` accepts x in any layout and floating dtype, not only channels_last of `dtype`.
    takes_any = False

    is_cached = False  # whether the convolution is reused by later calls

    def __init__(
        self,
        weight_shape: Sequence[int],
        dtype: torch.dtype,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        self.dtype = dtype
        self.stride, self.padding, self.dilation = list(stride), list(padding), list(dilation)
        self.groups = groups
        self.weight_shape = tuple(weight_shape)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """(N, C, H, W) of x -> (N, K, P, Q); None if x is empty or does not fit."""
        return output_shape(
            shape, self.weight_shape, self.stride, self.padding, self.dilation, self.groups
        )

    def run(
        self, x: Tensor, residual: Tensor | None, relu: bool, overwrite: bool = False
    ) -> Tensor:
        """x: (N, C, H, W), residual: None or (N, K, P, Q), both channels_last of `dtype` ->
        (N, K, P, Q) channels_last. `overwrite` allows writing to the residual's memory."""
        raise NotImplementedError


# A subclass of `FusedConv`: weight, scale, shift, dtype, stride, padding, dilation, groups -> it.
Kind = Callable[..., FusedConv]
