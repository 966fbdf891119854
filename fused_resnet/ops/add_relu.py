"""add_relu: the addition and ReLU at the end of a residual block.

y = max(x + residual, 0),   dx = dresidual = dy * !(y <= 0)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet import layout
from fused_resnet.dtypes import accumulate_dtype

from .checks import check_same, check_x, require
from .library import LIBRARY, in_transform, kernels_for, register


def add_relu_reference(x: Tensor, residual: Tensor) -> Tensor:
    """y = max(x + residual, 0), with max(NaN, 0) = NaN.

    x, residual: (N, C, H, W) of the same floating dtype; the sum is rounded once.
    Source: He et al. 2015, "Deep Residual Learning for Image Recognition", equation 1.
    """
    acc = accumulate_dtype(x.dtype)
    return (x.to(acc) + residual.to(acc)).relu().to(x.dtype)


def add_relu_backward_reference(dy: Tensor, y: Tensor) -> Tensor:
    """dx = dresidual = dy where y > 0 or y is NaN, else 0 (torch's threshold_backward).

    dy, y: (N, C, H, W) of the same floating dtype.
    """
    return torch.where(y <= 0, torch.zeros((), dtype=dy.dtype, device=dy.device), dy)


def add_relu(x: Tensor, residual: Tensor, *, out: Tensor | None = None) -> Tensor:
    """y = max(x + residual, 0), with max(NaN, 0) = NaN; one rounding.

    x, residual: (N, C, H, W), of the same dtype (float32, float16, bfloat16, float64) and device,
    in any layout. Returns (N, C, H, W) in x's layout. Differentiable to any order.
    out: optional output (N, C, H, W) of x's dtype and device, in any layout; it may be x or
    residual. With out, not differentiable, as in PyTorch.
    Raises RuntimeError if shapes, dtypes or devices differ, or if out is given and an argument
    requires grad; ValueError if x is not 4-D.
    Source: He et al. 2015, "Deep Residual Learning for Image Recognition", equation 1.
    """
    if out is not None:
        needed = any(t.requires_grad for t in (x, residual, out))
        require(
            not (needed and torch.is_grad_enabled()),
            "add_relu",
            "out= does not support automatic differentiation, but an argument requires grad",
        )
        torch.ops.fused_resnet.add_relu_out(x, residual, out)
        return out
    if in_transform():
        _add_relu_check(x, residual)
        return add_relu_reference(x, residual)
    return torch.ops.fused_resnet.add_relu(x, residual)


def _add_relu_check(x: Tensor, residual: Tensor, out: Tensor | None = None) -> None:
    check_x("add_relu", x)
    check_same("add_relu", "residual", residual, x, x.shape)
    check_same("add_relu", "out", out, x, x.shape)


def _add_relu(x: Tensor, residual: Tensor) -> Tensor:
    _add_relu_check(x, residual)
    x = layout.dense(x)
    kernels = kernels_for("add_relu", x)
    if kernels is not None:
        return kernels.add_relu(x, layout.like(residual, x))
    return layout.like(add_relu_reference(x, residual), x)


def _add_relu_out(x: Tensor, residual: Tensor, out: Tensor) -> None:
    _add_relu_check(x, residual, out)
    if not out.is_inference():
        # This runs below autograd, which does not increment the version of out here: without it,
        # autograd would not detect that a tensor saved for backward was overwritten.
        torch.autograd.graph.increment_version(out)
    kernels = kernels_for("add_relu", x)
    if kernels is not None and _same_or_apart(out, x) and _same_or_apart(out, residual):
        x = layout.dense(x)
        if out.stride() == x.stride():
            kernels.add_relu_out(x, layout.like(residual, x), out)
            return
    out.copy_(_add_relu(x, residual))


def _same_or_apart(out: Tensor, t: Tensor) -> bool:
    """Whether out is exactly t or does not share its storage."""
    same = out.data_ptr() == t.data_ptr() and out.stride() == t.stride()
    return same or out.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()


def _add_relu_fake(x: Tensor, residual: Tensor) -> Tensor:
    _add_relu_check(x, residual)
    return layout.empty_like(layout.dense(x))


def _add_relu_backward(dy: Tensor, y: Tensor) -> Tensor:
    check_x("add_relu_backward", y)
    check_same("add_relu_backward", "dy", dy, y, y.shape)
    y = layout.dense(y)
    kernels = kernels_for("add_relu", y)
    if kernels is not None:
        return kernels.add_relu_backward(layout.like(dy, y), y)
    return layout.like(add_relu_backward_reference(dy, y), y)


def _add_relu_backward_fake(dy: Tensor, y: Tensor) -> Tensor:
    return layout.empty_like(layout.dense(y))


def _add_relu_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _add_relu_grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    g = torch.ops.fused_resnet.add_relu_backward(dy, y)
    return tuple(g if needed else None for needed in ctx.needs_input_grad)


def _add_relu_backward_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _add_relu_backward_grad(ctx: Any, ddx: Tensor) -> tuple[Tensor, None]:
    # The mask is locally constant in y, so the second derivative applies the same mask.
    return torch.ops.fused_resnet.add_relu_backward(ddx, ctx.saved_tensors[0]), None


register(
    "add_relu(Tensor x, Tensor residual) -> Tensor",
    _add_relu,
    _add_relu_fake,
    _add_relu_save,
    _add_relu_grad,
)
register(
    "add_relu_out(Tensor x, Tensor residual, Tensor(a!) out) -> ()",
    _add_relu_out,
    _add_relu_check,
)
register(
    "add_relu_backward(Tensor dy, Tensor y) -> Tensor",
    _add_relu_backward,
    _add_relu_backward_fake,
    _add_relu_backward_save,
    _add_relu_backward_grad,
)


def _add_relu_backward_vmap(
    info: Any, dims: tuple[int | None, ...], dy: Tensor, y: Tensor
) -> tuple[Tensor, int]:
    """A batch of gradients, and y of one or a batch of outputs."""
    dy, y = (t if d is None else t.movedim(d, 0) for t, d in zip((dy, y), dims, strict=True))
    return torch.where(y <= 0, torch.zeros((), dtype=dy.dtype, device=dy.device), dy), 0


torch.library.register_vmap("fused_resnet::add_relu_backward", _add_relu_backward_vmap, lib=LIBRARY)
