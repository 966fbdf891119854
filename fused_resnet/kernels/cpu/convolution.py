"""Weight packing for the fused convolution of csrc/cpu/convolution/direct_kernels.h.

An implicit GEMM over channels_last activations for processors with AVX-512 or AVX2. bfloat16 is
multiplied by the processor's dot product where that is faster, else in float32 (`widens`). Scale,
shift, residual and ReLU are applied to the float32 sums, not folded into the weights, with one
rounding at the end; one packing is used for all input sizes. Most 3x3 convolutions of stride 1 have
a second packing, transformed for Winograd's minimal filtering and multiplied in float32;
csrc/cpu/convolution/conv_bn_relu.cpp chooses by the input size.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fused_resnet.kernels import native
from fused_resnet.kernels.convolution import FusedConv
from fused_resnet.kernels.problem import Problem
from fused_resnet.kernels.target import Target

# As in csrc/cpu/convolution/direct_kernels.h.
_LANES, _BLOCK_VECTORS, _MAX_TAPS, _CHAIN_STEPS = 16, 4, 128, 256
_FEW_CHANNELS = 16
# The largest C * K for which 3x3 weights are also packed for the Winograd algorithm F(m x m, 3x3).
# The packed weights take 16/9 of the original size in float32 or, with m = 4, 8 times the size in
# bfloat16; reading them per image must be cheap compared with the products saved.
_MAX_WINOGRAD_WEIGHTS = {2: 256 * 256, 4: 128 * 128}
_MIN_WINOGRAD_CHANNELS = 64  # input and output channels from which m = 4 pays
# G of csrc/cpu/convolution/winograd_kernels.h
_WINOGRAD_G = {
    2: ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    4: (
        (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1),
    ),
}  # fmt: skip


def supports(problem: Problem, target: Target) -> str | None:
    """None if the kernel computes the convolution, else the reason in one line."""
    if target.architecture not in ("avx2", "avx512"):
        return "the native convolution needs a processor with AVX2"
    dtype = problem.dtype
    if dtype is None:
        return None
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the native convolution computes float32 and bfloat16, not {str(dtype)[6:]}"
    K, C_per_group, R, S = problem.weight_shape
    groups = problem.geometry.groups
    if R * S > _MAX_TAPS:
        return f"the native convolution has at most {_MAX_TAPS} taps, not {R}x{S}"
    if groups > 1 and K // groups % _LANES:
        return f"the outputs of a group must be a multiple of {_LANES}, the length of a vector"
    if dtype == torch.bfloat16 and not widens(dtype) and C_per_group % 2 and not _merges(problem):
        return "the bfloat16 dot product needs an even number of channels"
    return None


def widens(dtype: torch.dtype) -> bool:
    """Whether convolutions of `dtype`, a narrower dtype, are multiplied in float32."""
    return dtype == torch.bfloat16 and native.widens_bfloat16()


def _merges(problem: Problem) -> bool:
    """Whether a row of taps is read as one contiguous run: with few channels, single taps are too
    short."""
    g = problem.geometry
    return g.groups == 1 and problem.weight_shape[1] < _FEW_CHANNELS and g.dilation[1] == 1


def winograd_tile(problem: Problem) -> int:
    """m of the Winograd algorithm F(m x m, 3x3) for the convolution, or 0. Instead of 9
    multiplications per output, m = 2 needs 4 and m = 4 needs 2.25, but the error of m = 4 is hidden
    only by bfloat16's rounding."""
    (K, C, R, S), g, dtype = problem.weight_shape, problem.geometry, problem.dtype
    assert dtype is not None
    if (R, S, g.groups) != (3, 3, 1) or (*g.stride, *g.dilation) != (1, 1, 1, 1):
        return 0
    if C % _LANES or K % _LANES:
        return 0
    wide = min(C, K) >= _MIN_WINOGRAD_CHANNELS
    if dtype == torch.bfloat16 and wide and _MAX_WINOGRAD_WEIGHTS[4] >= C * K:
        return 4
    in_float32 = dtype == torch.float32 or widens(dtype)
    return 2 if in_float32 and _MAX_WINOGRAD_WEIGHTS[2] >= C * K else 0


def _winograd(weight: Tensor, m: int) -> Tensor:
    """weight: (K, C, 3, 3) -> G weight G^T, (K, C, m + 2, m + 2) float32, computed in float64."""
    t = weight.double()
    for dim in (2, 3):
        # No matrix products: the float64 BLAS would allocate memory for this use only.
        taps = t.unbind(dim)
        rows = ([tap * g for tap, g in zip(taps, row, strict=True) if g] for row in _WINOGRAD_G[m])
        t = torch.stack([functools.reduce(torch.add, terms) for terms in rows], dim)
    return t.float()


def _pack(weight: Tensor, pair: int, vectors_per_block: int) -> Tensor:
    """weight: (K, run, R, S), K and run padded as needed -> (blocks, R * S, run / pair, vectors,
    16, pair) in memory, flat; the last block holds the remaining vectors."""
    _, run, R, S = weight.shape
    blocks = weight.split(vectors_per_block * _LANES)
    return torch.cat(
        [
            b.view(-1, _LANES, run // pair, pair, R, S).permute(4, 5, 2, 0, 1, 3).reshape(-1)
            for b in blocks
        ]
    )


def _padded(t: Tensor, dim: int, multiple: int) -> Tensor:
    """t, zero-padded at the end of `dim` to a multiple of `multiple`."""
    missing = -t.shape[dim] % multiple
    if missing == 0:
        return t
    shape = list(t.shape)
    shape[dim] = missing
    return torch.cat([t, t.new_zeros(shape)], dim)


class NativeConv(FusedConv):
    """A convolution packed for the native kernel; `supports` must return None for it."""

    def __init__(self, problem: Problem, weight: Tensor, scale: Tensor, shift: Tensor) -> None:
        super().__init__(problem, weight, scale, shift)
        stride, padding, dilation, groups = self.geometry
        dtype = self.dtype
        K, C_per_group, R, S = weight.shape
        weight = _padded(weight.detach().to(dtype), 0, _LANES)
        if widens(dtype):
            weight = weight.float()
        pair = 2 if weight.dtype == torch.bfloat16 else 1
        self._first_channel: Tensor | None = None
        self.takes_any = _merges(problem)
        self._channels = C_per_group
        taps, pad, dilate = [R, S], padding, dilation
        run = C_per_group
        if self.takes_any:
            # (K, C, R, S) -> (K, S * C, R, 1): `run` pads x, so that a row of taps is one run.
            if S * C_per_group >= pair * _CHAIN_STEPS:
                weight = _padded(weight, 1, pair)
            self._channels = weight.shape[1]
            run = S * self._channels
            weight = weight.permute(0, 3, 1, 2).reshape(-1, run, R, 1)
            if run % pair:  # the last value is multiplied twice by half of its weight
                weight = torch.cat([weight[:, :-1], weight[:, -1:] / 2, weight[:, -1:] / 2], 1)
            taps, pad, dilate = [R, 1], (0, 0), (dilation[0], 1)
        elif groups > 1:
            group = torch.arange(0, K, _LANES) // (K // groups)
            self._first_channel = _padded(group * C_per_group, 0, _BLOCK_VECTORS)
        # With groups, the kernel processes one vector at a time, so each is a block of its own.
        self._weight = _pack(weight, pair, _BLOCK_VECTORS if groups == 1 else 1)
        self._winograd: Tensor | None = None
        if m := winograd_tile(problem):
            # One block at a time: the transform needs several times the memory of its result.
            blocks = weight.split(_LANES * _BLOCK_VECTORS)
            packed = [_pack(_winograd(block, m), 1, _BLOCK_VECTORS) for block in blocks]
            self._winograd = torch.cat(packed)
        block = _LANES * _BLOCK_VECTORS
        self._scale = _padded(scale.detach().float(), 0, block).contiguous()
        self._shift = _padded(shift.detach().float(), 0, block).contiguous()
        self._sizes = [*taps, *stride, *pad, *dilate, K, run]

    def operands(self) -> tuple[list[Tensor], list[int]] | None:
        """Packed weight, Winograd weight (empty if none), scale and shift, and the geometry, as the
        ops for whole residual blocks take them; None if the convolution needs other arguments."""
        if self.takes_any or self._first_channel is not None:
            return None
        winograd = self._scale.new_empty(0) if self._winograd is None else self._winograd
        return [self._weight, winograd, self._scale, self._shift], self._sizes

    def run(
        self, x: Tensor, residual: Tensor | None, relu: bool, overwrite: bool = False
    ) -> Tensor:
        if self.takes_any:
            x = torch.ops.fused_resnet_native.pad_rows(
                x.to(self.dtype), self._channels, self.geometry.padding
            )
        elif x.dtype != self.dtype:
            raise RuntimeError(f"conv_bn_relu: x must be {self.dtype}, got {x.dtype}")
        return torch.ops.fused_resnet_native.conv_bn_relu(
            x, self._weight, self._winograd, self._scale, self._shift, self._first_channel,
            residual, overwrite, relu, False, self._sizes,
        )  # fmt: skip
