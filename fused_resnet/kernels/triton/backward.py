"""The gradients of a convolution as implicit GEMMs, for conv_bn_relu's backward.

    dx[n, h, w, c]      = sum over (r, s, k) of g[n, p, q, k] * weight[k, r, s, c],
                          h = p * stride - padding + r * dilation
    dweight[k, r, s, c] = sum over m of g[m, k] * x[pixel of m at (r, s), c],   m = (n, p, q)

dx: the pixels of x whose coordinates have the same remainder modulo the stride form an image. It is
the convolution of stride 1 of g with every stride-th tap, flipped, with inputs and outputs
exchanged. The forward kernel computes it and writes it to a strided view of dx.

dweight: a program computes BLOCK_K outputs by BLOCK_C channels of one tap over one part of the
pixels. Its float32 sums go to (parts, K, R * S * C), which PyTorch adds over the parts in a fixed
order, so results are bitwise reproducible. Speed: not measured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.problem import Geometry, operands_of
from fused_resnet.kernels.target import multiprocessors
from fused_resnet.layout import channels_last, channels_last_empty

from .convolution import packed, precision_of, run
from .support import LARGE, ON_HOST, at_most, index_type, launch, launch_on, to_tf32, widened

BLOCK_K, BLOCK_C = 64, 64
REGISTERS = 255


class Tile(NamedTuple):
    """Pixels per step, warps and stages."""

    block_m: int
    warps: int
    stages: int


def tile_for(operands: str) -> Tile:
    """operands: as in `Gemm`. Steps of float32 are short because, without tensor cores, a thread
    holds its operands of a whole step in registers."""
    if operands == "float32":
        return Tile(16, 8, 3)
    return Tile(32 if operands == "tf32" else 64, 4, 4)


@triton.jit
def conv_dweight_kernel(
    g_ptr,  # (M, K)
    x_ptr,  # (N, H, W, groups * C)
    parts_ptr,  # (parts, groups * outputs, R * S, C) float32
    M,
    H,
    W,
    P,
    Q,
    C,
    K,
    outputs,
    x_n,
    x_h,
    x_w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    pixels_per_part,
    tiles_k,
    tiles_c,
    R: tl.constexpr,
    S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    program = tl.program_id(0)
    tap = program % (R * S)
    tile_c = program // (R * S) % tiles_c
    tile_k = program // (R * S * tiles_c) % tiles_k
    group = program // (R * S * tiles_c * tiles_k)
    part = tl.program_id(1)
    in_group = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    k = group * outputs + in_group
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tap // S
    s = tap % S
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    begin = part * pixels_per_part
    end = tl.minimum(begin + pixels_per_part, M)
    for first in range(begin, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        h = m // Q % P * stride_h - pad_h + r * dilation_h
        w = m % Q * stride_w - pad_w + s * dilation_w
        pixel = (m // (P * Q)).to(INDEX) * x_n + h.to(INDEX) * x_h + w.to(INDEX) * x_w
        inside = (m < end) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x = tl.load(
            x_ptr + pixel[:, None] + (group * C + c)[None, :],
            mask=inside[:, None] & (c < C)[None, :],
            other=0.0,
        )
        # g is zero where x is in the padding, so that a NaN of g does not propagate from there.
        g = tl.load(
            g_ptr + k[:, None] + m.to(INDEX)[None, :] * K,
            mask=(in_group < outputs)[:, None] & inside[None, :],
            other=0.0,
        )
        if ON_HOST and x.dtype == tl.bfloat16:
            x, g = widened(x, tl.float32), widened(g, tl.float32)
        if PRECISION == "tf32":
            x, g = to_tf32(x), to_tf32(g)
        acc = tl.dot(g, x, acc, input_precision=PRECISION)
    at = ((part.to(INDEX) * K + k)[:, None] * (R * S) + tap) * C + c[None, :]
    tl.store(parts_ptr + at, acc, mask=(in_group < outputs)[:, None] & (c < C)[None, :])


def convolution_dweight(
    g: Tensor, x: Tensor, weight_shape: torch.Size, geometry: Geometry
) -> Tensor:
    """g: (N, K, P, Q), x: (N, C, H, W), any strides -> dweight (K, C / groups, R, S) float32."""
    g, x = channels_last(g), channels_last(x)
    N, K, P, Q = g.shape
    _, C, R, S = weight_shape
    groups = geometry.groups
    M, outputs = N * P * Q, K // groups
    block_k = max(16, min(BLOCK_K, triton.next_power_of_2(outputs)))
    block_c = max(16, min(BLOCK_C, triton.next_power_of_2(C)))
    tiles_k, tiles_c = triton.cdiv(outputs, block_k), triton.cdiv(C, block_c)
    programs = groups * tiles_k * tiles_c * R * S
    # Enough parts for two programs per multiprocessor, each of at least four tiles of pixels.
    tile = tile_for(operands_of(x.dtype))
    blocks = triton.cdiv(M, tile.block_m)
    parts = max(1, min(triton.cdiv(2 * multiprocessors(x.device), programs), blocks // 4))
    pixels_per_part = triton.cdiv(blocks, parts) * tile.block_m
    parts = triton.cdiv(M, pixels_per_part)
    sums = torch.empty((parts, K, R * S, C), dtype=torch.float32, device=x.device)
    with launch_on(x):
        launch(
            conv_dweight_kernel, (programs, parts),
            g, x, sums, M, x.shape[2], x.shape[3], P, Q, C, K, outputs,
            x.stride(0), x.stride(2), x.stride(3),
            *geometry.stride, *geometry.padding, *geometry.dilation,
            pixels_per_part, tiles_k, tiles_c, R=R, S=S,
            BLOCK_K=block_k, BLOCK_C=block_c, BLOCK_M=tile.block_m, PRECISION=precision_of(x.dtype),
            INDEX=index_type(g, x, sums),
            num_warps=tile.warps, num_stages=tile.stages, **at_most(REGISTERS),
        )  # fmt: skip
    return sums.sum(0).view(K, R, S, C).permute(0, 3, 1, 2)


def _taps(size: int, remainder: int, stride: int, padding: int) -> tuple[slice, int]:
    """The taps that contribute to pixels h with h % stride == remainder, h = p * stride - padding +
    r, and the padding of g in the convolution with these taps flipped: (taps, padding)."""
    first = (remainder + padding) % stride
    count = len(range(first, size, stride))
    return slice(first, size, stride), count - 1 - (remainder + padding - first) // stride


def convolution_dx(
    g: Tensor, weight: Tensor, x_shape: torch.Size, geometry: Geometry
) -> Tensor | None:
    """g: (N, K, P, Q), weight: (K, C / groups, R, S), any strides -> dx, x_shape, channels_last;
    None if both stride and dilation exceed 1, or if x has too many pixels."""
    if max(geometry.stride) > 1 and max(geometry.dilation) > 1:
        return None
    if x_shape[0] * x_shape[2] * x_shape[3] >= LARGE:
        return None
    g = channels_last(g)
    K, C, R, S = weight.shape
    (step_h, step_w), (pad_h, pad_w), dilation, groups = geometry
    # Exchange inputs and outputs of every group: (K, C, R, S) -> (groups * C, K / groups, R, S)
    exchanged = weight.view(groups, K // groups, C, R, S).transpose(1, 2)
    exchanged = exchanged.reshape(groups * C, K // groups, R, S)
    dx = channels_last_empty(x_shape, g)
    one = torch.ones(groups * C, dtype=torch.float32, device=g.device)
    zero = torch.zeros_like(one)
    for a in range(min(step_h, x_shape[2])):
        for b in range(min(step_w, x_shape[3])):
            part = dx[:, :, a::step_h, b::step_w]
            if max(dilation) > 1:
                taps = exchanged.flip(2, 3)
                padding = (dilation[0] * (R - 1) - pad_h, dilation[1] * (S - 1) - pad_w)
            else:
                rows, top = _taps(R, a, step_h, pad_h)
                columns, left = _taps(S, b, step_w, pad_w)
                taps, padding = exchanged[:, :, rows, columns].flip(2, 3), (top, left)
            if taps.numel() == 0:
                part.zero_()
                continue
            taps = packed(channels_last(taps))
            stride_1 = Geometry((1, 1), padding, dilation, groups)
            run(g, taps, one, zero, None, part, Activation.NONE, stride_1)
    return dx
