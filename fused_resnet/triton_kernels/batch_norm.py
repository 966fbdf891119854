"""bn_add_relu and its backward, three kernels each way.

    mean[c] = sum x[:, c] / M,   var[c] = sum (x[:, c] - mean[c])^2 / M,   M = N*H*W
    y = relu((x - mean[c]) * weight[c] / sqrt(var[c] + eps) + bias[c] + residual)

    g = dy * !(y <= 0),   dbias[c] = sum g
    dweight[c] = sum g * (x - mean[c]) / sqrt(var[c] + eps)
    dx = weight[c] / sqrt(var[c] + eps) * (g - dbias[c] / M - (x - mean[c]) * slope[c]),
    slope[c] = dweight[c] / sqrt(var[c] + eps) / M

A tensor is M pixels by C channels. Statistics: a program takes BLOCK_C channels of one part of the
pixels; each tile's mean and sum of squares about it (two passes over registers, so nothing cancels)
are merged into the part's by Chan's formula. A second kernel merges the parts in their order, so
every run gives the same bits, and makes what the third, the elementwise pass, needs per channel.

Bytes per element of x, in elements: statistics 1 read; apply 1 read, 1 written, and the residual's
read; backward reduction 3 read (dy, x, y), 1 written where the residual's gradient is asked for;
backward apply 3 read (2 after a reduction that wrote g), 1 written.
channels_last: tiles of whole 128-byte rows, 16 bytes a thread. Otherwise pixels are the long side.
Speed: not yet measured.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulate_dtype
from .support import OPTIONS, accumulate, index_type, launch_on, multiprocessors, rounded

TILE = 4096  # elements of a tile: 16 per thread of 8 warps
WARPS = 8
ROW_BYTES = 128  # of a channels_last tile: a cache line, at least
MERGE_CHANNELS = 64  # channels per program of the merging kernels


@triton.jit
def _offsets(m, c, C, HW, CHANNELS_LAST: tl.constexpr):
    """m: (BLOCK_M,) pixels of N*H*W, c: (BLOCK_C,) channels -> (BLOCK_M, BLOCK_C) offsets."""
    if CHANNELS_LAST:
        return m[:, None] * C + c[None, :]
    return ((m // HW) * (C * HW) + m % HW)[:, None] + (c * HW)[None, :]


@triton.jit
def _merge(count, mean, m2, n, tile_mean, tile_m2):
    """Chan, Golub and LeVeque 1983: two sets' counts, means and sums of squares about them."""
    total = count + n
    delta = tile_mean - mean
    return total, mean + delta * (n / total), m2 + tile_m2 + delta * delta * (count * (n / total))


@triton.jit
def bn_stats_kernel(
    x_ptr,  # (N, C, H, W)
    parts_ptr,  # (parts, 2, C): mean, sum of squares about it
    M,
    C,
    HW,
    pixels_per_part,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    c = tl.program_id(0).to(INDEX) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1).to(INDEX)
    begin = part * pixels_per_part
    end = tl.minimum(begin + pixels_per_part, M)
    count = tl.zeros((BLOCK_C,), ACC)
    mean = tl.zeros((BLOCK_C,), ACC)
    m2 = tl.zeros((BLOCK_C,), ACC)
    for first in range(begin, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        inside = (m < end)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + _offsets(m, c, C, HW, CHANNELS_LAST), mask=inside, other=0).to(ACC)
        n = tl.minimum(end - first, BLOCK_M).to(ACC)
        tile_mean = tl.sum(x, 0) / n
        d = tl.where(inside, x - tile_mean[None, :], 0.0)
        # What rounding took off the tile's mean, which matters beside a small deviation.
        lost = tl.sum(d, 0) / n
        tile_m2 = tl.sum(d * d, 0) - n * lost * lost
        count, mean, m2 = _merge(count, mean, m2, n, tile_mean + lost, tile_m2)
    at = part * 2 * C + c
    tl.store(parts_ptr + at, mean, mask=c < C)
    tl.store(parts_ptr + at + C, m2, mask=c < C)


@triton.jit
def bn_stats_merge_kernel(
    parts_ptr,  # (parts, 2, C)
    weight_ptr,  # (C,) or None
    mean_ptr,  # (C,)
    var_ptr,  # (C,)
    scale_ptr,  # (C,): weight / sqrt(var + eps)
    M,
    C,
    parts,
    pixels_per_part,
    EPS: tl.constexpr,  # an argument would be float32
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    count = tl.zeros((BLOCK_C,), ACC)
    mean = tl.zeros((BLOCK_C,), ACC)
    m2 = tl.zeros((BLOCK_C,), ACC)
    for part in range(parts):
        n = tl.minimum(M - part * pixels_per_part, pixels_per_part).to(ACC)
        at = part * 2 * C + c
        part_mean = tl.load(parts_ptr + at, mask=inside, other=0)
        part_m2 = tl.load(parts_ptr + at + C, mask=inside, other=0)
        count, mean, m2 = _merge(count, mean, m2, n, part_mean, part_m2)
    var = m2 / M
    scale = 1.0 / tl.sqrt(var + EPS)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=inside, other=0)
    tl.store(mean_ptr + c, mean, mask=inside)
    tl.store(var_ptr + c, var, mask=inside)
    tl.store(scale_ptr + c, scale, mask=inside)


@triton.jit
def bn_apply_kernel(
    x_ptr,  # (N, C, H, W)
    residual_ptr,  # as x, or None
    y_ptr,  # as x
    mean_ptr,  # (C,)
    scale_ptr,  # (C,)
    bias_ptr,  # (C,) or None
    M,
    C,
    HW,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    c = tl.program_id(0).to(INDEX) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tl.program_id(1).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (m < M)[:, None] & (c < C)[None, :]
    at = _offsets(m, c, C, HW, CHANNELS_LAST)
    y = tl.load(x_ptr + at, mask=inside, other=0).to(ACC)
    y = (y - tl.load(mean_ptr + c, mask=c < C, other=0)[None, :]) * tl.load(
        scale_ptr + c, mask=c < C, other=0
    )[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=c < C, other=0)[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=inside, other=0).to(ACC)
    if RELU:
        y = tl.where(y < 0, 0.0, y)
    tl.store(y_ptr + at, rounded(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def bn_reduce_kernel(
    dy_ptr,  # (N, C, H, W)
    x_ptr,  # as dy
    y_ptr,  # as dy, or None: no mask
    dresidual_ptr,  # as dy, or None
    mean_ptr,  # (C,)
    parts_ptr,  # (parts, 2, C): sum g, sum g * (x - mean)
    M,
    C,
    HW,
    pixels_per_part,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    c = tl.program_id(0).to(INDEX) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1).to(INDEX)
    begin = part * pixels_per_part
    end = tl.minimum(begin + pixels_per_part, M)
    mean = tl.load(mean_ptr + c, mask=c < C, other=0)
    sum_g = tl.zeros((BLOCK_C,), ACC)
    sum_gx = tl.zeros((BLOCK_C,), ACC)
    for first in range(begin, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        inside = (m < end)[:, None] & (c < C)[None, :]
        at = _offsets(m, c, C, HW, CHANNELS_LAST)
        g = tl.load(dy_ptr + at, mask=inside, other=0).to(ACC)
        x = tl.load(x_ptr + at, mask=inside, other=0).to(ACC)
        if y_ptr is not None:
            g = tl.where(tl.load(y_ptr + at, mask=inside, other=0).to(ACC) <= 0, 0.0, g)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + at, rounded(g, dresidual_ptr.dtype.element_ty), mask=inside)
        sum_g += tl.sum(g, 0)
        sum_gx += tl.sum(tl.where(inside, g * (x - mean[None, :]), 0.0), 0)
    at = part * 2 * C + c
    tl.store(parts_ptr + at, sum_g, mask=c < C)
    tl.store(parts_ptr + at + C, sum_gx, mask=c < C)


@triton.jit
def bn_reduce_merge_kernel(
    parts_ptr,  # (parts, 2, C)
    weight_ptr,  # (C,) or None
    var_ptr,  # (C,)
    dweight_ptr,  # (C,)
    dbias_ptr,  # (C,)
    g_mean_ptr,  # (C,): dbias / M
    slope_ptr,  # (C,): dweight / sqrt(var + eps) / M
    scale_ptr,  # (C,): weight / sqrt(var + eps)
    M,
    C,
    parts,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    sum_g = tl.zeros((BLOCK_C,), ACC)
    sum_gx = tl.zeros((BLOCK_C,), ACC)
    for part in range(parts):
        at = part * 2 * C + c
        sum_g += tl.load(parts_ptr + at, mask=inside, other=0)
        sum_gx += tl.load(parts_ptr + at + C, mask=inside, other=0)
    invstd = 1.0 / tl.sqrt(tl.load(var_ptr + c, mask=inside, other=1) + EPS)
    dweight = sum_gx * invstd
    scale = invstd
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=inside, other=0)
    tl.store(dweight_ptr + c, dweight, mask=inside)
    tl.store(dbias_ptr + c, sum_g, mask=inside)
    tl.store(g_mean_ptr + c, sum_g / M, mask=inside)
    tl.store(slope_ptr + c, dweight * invstd / M, mask=inside)
    tl.store(scale_ptr + c, scale, mask=inside)


@triton.jit
def bn_backward_kernel(
    g_ptr,  # (N, C, H, W): dy, or the masked g
    x_ptr,  # as g
    y_ptr,  # as g, or None: no mask, or g is masked already
    dx_ptr,  # as g
    mean_ptr,  # (C,)
    g_mean_ptr,  # (C,)
    slope_ptr,  # (C,)
    scale_ptr,  # (C,)
    M,
    C,
    HW,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    c = tl.program_id(0).to(INDEX) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tl.program_id(1).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (m < M)[:, None] & (c < C)[None, :]
    at = _offsets(m, c, C, HW, CHANNELS_LAST)
    g = tl.load(g_ptr + at, mask=inside, other=0).to(ACC)
    x = tl.load(x_ptr + at, mask=inside, other=0).to(ACC)
    if y_ptr is not None:
        g = tl.where(tl.load(y_ptr + at, mask=inside, other=0).to(ACC) <= 0, 0.0, g)
    mean = tl.load(mean_ptr + c, mask=c < C, other=0)[None, :]
    g_mean = tl.load(g_mean_ptr + c, mask=c < C, other=0)[None, :]
    slope = tl.load(slope_ptr + c, mask=c < C, other=0)[None, :]
    scale = tl.load(scale_ptr + c, mask=c < C, other=0)[None, :]
    # The differences first, since they nearly cancel for small batches.
    dx = scale * ((g - g_mean) - slope * (x - mean))
    tl.store(dx_ptr + at, rounded(dx, dx_ptr.dtype.element_ty), mask=inside)


class Shape(NamedTuple):
    """How a tensor is cut into tiles, and its pixels into parts."""

    M: int
    C: int
    HW: int
    block_m: int
    block_c: int
    channels_last: bool
    pixels_per_part: int

    @property
    def parts(self) -> int:
        return triton.cdiv(self.M, self.pixels_per_part)

    @property
    def over_channels(self) -> int:
        return triton.cdiv(self.C, self.block_c)

    def tiles(self) -> tuple[int, int]:
        """The grid of an elementwise pass."""
        return self.over_channels, triton.cdiv(self.M, self.block_m)


def shape_of(x: Tensor) -> Shape:
    """x: (N, C, H, W), dense, channels_last or contiguous."""
    N, C, H, W = x.shape
    channels_last = C > 1 and x.stride(1) == 1
    block_c = 1
    if channels_last:
        block_c = min(triton.next_power_of_2(C), ROW_BYTES // x.element_size())
    block_m = TILE // block_c
    M = N * H * W
    # Four programs a multiprocessor hide each other's latency; a part is whole tiles, and so many
    # of them that merging the parts costs little beside reading them.
    wanted = max(1, 4 * multiprocessors(x.device) // triton.cdiv(C, block_c))
    tiles = triton.cdiv(M, block_m)
    return Shape(M, C, H * W, block_m, block_c, channels_last, triton.cdiv(tiles, wanted) * block_m)


def _tiling(x: Tensor, shape: Shape) -> dict[str, Any]:
    return {
        "BLOCK_M": shape.block_m,
        "BLOCK_C": shape.block_c,
        "CHANNELS_LAST": shape.channels_last,
        "ACC": accumulate(x.dtype),
        "INDEX": index_type(x),
        "num_warps": WARPS,
        **OPTIONS,
    }


def _channels(x: Tensor, count: int) -> list[Tensor]:
    """`count` uninitialised (C,) vectors of the dtype that x accumulates in."""
    return [x.new_empty(x.shape[1], dtype=accumulate_dtype(x.dtype)) for _ in range(count)]


def _parts(x: Tensor, shape: Shape) -> Tensor:
    return x.new_empty((shape.parts, 2, shape.C), dtype=accumulate_dtype(x.dtype))


def _merging(x: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    block = min(triton.next_power_of_2(x.shape[1]), MERGE_CHANNELS)
    return (triton.cdiv(x.shape[1], block),), {
        "BLOCK_C": block,
        "ACC": accumulate(x.dtype),
        **OPTIONS,
    }


def bn_add_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual: (N, C, H, W), dense and of the same strides; weight, bias: (C,) of the dtype
    that x accumulates in -> y, of x's strides; mean and biased variance, (C,)."""
    mean, var, scale = _channels(x, 3)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y, mean.zero_(), var.zero_()
    shape = shape_of(x)
    parts = _parts(x, shape)
    tiling, (grid, merging) = _tiling(x, shape), _merging(x)
    M, C, HW = shape.M, shape.C, shape.HW
    with launch_on(x):
        bn_stats_kernel[(shape.over_channels, shape.parts)](
            x, parts, M, C, HW, shape.pixels_per_part, **tiling
        )
        bn_stats_merge_kernel[grid](
            parts,
            weight,
            mean,
            var,
            scale,
            M,
            C,
            shape.parts,
            shape.pixels_per_part,
            eps,
            **merging,
        )
        bn_apply_kernel[shape.tiles()](
            x, residual, y, mean, scale, bias, M, C, HW, RELU=relu, **tiling
        )
    return y, mean, var


def bn_add_relu_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
    need_dx: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy, x, y: (N, C, H, W), dense and of the same strides; weight, mean, var: (C,) of the dtype
    that x accumulates in -> dx, dweight, dbias, dresidual; what was not asked for is empty."""
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty(0)
    dweight, dbias, g_mean, slope, scale = _channels(x, 5)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_(), dresidual
    shape = shape_of(x)
    parts = _parts(x, shape)
    tiling, (grid, merging) = _tiling(x, shape), _merging(x)
    M, C, HW = shape.M, shape.C, shape.HW
    mask = y if relu else None
    with launch_on(x):
        bn_reduce_kernel[(shape.over_channels, shape.parts)](
            dy, x, mask, dresidual if need_dresidual else None, mean, parts,
            M, C, HW, shape.pixels_per_part, **tiling,
        )  # fmt: skip
        bn_reduce_merge_kernel[grid](
            parts, weight, var, dweight, dbias, g_mean, slope, scale,
            M, C, shape.parts, eps, **merging,
        )  # fmt: skip
        if need_dx:
            g, mask = (dresidual, None) if need_dresidual else (dy, mask)
            bn_backward_kernel[shape.tiles()](
                g, x, mask, dx, mean, g_mean, slope, scale, M, C, HW, **tiling
            )
    return dx, dweight, dbias, dresidual
