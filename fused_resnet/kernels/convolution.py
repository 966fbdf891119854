"""The base class of fused convolutions. Weights are packed once; batch normalisation, residual and
ReLU are applied as the result is stored.

    y = relu(conv(x, weight) * scale[k] + shift[k] + residual)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import native
from .problem import output_shape

# A factor of ten below the largest float32 and bfloat16, 3.4e38, so that the rounding of the bound
# itself does not matter.
BOUND_LIMIT = 1e37


def max_abs(x: Tensor) -> float:
    """The largest |x| of a tensor of any shape; NaN if x contains a NaN, 0 if it is empty."""
    if x.numel() == 0:
        return 0.0
    if native.load() is None and (
        x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    ):
        return torch.ops.fused_resnet_native.abs_max(x)
    low, high = map(float, torch.aminmax(x))
    return math.nan if math.isnan(low) or math.isnan(high) else max(-low, high)


class FusedConv:
    """One convolution with folded batch normalisation and its weights packed in `dtype`.

    weight: (K, C/groups, R, S); scale, shift: (K,). With |x| <= B for all of x, every |output| and
    every partial sum is at most B * gain + shift_max; gain = max over k of |scale[k]| times the sum
    of |weight[k]|, inf if that is non-finite. If `needs_bound`, the result equals stock's only
    while that bound is finite.
    """

    needs_bound = False
    # Whether `run` accepts x in any layout and floating dtype, not only channels_last of `dtype`.
    takes_any = False

    gain, shift_max = math.inf, math.inf
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

    def measure_gain(self, weight: Tensor, scale: Tensor, shift: Tensor) -> None:
        """weight (K, C/groups, R, S), scale, shift (K,) -> gain and shift_max."""
        sums = weight.detach().float().abs().sum((1, 2, 3)) * scale.detach().float().abs()
        gain = float(sums.max()) * (1 + 2**-7)  # 2^-8: rounding to bfloat16
        shift_max = max_abs(shift.detach().float().contiguous())
        finite = math.isfinite(gain) and math.isfinite(shift_max)
        if finite:
            self.gain, self.shift_max = gain, shift_max

    def bound(self, x_bound: float) -> float:
        """An upper bound of every |output| and partial sum, given one of |x|; NaN for NaN."""
        return x_bound * self.gain + self.shift_max

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
