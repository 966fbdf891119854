"""What every fused convolution has in common: weights packed once, with batch normalisation,
residual and ReLU applied as the result is stored.

    y = relu(conv(x, weight) * scale[k] + shift[k] + residual)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import native
from .problem import output_shape

# Bounds are kept a factor of ten below the largest float32 (and bfloat16), 3.4e38, so that the
# rounding of the bound itself can never matter.
BOUND_LIMIT = 1e37


def max_abs(x: Tensor) -> float:
    """The largest |x| over a tensor of any shape; NaN when x holds a NaN, 0 when it is empty."""
    if x.numel() == 0:
        return 0.0
    if native.load() is None and (
        x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    ):
        return torch.ops.fused_resnet_native.abs_max(x)
    low, high = map(float, torch.aminmax(x))
    return math.nan if math.isnan(low) or math.isnan(high) else max(-low, high)


class FusedConv:
    """One convolution with batch normalisation folded in and its weights packed in `dtype`.

    weight: (K, C/groups, R, S); scale, shift: (K,). With |x| <= B for all of x, every |output| and
    every partial sum is at most B * gain + shift_max; gain = max over k of |scale[k]| times the sum
    of |weight[k]|, inf where that is no finite number. Where `needs_bound`, the result is stock's
    only while such a bound is finite.
    """

    needs_bound = False
    # Whether `run` takes x of any layout and floating dtype, rather than channels_last of `dtype`.
    takes_any = False

    gain, shift_max = math.inf, math.inf
    lasting = False  # whether somebody keeps it for later calls

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
        """An upper bound for every |output| and partial sum, given one for |x|; NaN stays NaN."""
        return x_bound * self.gain + self.shift_max

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """(N, C, H, W) of x -> (N, K, P, Q); None where such an x does not fit, or is empty."""
        return output_shape(
            shape, self.weight_shape, self.stride, self.padding, self.dilation, self.groups
        )

    def run(
        self, x: Tensor, residual: Tensor | None, relu: bool, overwrite: bool = False
    ) -> Tensor:
        """x: (N, C, H, W), residual: None or (N, K, P, Q), both channels_last of `dtype` ->
        (N, K, P, Q) channels_last; in the residual's memory where `overwrite` allows that."""
        raise NotImplementedError


# A class of `FusedConv`, made of weight, scale, shift, dtype, stride, padding, dilation, groups.
Kind = Callable[..., FusedConv]
