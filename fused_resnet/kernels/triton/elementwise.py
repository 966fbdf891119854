"""add_relu and its backward; rounding to TF32.

    y = max(x + residual, 0), relu(NaN) = NaN;   dx = dy where !(y <= 0), else 0

All tensors have the same shape and memory order. A kernel processes n flat elements, a program
BLOCK consecutive ones, a thread 16 bytes at a time if the pointers are aligned. Arithmetic in
float32 (float64 for float64), one rounding. Bytes: 3 elements per element of y, two read and one
written. Speed: not measured.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .support import accumulate, launch, launch_on, rounded, to_tf32, widened

# 4096 elements over 8 warps are 16 per thread: two or four 16-byte loads of each operand in flight.
BLOCK, WARPS = 4096, 8


@triton.jit
def add_relu_kernel(
    x_ptr,  # (n,)
    residual_ptr,  # (n,)
    y_ptr,  # (n,)
    n,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    total = widened(tl.load(x_ptr + at, mask=inside), ACC)
    total += widened(tl.load(residual_ptr + at, mask=inside), ACC)
    tl.store(
        y_ptr + at, rounded(tl.where(total < 0, 0.0, total), y_ptr.dtype.element_ty), mask=inside
    )


@triton.jit
def add_relu_backward_kernel(
    dy_ptr,  # (n,)
    y_ptr,  # (n,)
    dx_ptr,  # (n,)
    n,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    dy = widened(tl.load(dy_ptr + at, mask=inside), ACC)
    y = widened(tl.load(y_ptr + at, mask=inside), ACC)
    tl.store(dx_ptr + at, rounded(tl.where(y <= 0, 0.0, dy), dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def round_to_tf32_kernel(
    x_ptr,  # (n,)
    y_ptr,  # (n,)
    n,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, to_tf32(tl.load(x_ptr + at, mask=at < n)), mask=at < n)


def round_to_tf32(x: Tensor) -> Tensor:
    """x: float32, dense, any strides -> its values rounded to TF32, with x's strides."""
    y = torch.empty_like(x)
    with launch_on(x):
        launch(
            round_to_tf32_kernel, (triton.cdiv(x.numel(), BLOCK),),
            x, y, x.numel(), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return y


def _launch(kernel: Any, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    n = out.numel()
    if n:
        with launch_on(out):
            launch(
                kernel, (triton.cdiv(n, BLOCK),),
                a, b, out, n, BLOCK=BLOCK, ACC=accumulate(out.dtype), num_warps=WARPS,
            )  # fmt: skip
    return out


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """x, residual: (N, C, H, W), dense, with the same strides -> y, with x's strides."""
    return _launch(add_relu_kernel, x, residual, torch.empty_like(x))


def add_relu_out(x: Tensor, residual: Tensor, out: Tensor) -> None:
    """Writes the result to `out`, which has x's strides and may be x or residual."""
    _launch(add_relu_kernel, x, residual, out)


def add_relu_backward(dy: Tensor, y: Tensor) -> Tensor:
    """dy, y: (N, C, H, W), dense, with the same strides -> dx, with y's strides."""
    return _launch(add_relu_backward_kernel, dy, y, torch.empty_like(y))
