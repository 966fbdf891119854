"""bn_add_relu and its backward, three kernels each.

    mean[c] = sum x[:, c] / M,   var[c] = sum (x[:, c] - mean[c])^2 / M,   M = N*H*W
    y = relu((x - mean[c]) * weight[c] / sqrt(var[c] + eps) + bias[c] + residual)

    g = dy * !(y <= 0),   dbias[c] = sum g
    dweight[c] = sum g * (x - mean[c]) / sqrt(var[c] + eps)
    dx = weight[c] / sqrt(var[c] + eps) * (g - dbias[c] / M - (x - mean[c]) * slope[c]),
    slope[c] = dweight[c] / sqrt(var[c] + eps) / M

A tensor is M pixels by C channels. A program of a reduction processes BLOCK_C channels of one part
of the pixels, BLOCK_M at a time. Every position of its tile has separate sums (Youngs and Cramer
1971 for the squares, about the first tile's mean, so that nothing cancels); only the last step adds
the positions. A second kernel merges the parts (Chan, Golub and LeVeque 1983) in a fixed order, so
that results are bitwise reproducible, and computes the per-channel values for the third, the
elementwise pass. That pass receives the mean as centre + offset: x - centre is exact where it
matters, so a mean much larger than the deviation loses no digits.

Memory traffic per element of x, in elements: statistics 1 read; apply 1 read, 1 written, and the
residual's read; backward reduction 3 read (dy, x, y), 1 written if the residual's gradient is
needed; backward apply 3 read (2 after a reduction that wrote g), 1 written.
Tiles are two-dimensional with the contiguous dimension last: pixels by channels in rows of 128
bytes for channels_last, else channels by pixels. A thread accesses 16 bytes if they are aligned.
Speed: not measured. Rejected: Chan's merge for every tile (two reductions across the warps per
tile), and merging the parts one by one (hundreds of dependent steps).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.dtypes import accumulate_dtype
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.target import multiprocessors

from .support import (
    ON_HOST,
    accumulate,
    activated,
    divided,
    index_type,
    launch,
    launch_on,
    rounded,
    square_root,
    widened,
)

TILE = 4096  # elements per tile: 16 per thread of 8 warps
WARPS = 8
ROW_BYTES = 128  # of a channels_last tile: one cache line
PROGRAMS_PER_MULTIPROCESSOR = 4  # of a reduction, to hide latency
MERGE_PARTS, MERGE_CHANNELS = 64, 16  # tile of the merge kernels, rows of 64 bytes


@triton.jit
def _expand_pixels(v, CHANNELS_LAST: tl.constexpr):
    """(BLOCK_M,) -> broadcastable to a tile."""
    if CHANNELS_LAST:
        return v[:, None]
    else:
        return v[None, :]


@triton.jit
def _expand_channels(v, CHANNELS_LAST: tl.constexpr):
    """(BLOCK_C,) -> broadcastable to a tile."""
    if CHANNELS_LAST:
        return v[None, :]
    else:
        return v[:, None]


@triton.jit
def _sum_over_pixels(tile, CHANNELS_LAST: tl.constexpr):
    """The sums of a tile over its pixels: (BLOCK_C,)."""
    if CHANNELS_LAST:
        # On the host Triton adds rows sequentially, on a GPU in a tree.
        if ON_HOST and tile.shape[0] >= 16:
            tile = tl.sum(tl.reshape(tile, (16, tile.shape[0] // 16, tile.shape[1])), 1)
        return tl.sum(tile, 0)
    else:
        return tl.sum(tile, 1)


@triton.jit
def _places(m, c, M, C, HW, CHANNELS_LAST: tl.constexpr):
    """m: (BLOCK_M,) pixels of N*H*W, c: (BLOCK_C,) channels -> a tile of element offsets, and the
    mask of those inside the first M pixels."""
    inside = _expand_pixels(m < M, CHANNELS_LAST) & _expand_channels(c < C, CHANNELS_LAST)
    if CHANNELS_LAST:
        return m[:, None] * C + c[None, :], inside
    else:
        return (c * HW)[:, None] + ((m // HW) * C * HW + m % HW)[None, :], inside


@triton.jit
def _load_channels(ptr, c, C, CHANNELS_LAST: tl.constexpr):
    """Loads values from (C,) for the channels of a tile."""
    return _expand_channels(tl.load(ptr + c, mask=c < C, other=0), CHANNELS_LAST)


@triton.jit
def _tile_position(C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr):
    """The pixels and channels of an elementwise program's tile; consecutive programs process
    consecutive channels. The grid is one-dimensional because other dimensions end at 65535."""
    tile = tl.program_id(0)
    over_channels = tl.cdiv(C, BLOCK_C)
    m = (tile // over_channels).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (tile % over_channels).to(INDEX) * BLOCK_C + tl.arange(0, BLOCK_C)
    return m, c


@triton.jit
def bn_stats_kernel(
    x_ptr,  # (N, C, H, W)
    parts_ptr,  # (parts, 3, C): centre, mean - centre, sum of squares about the mean
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
    m = begin + tl.arange(0, BLOCK_M)
    at, inside = _places(m, c, end, C, HW, CHANNELS_LAST)
    x = widened(tl.load(x_ptr + at, mask=inside, other=0), ACC)
    in_tile = tl.minimum(end - begin, BLOCK_M).to(ACC)
    centre = divided(_sum_over_pixels(x, CHANNELS_LAST), in_tile)
    centre = tl.where(tl.abs(centre) < float("inf"), centre, 0.0)
    total = tl.zeros_like(x)
    squares = tl.zeros_like(x)
    for first in range(begin, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        at, inside = _places(m, c, end, C, HW, CHANNELS_LAST)
        x = widened(tl.load(x_ptr + at, mask=inside, other=0), ACC)
        d = tl.where(inside, x - _expand_channels(centre, CHANNELS_LAST), 0.0)
        # The number of values so far, the same for every position inside.
        seen = ((first - begin) // BLOCK_M + 1).to(ACC)
        weight = tl.where(seen > 1, divided(1.0, seen * tl.maximum(seen - 1, 1.0)), 0.0)
        total += d
        # The last value's deviation from the running mean, times their number.
        deviation = tl.where(inside, seen * d - total, 0.0)
        squares += deviation * deviation * weight
    count = ((end - begin - tl.arange(0, BLOCK_M) + BLOCK_M - 1) // BLOCK_M).to(ACC)
    mean = divided(_sum_over_pixels(total, CHANNELS_LAST), (end - begin).to(ACC))
    # A position has either as many values as there were steps or one fewer: two divisions, not one
    # for each position, whose exact form takes registers that sm_80 does not have here.
    steps = ((end - begin + BLOCK_M - 1) // BLOCK_M).to(ACC)
    fewer = divided(1.0, tl.maximum(steps - 1, 1.0))
    inverse = tl.where(count == steps, divided(1.0, tl.maximum(steps, 1.0)), fewer)
    position_means = total * _expand_pixels(inverse, CHANNELS_LAST)
    deviation = position_means - _expand_channels(mean, CHANNELS_LAST)
    squares += _expand_pixels(count, CHANNELS_LAST) * (deviation * deviation)
    at = part * 3 * C + c
    tl.store(parts_ptr + at, centre, mask=c < C)
    tl.store(parts_ptr + at + C, mean, mask=c < C)
    tl.store(parts_ptr + at + 2 * C, _sum_over_pixels(squares, CHANNELS_LAST), mask=c < C)


@triton.jit
def bn_stats_merge_kernel(
    parts_ptr,  # (parts, 3, C): centre, mean - centre, sum of squares about the mean
    weight_ptr,  # (C,) or None
    mean_ptr,  # (C,)
    var_ptr,  # (C,)
    folded_ptr,  # (3, C): centre, mean - centre, weight / sqrt(var + eps)
    M,
    C,
    parts,
    pixels_per_part,
    EPS: tl.constexpr,  # a runtime argument would be float32
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    centre = tl.load(parts_ptr + c, mask=in_c, other=0)
    total = tl.zeros((BLOCK_C,), ACC)
    for first in range(0, parts, BLOCK_P):
        part = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
        n = tl.minimum(tl.maximum(M - part * pixels_per_part, 0), pixels_per_part).to(ACC)
        at = (part * 3 * C)[:, None] + c[None, :]
        inside = (part < parts)[:, None] & in_c[None, :]
        shift = tl.load(parts_ptr + at, mask=inside, other=0) - centre[None, :]
        mean = shift + tl.load(parts_ptr + at + C, mask=inside, other=0)
        total += tl.sum(tl.where(inside, n[:, None] * mean, 0.0), 0)
    offset = divided(total, tl.cast(M, ACC))
    squares = tl.zeros((BLOCK_C,), ACC)
    for first in range(0, parts, BLOCK_P):
        part = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
        n = tl.minimum(tl.maximum(M - part * pixels_per_part, 0), pixels_per_part).to(ACC)
        at = (part * 3 * C)[:, None] + c[None, :]
        inside = (part < parts)[:, None] & in_c[None, :]
        shift = tl.load(parts_ptr + at, mask=inside, other=0) - centre[None, :]
        deviation = shift + tl.load(parts_ptr + at + C, mask=inside, other=0) - offset[None, :]
        within = tl.load(parts_ptr + at + 2 * C, mask=inside, other=0)
        squares += tl.sum(tl.where(inside, within + n[:, None] * deviation * deviation, 0.0), 0)
    var = divided(squares, tl.cast(M, ACC))
    scale = divided(1.0, square_root(var + EPS))
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=in_c, other=0)
    tl.store(mean_ptr + c, centre + offset, mask=in_c)
    tl.store(var_ptr + c, var, mask=in_c)
    tl.store(folded_ptr + c, centre, mask=in_c)
    tl.store(folded_ptr + C + c, offset, mask=in_c)
    tl.store(folded_ptr + 2 * C + c, scale, mask=in_c)


@triton.jit
def bn_apply_kernel(
    x_ptr,  # (N, C, H, W)
    residual_ptr,  # as x, or None
    y_ptr,  # as x
    folded_ptr,  # (3, C): centre, mean - centre, weight / sqrt(var + eps)
    bias_ptr,  # (C,) or None
    M,
    C,
    HW,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    m, c = _tile_position(C, BLOCK_M, BLOCK_C, INDEX)
    at, inside = _places(m, c, M, C, HW, CHANNELS_LAST)
    y = widened(tl.load(x_ptr + at, mask=inside, other=0), ACC)
    y -= _load_channels(folded_ptr, c, C, CHANNELS_LAST)
    y -= _load_channels(folded_ptr + C, c, C, CHANNELS_LAST)
    y *= _load_channels(folded_ptr + 2 * C, c, C, CHANNELS_LAST)
    if bias_ptr is not None:
        y += _load_channels(bias_ptr, c, C, CHANNELS_LAST)
    if residual_ptr is not None:
        y += widened(tl.load(residual_ptr + at, mask=inside, other=0), ACC)
    y = activated(y, ACTIVATION)
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
    mean = _load_channels(mean_ptr, c, C, CHANNELS_LAST)
    if CHANNELS_LAST:
        sum_g = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    else:
        sum_g = tl.zeros((BLOCK_C, BLOCK_M), ACC)
    sum_gx = tl.zeros_like(sum_g)
    for first in range(begin, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        at, inside = _places(m, c, end, C, HW, CHANNELS_LAST)
        g = widened(tl.load(dy_ptr + at, mask=inside, other=0), ACC)
        x = widened(tl.load(x_ptr + at, mask=inside, other=0), ACC)
        if y_ptr is not None:
            g = tl.where(widened(tl.load(y_ptr + at, mask=inside, other=0), ACC) <= 0, 0.0, g)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + at, rounded(g, dresidual_ptr.dtype.element_ty), mask=inside)
        sum_g += g
        sum_gx += tl.where(inside, g * (x - mean), 0.0)
    at = part * 2 * C + c
    tl.store(parts_ptr + at, _sum_over_pixels(sum_g, CHANNELS_LAST), mask=c < C)
    tl.store(parts_ptr + at + C, _sum_over_pixels(sum_gx, CHANNELS_LAST), mask=c < C)


@triton.jit
def bn_reduce_merge_kernel(
    parts_ptr,  # (parts, 2, C): sum g, sum g * (x - mean)
    weight_ptr,  # (C,) or None
    var_ptr,  # (C,)
    dweight_ptr,  # (C,)
    dbias_ptr,  # (C,)
    folded_ptr,  # (3, C): dbias / M, dweight / sqrt(var + eps) / M, weight / sqrt(var + eps)
    M,
    C,
    parts,
    EPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    sum_g = tl.zeros((BLOCK_C,), ACC)
    sum_gx = tl.zeros((BLOCK_C,), ACC)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        at = (part * 2 * C)[:, None] + c[None, :]
        inside = (part < parts)[:, None] & in_c[None, :]
        sum_g += tl.sum(tl.load(parts_ptr + at, mask=inside, other=0), 0)
        sum_gx += tl.sum(tl.load(parts_ptr + at + C, mask=inside, other=0), 0)
    invstd = divided(1.0, square_root(tl.load(var_ptr + c, mask=in_c, other=1) + EPS))
    dweight = sum_gx * invstd
    scale = invstd
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=in_c, other=0)
    tl.store(dweight_ptr + c, dweight, mask=in_c)
    tl.store(dbias_ptr + c, sum_g, mask=in_c)
    tl.store(folded_ptr + c, divided(sum_g, tl.cast(M, ACC)), mask=in_c)
    tl.store(folded_ptr + C + c, divided(dweight * invstd, tl.cast(M, ACC)), mask=in_c)
    tl.store(folded_ptr + 2 * C + c, scale, mask=in_c)


@triton.jit
def bn_backward_kernel(
    g_ptr,  # (N, C, H, W): dy, or the masked g
    x_ptr,  # as g
    y_ptr,  # as g, or None: no mask, or g is masked already
    dx_ptr,  # as g
    mean_ptr,  # (C,)
    folded_ptr,  # (3, C): dbias / M, dweight / sqrt(var + eps) / M, weight / sqrt(var + eps)
    M,
    C,
    HW,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    m, c = _tile_position(C, BLOCK_M, BLOCK_C, INDEX)
    at, inside = _places(m, c, M, C, HW, CHANNELS_LAST)
    g = widened(tl.load(g_ptr + at, mask=inside, other=0), ACC)
    x = widened(tl.load(x_ptr + at, mask=inside, other=0), ACC)
    if y_ptr is not None:
        g = tl.where(widened(tl.load(y_ptr + at, mask=inside, other=0), ACC) <= 0, 0.0, g)
    # Subtract before scaling: the terms nearly cancel for small batches.
    g -= _load_channels(folded_ptr, c, C, CHANNELS_LAST)
    x -= _load_channels(mean_ptr, c, C, CHANNELS_LAST)
    dx = g - _load_channels(folded_ptr + C, c, C, CHANNELS_LAST) * x
    dx *= _load_channels(folded_ptr + 2 * C, c, C, CHANNELS_LAST)
    tl.store(dx_ptr + at, rounded(dx, dx_ptr.dtype.element_ty), mask=inside)


class Shape(NamedTuple):
    """The tiles of a tensor, and the parts of its pixels."""

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

    @property
    def tiles(self) -> int:
        """The number of programs of an elementwise pass."""
        return self.over_channels * triton.cdiv(self.M, self.block_m)


def shape_of(x: Tensor) -> Shape:
    """x: (N, C, H, W), dense, channels_last or contiguous."""
    N, C, H, W = x.shape
    M = N * H * W
    channels_last = C > 1 and x.stride(1) == 1
    if channels_last:
        block_c = min(triton.next_power_of_2(C), ROW_BYTES // x.element_size())
        block_m = min(triton.next_power_of_2(M), TILE // block_c)
    else:
        block_m = min(triton.next_power_of_2(M), TILE)
        block_c = min(triton.next_power_of_2(C), TILE // block_m)
    # A part is a whole number of tiles, chosen so that the programs just fill the device.
    programs = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device)
    max_parts = max(1, programs // triton.cdiv(C, block_c))
    pixels_per_part = triton.cdiv(triton.cdiv(M, block_m), max_parts) * block_m
    return Shape(M, C, H * W, block_m, block_c, channels_last, pixels_per_part)


def _tiling(x: Tensor, shape: Shape) -> dict[str, Any]:
    return {
        "BLOCK_M": shape.block_m,
        "BLOCK_C": shape.block_c,
        "CHANNELS_LAST": shape.channels_last,
        "ACC": accumulate(x.dtype),
        "INDEX": index_type(x),
        "num_warps": WARPS,
    }


def _merging(x: Tensor, shape: Shape) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and constants of the merge kernels."""
    constants = {"BLOCK_P": MERGE_PARTS, "BLOCK_C": MERGE_CHANNELS, "ACC": accumulate(x.dtype)}
    return (triton.cdiv(shape.C, MERGE_CHANNELS),), constants


def _vectors(x: Tensor, *sizes: int) -> Tensor:
    """An uninitialised (*sizes, C) tensor of the dtype in which x is accumulated."""
    return x.new_empty((*sizes, x.shape[1]), dtype=accumulate_dtype(x.dtype))


def bn_add_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual: (N, C, H, W), dense, with the same strides; weight, bias: (C,) of the dtype in
    which x is accumulated -> y, with x's strides; mean and biased variance, (C,)."""
    mean, var = _vectors(x), _vectors(x)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y, mean.zero_(), var.zero_()
    shape = shape_of(x)
    parts, folded = _vectors(x, shape.parts, 3), _vectors(x, 3)
    tiling, (grid, merging) = _tiling(x, shape), _merging(x, shape)
    M, C, HW = shape.M, shape.C, shape.HW
    with launch_on(x):
        launch(
            bn_stats_kernel,
            (shape.over_channels, shape.parts),
            x,
            parts,
            M,
            C,
            HW,
            shape.pixels_per_part,
            **tiling,
        )
        launch(
            bn_stats_merge_kernel, grid,
            parts, weight, mean, var, folded, M, C, shape.parts, shape.pixels_per_part, eps,
            **merging,
        )  # fmt: skip
        launch(
            bn_apply_kernel, (shape.tiles,), x, residual, y, folded, bias, M, C, HW,
            ACTIVATION=int(activation), **tiling,
        )  # fmt: skip
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
    """dy, x, y: (N, C, H, W), dense, with the same strides; weight, mean, var: (C,) of the dtype in
    which x is accumulated -> dx, dweight, dbias, dresidual; outputs not requested are empty."""
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty(0)
    dweight, dbias = _vectors(x), _vectors(x)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_(), dresidual
    shape = shape_of(x)
    parts, folded = _vectors(x, shape.parts, 2), _vectors(x, 3)
    tiling, (grid, merging) = _tiling(x, shape), _merging(x, shape)
    M, C, HW = shape.M, shape.C, shape.HW
    mask = y if relu else None
    with launch_on(x):
        launch(
            bn_reduce_kernel, (shape.over_channels, shape.parts),
            dy, x, mask, dresidual if need_dresidual else None, mean, parts,
            M, C, HW, shape.pixels_per_part, **tiling,
        )  # fmt: skip
        launch(
            bn_reduce_merge_kernel, grid,
            parts, weight, var, dweight, dbias, folded, M, C, shape.parts, eps, **merging,
        )  # fmt: skip
        if need_dx:
            g, mask = (dresidual, None) if need_dresidual else (dy, mask)
            launch(
                bn_backward_kernel, (shape.tiles,), g, x, mask, dx, mean, folded, M, C, HW, **tiling
            )
    return dx, dweight, dbias, dresidual
