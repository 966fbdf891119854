"""The fused convolution of csrc/cpu/convolution: weights packed once for all input sizes.

An implicit GEMM over channels_last activations for processors with AVX-512 or AVX2. bfloat16 is
multiplied by the processor's dot product where that is faster, else in float32. Scale, shift,
residual and ReLU are applied to the float32 sums, not folded into the weights, with one rounding at
the end. Most 3x3 convolutions of stride 1 have a second packing, transformed for Winograd's minimal
filtering and multiplied in float32; C++ chooses by the input size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_resnet.kernels import native
from fused_resnet.kernels.convolution import FusedConv


@functools.cache
def supports(dtype: torch.dtype) -> bool:
    """Whether the kernel supports `dtype` on this processor."""
    return str(dtype)[6:] in native.build_info().get("conv_dtypes", ())  # type: ignore[operator]


def covers(
    weight_shape: Sequence[int], dtype: torch.dtype, dilation: Sequence[int], groups: int
) -> bool:
    """Whether the kernel supports the convolution with weight (K, C / groups, R, S)."""
    return native.convolution_reason(weight_shape, dtype, dilation, groups) is None


class NativeConv(FusedConv):
    """A convolution packed for the native kernel; `covers` must be True for it."""

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        dtype: torch.dtype,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        super().__init__(weight.shape, dtype, stride, padding, dilation, groups)
        self.measure_gain(weight, scale, shift)
        vectors = (v.detach().float().contiguous() for v in (scale, shift))
        # Packed weight, Winograd weight (empty if none), scale, shift, and for groups the first
        # input channel of every 16 outputs; and the geometry, whose last value is 0 unless the
        # kernel copies x.
        *self.tensors, self.geometry = torch.ops.fused_resnet_native.pack_convolution(
            weight.detach().to(dtype), *vectors, stride, padding, dilation, groups
        )
        self.takes_any = self.geometry[-1] > 0

    def run(
        self, x: Tensor, residual: Tensor | None, relu: bool, overwrite: bool = False
    ) -> Tensor:
        if self.takes_any:
            x = x.to(self.dtype)
        elif x.dtype != self.dtype:
            raise RuntimeError(f"conv_bn_relu: x must be {self.dtype}, got {x.dtype}")
        return torch.ops.fused_resnet_native.conv_bn_relu(
            x, *self.tensors, residual, overwrite, relu, self.geometry
        )
