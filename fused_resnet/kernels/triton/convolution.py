"""conv_bn_relu as an implicit GEMM over channels_last tensors.

    y[m, k] = activation(scale[k] * sum over (r, s, c) of x[pixel of m at (r, s), c]
                         * weight[k, r, s, c] + shift[k] + residual[m, k]),   m = (n, p, q)

A program computes BLOCK_M pixels by BLOCK_N outputs. Each step multiplies BLOCK_K channels of one
tap. Taps are the inner loop, so that the window of x for a block of channels is read R * S times in
succession, from the caches. Padding is masked to zero. Programs process GROUP_M rows of tiles at a
time, so that a wave shares both operands in L2.

    1x1, stride 1    x is a matrix: no windows and no masks for them
    few channels     a row of taps is read as one run of S * C values of x, padded beforehand
    narrow groups    a tile covers several whole groups with block-diagonal weights
    small grids      the steps of a tile are split among SPLITS programs; a second kernel adds their
                     float32 sums in order and applies the epilogue
    persistent       fewer programs than tiles; program i of n processes tiles i, i + n, ...

Accumulation in float32, one rounding. TF32 operands are rounded to nearest: weights when they are
packed, x in registers before each product. Bytes: x, residual and weights are read from memory once
if L2 holds the data that tiles share; y is written once. Speed: not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.kernels import registry, tuning
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.problem import Gemm, Geometry, Problem, operands_of
from fused_resnet.kernels.target import Target, current, multiprocessors
from fused_resnet.layout import channels_last, channels_last_empty

from . import configs, elementwise
from .configs import Config
from .support import (
    LARGE,
    ON_HOST,
    activated,
    at_most,
    index_type,
    launch,
    launch_on,
    rounded,
    to_tf32,
    widened,
)

EPILOGUE_BITS = tl.constexpr(512)  # of one row of a tile per epilogue: two sectors


@triton.jit
def _tile_coordinates(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Index of a tile -> its row and column, in the order of groups of GROUP_M rows."""
    in_group = GROUP_M * tiles_n
    first = tile // in_group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % in_group % rows, tile % in_group // rows


@triton.jit
def _sums(
    x_ptr,
    weight_ptr,
    m,
    k,
    group,
    only,
    first_step,
    last_step,
    M,
    K,
    H,
    W,
    P,
    Q,
    C,
    x_n,
    x_h,
    x_w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    R: tl.constexpr,
    S: tl.constexpr,
    POINTWISE: tl.constexpr,
    GROUPS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The products of one tile summed over steps [first_step, last_step): (BLOCK_M, BLOCK_N).

    m: (BLOCK_M,) pixels of y, k: (BLOCK_N,) outputs. group: index of the tile's first group, at
    whose channels x_ptr starts. GROUPS: the number of groups of the tile, of C channels and OUTPUTS
    outputs each. ONE_GROUP: read only x of group `only`, counted from `group`.
    """
    q = m % Q
    p = m // Q % P
    h0 = p * stride_h - pad_h
    w0 = q * stride_w - pad_w
    if POINTWISE:
        row = m.to(INDEX) * x_w
    else:
        row = (m // (P * Q)).to(INDEX) * x_n + h0.to(INDEX) * x_h + w0.to(INDEX) * x_w
    in_m = m < M
    in_k = k < K
    weight_row = k.to(INDEX) * (R * S * C)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first_step, last_step):
        tap = step % (R * S)
        c = step // (R * S) * BLOCK_K + tl.arange(0, BLOCK_K)
        if POINTWISE:
            window = row
            inside = in_m
        else:
            r = tap // S
            s = tap % S
            h = h0 + r * dilation_h
            w = w0 + s * dilation_w
            window = row + (r * dilation_h * x_h + s * dilation_w * x_w)
            inside = in_m & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        in_c = c < C * GROUPS
        if ONE_GROUP:
            in_c = in_c & (c // C == only)
        a = tl.load(
            x_ptr + window[:, None] + c[None, :], mask=inside[:, None] & in_c[None, :], other=0.0
        )
        in_b = in_k[None, :] & (c < C * GROUPS)[:, None]
        if GROUPS > 1:
            in_b = in_b & ((k // OUTPUTS - group)[None, :] == (c // C)[:, None])
            weight_c = c % C
        else:
            weight_c = c
        b = tl.load(
            weight_ptr + weight_row[None, :] + (tap * C + weight_c)[:, None], mask=in_b, other=0.0
        )
        if ON_HOST and a.dtype == tl.bfloat16:
            a, b = widened(a, tl.float32), widened(b, tl.float32)
        if PRECISION == "tf32":
            a = to_tf32(a)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _epilogue(
    acc,
    m,
    first_k,
    M,
    K,
    P,
    Q,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    y_n,
    y_p,
    y_q,
    ACTIVATION: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Applies scale, shift, residual and activation to a tile's sums, of outputs from first_k on,
    rounds and stores them. Processes a few columns at a time to save registers for addresses and
    residual."""
    BLOCK_N: tl.constexpr = acc.shape[1]
    if BLOCK_N * y_ptr.dtype.element_ty.primitive_bitwidth > EPILOGUE_BITS:
        halves = tl.permute(tl.reshape(acc, (acc.shape[0], 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _epilogue(
            left, m, first_k, M, K, P, Q, scale_ptr, shift_ptr, residual_ptr, y_ptr, y_n, y_p, y_q,
            ACTIVATION, INDEX,
        )  # fmt: skip
        _epilogue(
            right, m, first_k + BLOCK_N // 2, M, K, P, Q, scale_ptr, shift_ptr, residual_ptr, y_ptr,
            y_n, y_p, y_q, ACTIVATION, INDEX,
        )  # fmt: skip
    else:
        k = first_k + tl.arange(0, BLOCK_N)
        inside = (m < M)[:, None] & (k < K)[None, :]
        pixel = (m // (P * Q)).to(INDEX) * y_n + (m // Q % P).to(INDEX) * y_p
        at = (pixel + (m % Q).to(INDEX) * y_q)[:, None] + k[None, :]
        scale = tl.load(scale_ptr + k, mask=k < K, other=0.0)
        shift = tl.load(shift_ptr + k, mask=k < K, other=0.0)
        y = acc * scale[None, :] + shift[None, :]
        if residual_ptr is not None:
            y += widened(tl.load(residual_ptr + at, mask=inside, other=0.0), tl.float32)
        y = activated(y, ACTIVATION)
        tl.store(y_ptr + at, rounded(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def conv_bn_relu_kernel(
    x_ptr,  # (N, H, W, groups * C) with strides x_n, x_h, x_w and 1
    weight_ptr,  # (groups * outputs, R, S, C)
    scale_ptr,  # (K,)
    shift_ptr,  # (K,)
    residual_ptr,  # as y, or None
    y_ptr,  # (N, P, Q, K) by strides y_n, y_p, y_q and 1
    sums_ptr,  # (SPLITS, M, K) float32 where SPLITS > 1
    M,
    K,
    H,
    W,
    P,
    Q,
    units_of_c,
    units_of_x_n,
    units_of_x_h,
    units_of_x_w,
    y_n,
    y_p,
    y_q,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    tiles_m,
    tiles_n,
    tiles_per_group,
    R: tl.constexpr,
    S: tl.constexpr,
    UNIT: tl.constexpr,
    POINTWISE: tl.constexpr,
    GROUPS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    # Passed in units of UNIT, so that Triton knows their divisor: it only detects 16 itself.
    C = units_of_c * UNIT
    x_n = tl.cast(units_of_x_n, INDEX) * UNIT
    x_h = tl.cast(units_of_x_h, INDEX) * UNIT
    x_w = tl.cast(units_of_x_w, INDEX) * UNIT
    split = tl.program_id(1)
    steps = R * S * tl.cdiv(C * GROUPS, BLOCK_K)
    per_split = tl.cdiv(steps, SPLITS)
    first_step = split * per_split
    last_step = tl.minimum(first_step + per_split, steps)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        row, column = _tile_coordinates(tile, tiles_m, tiles_n, GROUP_M)
        m = row * BLOCK_M + tl.arange(0, BLOCK_M)
        # If a tile covers one group only, the last tile of the group may be narrower.
        in_group = column % tiles_per_group * BLOCK_N + tl.arange(0, BLOCK_N)
        group = column // tiles_per_group * GROUPS
        k = group * OUTPUTS + in_group
        end_k = tl.minimum((group + GROUPS) * OUTPUTS, K)
        x_group = x_ptr + group * C
        acc = _sums(
            x_group, weight_ptr, m, k, group, 0, first_step, last_step, M, end_k, H, W, P, Q, C,
            x_n, x_h, x_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
            R, S, POINTWISE, GROUPS, OUTPUTS, False, BLOCK_M, BLOCK_N, BLOCK_K,
            PRECISION, INDEX,
        )  # fmt: skip
        if GROUPS > 1:
            # The zero weights between groups would spread an Inf or NaN of x (0 * Inf = NaN). If a
            # sum is non-finite, every group is recomputed separately.
            non_finite = (acc != acc) | (tl.abs(acc) == float("inf"))
            if tl.max(tl.max(non_finite.to(tl.int32), 1), 0) > 0:
                for only in range(GROUPS):
                    of_group = _sums(
                        x_group, weight_ptr, m, k, group, only, first_step, last_step, M, end_k,
                        H, W, P, Q, C, x_n, x_h, x_w, stride_h, stride_w, pad_h, pad_w,
                        dilation_h, dilation_w, R, S, POINTWISE, GROUPS, OUTPUTS, True,
                        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, INDEX,
                    )  # fmt: skip
                    acc = tl.where((k // OUTPUTS - group == only)[None, :], of_group, acc)
        if SPLITS > 1:
            at = (split.to(INDEX) * M + m)[:, None] * K + k[None, :]
            tl.store(sums_ptr + at, acc, mask=(m < M)[:, None] & (k < end_k)[None, :])
        else:
            first_k = group * OUTPUTS + column % tiles_per_group * BLOCK_N
            _epilogue(
                acc, m, first_k, M, end_k, P, Q, scale_ptr, shift_ptr, residual_ptr, y_ptr,
                y_n, y_p, y_q, ACTIVATION, INDEX,
            )  # fmt: skip


@triton.jit
def conv_merge_kernel(
    sums_ptr,  # (splits, M, K) float32
    scale_ptr,  # (K,)
    shift_ptr,  # (K,)
    residual_ptr,  # as y, or None
    y_ptr,  # (N, P, Q, K) by strides y_n, y_p, y_q and 1
    M,
    K,
    P,
    Q,
    y_n,
    y_p,
    y_q,
    splits,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INDEX: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (k < K)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in range(splits):
        at = (tl.cast(split, INDEX) * M + m)[:, None] * K + k[None, :]
        acc += tl.load(sums_ptr + at, mask=inside, other=0.0)
    first_k = tl.program_id(1) * BLOCK_N
    _epilogue(
        acc, m, first_k, M, K, P, Q, scale_ptr, shift_ptr, residual_ptr, y_ptr, y_n, y_p, y_q,
        ACTIVATION, INDEX,
    )  # fmt: skip


MERGE_M, MERGE_N = 32, 64  # tile of the merge kernel


def precision_of(dtype: torch.dtype) -> str:
    """The `input_precision` argument of tl.dot for operands of `dtype`."""
    return "tf32" if operands_of(dtype) == "tf32" else "ieee"


def packed(weight: Tensor) -> Tensor:
    """weight (K, C / groups, R, S), channels_last -> as `run` multiplies it."""
    return elementwise.round_to_tf32(weight) if operands_of(weight.dtype) == "tf32" else weight


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    y: Tensor,
    activation: Activation,
    geometry: Geometry,
    config: Config | None = None,
) -> Tensor:
    """Writes y and returns it. x: (N, C, H, W); y, residual: (N, K, P, Q), with the same strides.
    The channel strides are 1, the others arbitrary. weight: (K, C / groups, R, S), channels_last,
    `packed`; scale, shift: (K,) float32."""
    N, K, P, Q = y.shape
    H, W = x.shape[2:]
    C, R, S = weight.shape[1:]
    groups = geometry.groups
    M, outputs = N * P * Q, K // groups
    if config is None:
        gemm = Gemm(M, K, C, R, S, groups, geometry.stride[1], operands_of(x.dtype))
        provider = registry.gpu_provider("triton", x.device.type)
        config = tuning.choice(gemm, x.device, (provider,)).config
    # x is then an (M, C) matrix.
    pointwise = (
        R * S == 1
        and geometry.stride == (1, 1)
        and geometry.padding == (0, 0)
        and (P, Q) == (H, W)
        and x.stride(2) == W * x.stride(3)
        and x.stride(0) == H * x.stride(2)
    )
    unit = math.gcd(x.stride(0), x.stride(2), x.stride(3), C, 16)
    tiles_m = triton.cdiv(M, config.block_m)
    if config.groups_per_tile > 1:
        tiles_per_group, tiles_n = 1, triton.cdiv(groups, config.groups_per_tile)
    else:
        tiles_per_group = triton.cdiv(outputs, config.block_n)
        tiles_n = groups * tiles_per_group
    tiles = tiles_m * tiles_n
    programs = tiles
    if config.persistent:
        programs = min(tiles, config.resident * multiprocessors(x.device))
    splits = config.splits
    sums = None
    if splits > 1:
        sums = torch.empty((splits, M, K), dtype=torch.float32, device=x.device)
    index = index_type(x, y, weight, sums)
    strides = (y.stride(0), y.stride(2), y.stride(3))
    with launch_on(x):
        launch(
            conv_bn_relu_kernel, (programs, splits),
            x, weight, scale, shift, residual, y, sums, M, K, H, W, P, Q, C // unit,
            x.stride(0) // unit, x.stride(2) // unit, x.stride(3) // unit, *strides,
            *geometry.stride, *geometry.padding, *geometry.dilation,
            tiles_m, tiles_n, tiles_per_group,
            R=R, S=S, UNIT=unit, POINTWISE=pointwise, GROUPS=config.groups_per_tile,
            OUTPUTS=outputs, ACTIVATION=int(activation), SPLITS=splits, GROUP_M=config.group_m,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            PRECISION=precision_of(x.dtype),
            INDEX=index, num_warps=config.warps, num_stages=config.stages,
            **at_most(config.registers),
        )  # fmt: skip
        if sums is not None:
            launch(
                conv_merge_kernel, (triton.cdiv(M, MERGE_M), triton.cdiv(K, MERGE_N)),
                sums, scale, shift, residual, y, M, K, P, Q, *strides, splits,
                ACTIVATION=int(activation), BLOCK_M=MERGE_M, BLOCK_N=MERGE_N, INDEX=index,
                num_warps=4,
            )  # fmt: skip
    return y


FEW_CHANNELS = 16  # below this, a row of taps is read as one run
PADDED_CHANNELS = 4  # then channels are padded to a multiple of this: 8 bytes of bfloat16


def takes_runs(C: int, S: int, dilation_w: int, groups: int) -> bool:
    """Whether a row of taps is read as one run: with few channels, single taps are too short."""
    return groups == 1 and C < FEW_CHANNELS and S > 1 and dilation_w == 1


# --- the provider interface (see kernels/tuning.py) -----------------------------------------------

CONFIG = Config


def supports(problem: Problem, target: Target) -> str | None:
    """None if the kernel computes the convolution, else the reason in one line."""
    if problem.dtype == torch.float64:
        return "the Triton convolution accumulates in float32, too little for float64"
    gemm = problem.gemm()
    if gemm.operands == "tf32" and target.vendor == "amd" and target.architecture != "gfx942":
        return f"Triton does not multiply TF32 operands on {target.architecture}"
    if gemm.M >= LARGE:
        return f"the Triton convolution computes fewer than {LARGE} pixels"
    return None


def kernel_gemm(gemm: Gemm) -> Gemm:
    """`gemm` as the kernel computes it, with a row of taps as one run if `takes_runs`."""
    C, S = gemm.C, gemm.S
    if not takes_runs(C, S, 1, gemm.groups):
        return gemm
    return gemm._replace(C=S * (C + -C % PADDED_CHANNELS), S=1)


def candidates(gemm: Gemm, target: Target) -> list[Config]:
    return configs.candidates(kernel_gemm(gemm), target)


def choose(gemm: Gemm, target: Target, processors: int) -> Config:
    return configs.choose(kernel_gemm(gemm), target, processors)


def run_conv(
    conv: Any,
    x: Tensor,
    residual: Tensor | None,
    activation: Activation,
    y: Tensor,
    config: Config,
) -> None:
    """Writes the output of a `GpuConv` to y. x, residual, y: channels_last."""
    geometry, weight = conv.geometry, conv.weight
    if takes_runs(weight.shape[1], weight.shape[3], geometry.dilation[1], geometry.groups):
        weight = conv.cached("triton", lambda: taps_in_runs(conv.weight))
        x, geometry = in_runs(x, conv.weight.shape, geometry)
    if operands_of(x.dtype) == "tf32":  # a switch of PyTorch's, which may change
        in_float32 = weight
        weight = conv.cached("triton tf32", lambda: packed(in_float32))
    run(x, weight, conv.scale, conv.shift, residual, y, activation, geometry, config)


def compile_ahead(problem: Problem, config: Config, device: torch.device) -> None:
    """Compiles what `run_conv` launches on `device` for a convolution without a residual. Needs
    none of its memory, and runs beside other threads."""
    assert problem.dtype is not None
    x, weight = (
        channels_last(torch.empty(shape, dtype=problem.dtype, device="meta"))
        for shape in (problem.x_shape, problem.weight_shape)
    )
    y, geometry = channels_last_empty(problem.y_shape, x), problem.geometry
    if takes_runs(weight.shape[1], weight.shape[3], geometry.dilation[1], geometry.groups):
        x, geometry = in_runs(x, weight.shape, geometry)
        weight = taps_in_runs(weight)
    vector = torch.empty(len(weight), device="meta")
    with current(device):
        run(x, weight, vector, vector, None, y, Activation.RELU, geometry, config)


def in_runs(x: Tensor, weight_shape: Sequence[int], geometry: Geometry) -> tuple[Tensor, Geometry]:
    """x and the geometry of the same convolution with a row of taps as one run of channels: x
    (N, C, H, W) is padded to (N, Cp, H + 2 pad, W + 2 pad), with a view (N, S * Cp, ., W') whose
    pixels overlap in memory."""
    S = weight_shape[3]
    pad_h, pad_w = geometry.padding
    more = -x.shape[1] % PADDED_CHANNELS
    padded = torch.nn.functional.pad(x, (pad_w, pad_w, pad_h, pad_h, 0, more))
    padded = channels_last(padded)
    N, Cp, Hp, Wp = padded.shape
    runs = padded.as_strided((N, S * Cp, Hp, Wp - S + 1), padded.stride())
    return runs, Geometry(geometry.stride, (0, 0), (geometry.dilation[0], 1))


def taps_in_runs(weight: Tensor) -> Tensor:
    """weight (K, C, R, S) -> (K, S * Cp, R, 1)."""
    K, C, R, _ = weight.shape
    taps = torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, -C % PADDED_CHANNELS))  # (K, Cp, R, S)
    return taps.permute(0, 2, 3, 1).reshape(K, R, 1, -1).permute(0, 3, 1, 2)
