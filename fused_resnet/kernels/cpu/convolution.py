"""The fused convolution of csrc/cpu/convolution: weights packed once for all input sizes.

An implicit GEMM over channels_last activations for processors with AVX-512 or AVX2. bfloat16 is
multiplied by the processor's dot product where that is faster, else in float32. Scale, shift,
residual and activation are applied to the float32 sums, not folded into the weights, with one
rounding at the end. Most 3x3 convolutions of stride 1 have a second packing, transformed for
Winograd's minimal filtering and multiplied in float32; C++ chooses by the input size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fused_resnet.kernels import native
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.convolution import FusedConv, Pairs
from fused_resnet.kernels.problem import Problem
from fused_resnet.kernels.target import Target

_EXACT = torch.float16, torch.float32  # of a weight and of its packing, which has all its values
_LINE_BYTES = 64
# Of a transformed weight. One of 128 x 128 takes 1 MiB, one of 256 x 256 takes 4: the five such of
# ResNet-50 take 20 MiB, a fifth of all its weights.
_LARGE_BYTES = 2**21


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
        self.tensors: list[Tensor]
        *self.tensors, self.sizes = torch.ops.fused_resnet_native.pack_convolution(
            weight.detach().to(self.dtype), scale.detach().float().contiguous(),
            shift.detach().float().contiguous(), *self.geometry,
        )  # fmt: skip
        self.takes_any = self.sizes[-1] > 0

    def holds(self, weight: Tensor) -> Callable[[Tensor], Pairs] | str:
        if weight.dtype != self.dtype and (weight.dtype, self.dtype) != _EXACT:
            return f"it is {weight.dtype}, and packed as {self.dtype}"
        channels = self.sizes[-1]
        return functools.partial(_pairs, self.tensors[0], channels, self.geometry.groups)

    def save_memory(self) -> None:
        if self.tensors[1].nbytes > _LARGE_BYTES:
            self.tensors[1] = self.tensors[1].new_empty(0)

    def move(self, memory: torch.UntypedStorage) -> bool:
        packed = self.tensors[0]
        if memory.nbytes() != packed.nbytes or memory.data_ptr() % _LINE_BYTES:
            return False
        moved = packed.new_empty(0).set_(memory, 0, packed.shape, (1,))
        self.tensors[0] = moved.copy_(packed)
        return True

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


def _pairs(packed: Tensor, channels: int, groups: int, weight: Tensor) -> Pairs:
    """See `FusedConv.holds`: the inverse of csrc/cpu/convolution/pack.cpp, by views.

    packed: (blocks of outputs, taps, run / pair, outputs of a block, pair) in memory, flat, where a
    block has 64 outputs (with groups 16), the last one those that remain, rounded up to 16. A tap
    is one of R * S and `run` the C inputs of a group; or, with few channels, a tap is one of R rows
    and `run` S * channels inputs, channels > 0. weight: (K, C, R, S)."""
    K, C, R, S = weight.shape
    pair = 1 if packed.dtype == torch.float32 else 2
    if packed.dtype == torch.float32 and weight.dtype == torch.bfloat16:  # its upper halves
        packed = packed.view(torch.int16)[1::2].view(torch.bfloat16)
    packed = packed.to(weight.dtype)
    outputs = -(-K // 16) * 16
    if channels > 0:
        return _row_pairs(packed, channels, outputs, pair, weight)
    block = 16 if groups > 1 else 64
    pairs, whole = [], K // block * block
    per_output = packed.numel() // outputs
    if whole:
        from_ = packed[: whole * per_output].view(-1, R, S, C // pair, block, pair)
        to = weight[:whole].unflatten(1, (-1, pair)).unflatten(0, (-1, block))
        pairs.append((to, from_.permute(0, 4, 3, 5, 1, 2)))
    if whole < K:
        from_ = packed[whole * per_output :].view(R, S, C // pair, outputs - whole, pair)
        to = weight[whole:].unflatten(1, (-1, pair))
        pairs.append((to, from_.permute(3, 2, 4, 0, 1)[: K - whole]))
    return pairs


def _row_pairs(packed: Tensor, channels: int, outputs: int, pair: int, weight: Tensor) -> Pairs:
    """`_pairs` where a row of taps is one run. Its last value stands twice by half, if the run is
    odd and the product takes pairs."""
    K, C, R, S = weight.shape
    run = S * channels
    pairs = []
    for first in range(0, K, 64):
        block, count = min(64, outputs - first), min(64, K - first)
        per_output = packed.numel() // outputs
        part = packed[first * per_output : (first + block) * per_output]
        rows = part.view(R, -1, block, pair).permute(2, 0, 1, 3).reshape(block, R, -1)[:count]
        if rows.shape[2] > run:
            rows[:, :, run - 1] *= 2
        taps = rows[:, :, :run].view(count, R, S, channels)[:, :, :, :C]
        pairs.append((weight[first : first + count], taps.permute(0, 3, 1, 2)))
    return pairs
