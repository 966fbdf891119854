"""The fused convolution of csrc/cpu/convolution/direct_kernels.h: how weights are packed for it.

An implicit GEMM over channels_last activations for processors with AVX-512 or AVX2. bfloat16 is
multiplied by the processor's dot product where that is the faster way, else in float32 (`widens`).
Weights are packed as they are: scale, shift, residual and ReLU are applied to the float32 sums,
with one rounding at the end, and one packing serves every input size. Most 3x3 convolutions of
stride 1 have a second one, transformed for Winograd's minimal filtering and multiplied in float32;
csrc/cpu/convolution/conv_bn_relu.cpp chooses by the size of the input.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_resnet.kernels import native
from fused_resnet.kernels.convolution import FusedConv

# As in csrc/cpu/convolution/direct_kernels.h.
_LANES, _BLOCK_VECTORS, _MOST_TAPS, _PIECE = 16, 4, 128, 256
_FEW_CHANNELS = 16
# C * K up to which 3x3 weights are packed for Winograd's form F(m x m, 3x3) too, 16/9 of their size
# in float32 or, m = 4, 8 times that in bfloat16: what is read of them per image must be little
# beside the products saved.
_WINOGRAD_WEIGHTS = {2: 256 * 256, 4: 128 * 128}
_WINOGRAD_CHANNELS = 64  # in and out, from which m = 4 pays
# G of csrc/cpu/convolution/winograd_kernels.h
_WINOGRAD_G = {
    2: ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    4: (
        (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1),
    ),
}  # fmt: skip


@functools.cache
def serves(dtype: torch.dtype) -> bool:
    """Whether the kernel computes in `dtype` on this processor."""
    return str(dtype)[6:] in native.build_info().get("conv_dtypes", ())  # type: ignore[operator]


def widens(dtype: torch.dtype) -> bool:
    """Whether convolutions of `dtype` are multiplied in float32 without being of it."""
    return dtype == torch.bfloat16 and native.widens_bfloat16()


def covers(
    weight_shape: Sequence[int], dtype: torch.dtype, dilation: Sequence[int], groups: int
) -> bool:
    """Whether the kernel does such a convolution: in bfloat16 channels come in pairs, and a vector
    of 16 outputs reads one group's channels."""
    K, C_per_group, R, S = weight_shape
    paired = dtype != torch.bfloat16 or widens(dtype) or C_per_group % 2 == 0
    whole = groups == 1 or K // groups % _LANES == 0
    return R * S <= _MOST_TAPS and whole and (paired or _merges(weight_shape, dilation, groups))


def _merges(weight_shape: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    """Whether a row of taps is read as one run: with few channels a tap alone is too short."""
    return groups == 1 and weight_shape[1] < _FEW_CHANNELS and dilation[1] == 1


def winograd_tile(
    weight_shape: Sequence[int],
    dtype: torch.dtype,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> int:
    """m of the form F(m x m, 3x3) that such a convolution has, or 0: of 9 multiplications for each
    output, m = 2 leaves 4 and m = 4, whose error only bfloat16's rounding hides, 2.25."""
    K, C, R, S = weight_shape
    if (R, S, groups) != (3, 3, 1) or (*stride, *dilation) != (1, 1, 1, 1):
        return 0
    if C % _LANES or K % _LANES:
        return 0
    wide = min(C, K) >= _WINOGRAD_CHANNELS
    if dtype == torch.bfloat16 and wide and _WINOGRAD_WEIGHTS[4] >= C * K:
        return 4
    in_float32 = dtype == torch.float32 or widens(dtype)
    return 2 if in_float32 and _WINOGRAD_WEIGHTS[2] >= C * K else 0


def _winograd(weight: Tensor, m: int) -> Tensor:
    """weight: (K, C, 3, 3) -> G weight G^T, (K, C, m + 2, m + 2), by way of float64."""
    t = weight.double()
    for dim in (2, 3):
        # Not by matrix products: the library for those of float64 takes memory for nothing else.
        taps = t.unbind(dim)
        rows = ([tap * g for tap, g in zip(taps, row, strict=True) if g] for row in _WINOGRAD_G[m])
        t = torch.stack([functools.reduce(torch.add, terms) for terms in rows], dim)
    return t.float()


def _pack(weight: Tensor, pair: int, vectors_per_block: int) -> Tensor:
    """weight: (K, run, R, S), both padded as needed -> (blocks, R * S, run / pair, vectors, 16,
    pair) in memory, flat; the last block holds the vectors that are left."""
    _, run, R, S = weight.shape
    blocks = weight.split(vectors_per_block * _LANES)
    return torch.cat(
        [
            b.view(-1, _LANES, run // pair, pair, R, S).permute(4, 5, 2, 0, 1, 3).reshape(-1)
            for b in blocks
        ]
    )


def _padded(t: Tensor, dim: int, multiple: int) -> Tensor:
    """t with zeros appended along `dim` up to a multiple."""
    missing = -t.shape[dim] % multiple
    if missing == 0:
        return t
    shape = list(t.shape)
    shape[dim] = missing
    return torch.cat([t, t.new_zeros(shape)], dim)


class NativeConv(FusedConv):
    """A convolution as the kernel takes it; `covers` must have said yes."""

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
        K, C_per_group, R, S = weight.shape
        weight = _padded(weight.detach().to(dtype), 0, _LANES)
        if widens(dtype):
            weight = weight.float()
        pair = 2 if weight.dtype == torch.bfloat16 else 1
        self._first_channel: Tensor | None = None
        self.takes_any = _merges(self.weight_shape, dilation, groups)
        self._channels = C_per_group
        taps, pad, dilate = [R, S], self.padding, self.dilation
        run = C_per_group
        if self.takes_any:
            # (K, C, R, S) -> (K, S * C, R, 1): x is padded beforehand, its rows read in one run.
            if S * C_per_group >= pair * _PIECE:
                weight = _padded(weight, 1, pair)
            self._channels = weight.shape[1]
            run = S * self._channels
            weight = weight.permute(0, 3, 1, 2).reshape(-1, run, R, 1)
            if run % pair:  # the last value meets half its weight twice
                weight = torch.cat([weight[:, :-1], weight[:, -1:] / 2, weight[:, -1:] / 2], 1)
            taps, pad, dilate = [R, 1], [0, 0], [dilation[0], 1]
        elif groups > 1:
            group = torch.arange(0, K, _LANES) // (K // groups)
            self._first_channel = _padded(group * C_per_group, 0, _BLOCK_VECTORS)
        # A grouped block passes its vectors one by one, so each is packed on its own.
        self._weight = _pack(weight, pair, _BLOCK_VECTORS if groups == 1 else 1)
        self._winograd: Tensor | None = None
        if m := winograd_tile(self.weight_shape, dtype, self.stride, self.dilation, groups):
            # A block at a time: on the way it takes several times the memory of what it becomes.
            blocks = weight.split(_LANES * _BLOCK_VECTORS)
            packed = [_pack(_winograd(block, m), 1, _BLOCK_VECTORS) for block in blocks]
            self._winograd = torch.cat(packed)
        block = _LANES * _BLOCK_VECTORS
        self._scale = _padded(scale.detach().float(), 0, block).contiguous()
        self._shift = _padded(shift.detach().float(), 0, block).contiguous()
        self._geometry = [*taps, *self.stride, *pad, *dilate, K, run]

    def operands(self) -> tuple[list[Tensor], list[int]] | None:
        """Weight, Winograd's (empty where there is none), scale and shift, and the geometry, as the
        op for whole blocks takes them; None where the convolution needs more than that."""
        if self.takes_any or self._first_channel is not None:
            return None
        winograd = self._scale.new_empty(0) if self._winograd is None else self._winograd
        return [self._weight, winograd, self._scale, self._shift], self._geometry

    def run(
        self, x: Tensor, residual: Tensor | None, relu: bool, overwrite: bool = False
    ) -> Tensor:
        if self.takes_any:
            x = torch.ops.fused_resnet_native.pad_rows(
                x.to(self.dtype), self._channels, self.padding
            )
        elif x.dtype != self.dtype:
            raise RuntimeError(f"conv_bn_relu: x must be {self.dtype}, got {x.dtype}")
        return torch.ops.fused_resnet_native.conv_bn_relu(
            x, self._weight, self._winograd, self._scale, self._shift, self._first_channel,
            residual, overwrite, relu, False, self._geometry,
        )  # fmt: skip
