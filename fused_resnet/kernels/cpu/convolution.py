"""The fused convolution of csrc/cpu/convolution: weights packed once for all input sizes.

An implicit GEMM over channels_last activations for processors with AVX-512 or AVX2. bfloat16 is
multiplied by the processor's dot product where that is faster, else in float32. Scale, shift,
residual and activation are applied to the float32 sums, not folded into the weights, with one
rounding at the end. Most 3x3 convolutions of stride 1 have a second packing, transformed for
Winograd's minimal filtering and multiplied in float32; C++ chooses by the input size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_resnet.kernels import native
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.convolution import FusedConv
from fused_resnet.kernels.problem import Problem
from fused_resnet.kernels.target import Target


def supports(problem: Problem, target: Target) -> str | None:
    """None if the kernel computes the convolution, else the reason in one line."""
    if target.architecture not in ("avx2", "avx512"):
        return "the native convolution needs a processor with AVX2"
    if problem.dtype is None:
        return None
    g = problem.geometry
    return native.convolution_reason(problem.weight_shape, problem.dtype, g.dilation, g.groups)


class NativeConv(FusedConv):
    """A convolution packed for the native kernel; `supports` must return None for it.

    tensors: packed weight, Winograd weight (empty if none), scale, shift, and for groups the first
    input channel of every 16 outputs. sizes: taps and geometry; the last is 0 unless the kernel
    copies x."""

    def __init__(self, problem: Problem, weight: Tensor, scale: Tensor, shift: Tensor) -> None:
        super().__init__(problem, weight, scale, shift)
        *self.tensors, self.sizes = torch.ops.fused_resnet_native.pack_convolution(
            weight.detach().to(self.dtype), scale.detach().float().contiguous(),
            shift.detach().float().contiguous(), *self.geometry,
        )  # fmt: skip
        self.takes_any = self.sizes[-1] > 0

    def run(
        self, x: Tensor, residual: Tensor | None, activation: Activation, overwrite: bool = False
    ) -> Tensor:
        if self.takes_any:
            x = x.to(self.dtype)
        elif x.dtype != self.dtype:
            raise RuntimeError(f"conv_bn_relu: x must be {self.dtype}, got {x.dtype}")
        return torch.ops.fused_resnet_native.conv_bn_relu(
            x, *self.tensors, residual, overwrite, activation, self.sizes
        )
