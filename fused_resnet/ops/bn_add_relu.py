"""bn_add_relu: training batch normalisation, residual, ReLU, and its gradient.

mean[c] = sum x[:, c] / M,   var[c] = sum (x[:, c] - mean[c])^2 / M,   M = N*H*W
y = relu((x - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c] + residual)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet import layout
from fused_resnet.dtypes import accumulate_dtype
from fused_resnet.kernels.training.protocol import vector

from .add_relu import add_relu_backward_reference
from .checks import check_channel, check_same, check_x, require
from .library import (
    by_formula,
    differentiable_gradients,
    in_transform,
    kernels_for,
    per_channel,
    register,
)


def bn_add_relu_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Training batch normalisation, then the residual, then ReLU.

    mean[c] = sum x[:, c] / M,   var[c] = sum (x[:, c] - mean[c])^2 / M,   M = N*H*W
    y = relu((x - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c] + residual)

    x, residual: (N, C, H, W) of the same floating dtype; weight, bias: (C,), None means 1 and 0.
    Returns y (N, C, H, W) in x's dtype, and mean and the *biased* variance, both (C,), in float32
    (float64 for float64 x). Returns the variance instead of 1/sqrt(var + eps) because running_var
    is computed from it, and invstd^-2 - eps cancels if var is much smaller than eps.
    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithm 1.
    """
    acc = accumulate_dtype(x.dtype)
    xa = x.to(acc)
    if x.numel() == 0:
        zeros = torch.zeros(x.shape[1], dtype=acc, device=x.device)
        return x.clone(), zeros, zeros.clone()
    mean = xa.mean((0, 2, 3))
    centred = xa - per_channel(mean)
    var = centred.square().mean((0, 2, 3))
    y = centred * per_channel(torch.rsqrt(var + eps))
    if weight is not None:
        y = y * per_channel(weight.to(acc))
    if bias is not None:
        y = y + per_channel(bias.to(acc))
    if residual is not None:
        y = y + residual.to(acc)
    if relu:
        y = y.relu()
    return y.to(x.dtype), mean, var


def bn_add_relu_backward_reference(
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
    """The gradients of `bn_add_relu`, including those through mean and var.

    g = dy * (y > 0) if relu else dy,   xhat = (x - mean[c]) * invstd[c],   M = N*H*W
    dbias[c] = sum g,   dweight[c] = sum g * xhat,   dresidual = g
    dx = weight[c] * invstd[c] * (g - dbias[c] / M - xhat * dweight[c] / M)

    dy, x, y: (N, C, H, W); weight: (C,) or None (ones); mean, var: (C,) from the forward.
    Returns dx, dweight, dbias, dresidual; outputs not requested are empty tensors.
    Source: Ioffe and Szegedy 2015, section 3.
    """
    acc = accumulate_dtype(x.dtype)
    g = (add_relu_backward_reference(dy, y) if relu and y is not None else dy).to(acc)
    invstd = torch.rsqrt(var.to(acc) + eps)
    xhat = (x.to(acc) - per_channel(mean.to(acc))) * per_channel(invstd)
    dbias = g.sum((0, 2, 3))
    dweight = (g * xhat).sum((0, 2, 3))
    dx = x.new_empty(0)
    if need_dx:
        count = x.shape[0] * x.shape[2] * x.shape[3]
        gain = invstd if weight is None else invstd * weight.to(acc)
        dx = per_channel(gain) * (
            g - per_channel(dbias / count) - xhat * per_channel(dweight / count)
        )
        dx = dx.to(x.dtype)
    dresidual = g.to(dy.dtype) if need_dresidual else x.new_empty(0)
    return dx, dweight, dbias, dresidual


def bn_add_relu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Training batch normalisation over (N, H, W), then the residual, then ReLU.

    mean[c] = sum x[:, c] / M,   var[c] = sum (x[:, c] - mean[c])^2 / M,   M = N*H*W
    y = relu((x - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c] + residual)

    x: (N, C, H, W), float32, float16, bfloat16 or float64; residual: the same shape and dtype;
    weight, bias: (C,) floating, None means 1 and 0.
    Returns y (N, C, H, W) in x's dtype and layout, mean (C,) and the *biased* variance (C,), both
    float32 (float64 for float64 x), not differentiable. The caller updates the running statistics:
    running_var takes var * M / (M - 1). Differentiable to any order in x, weight, bias, residual.
    Raises ValueError if x is not 4-D, has one value per channel, or eps is not positive;
    RuntimeError for other invalid arguments.
    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithm 1.
    """
    if in_transform():
        _bn_check(x, weight, bias, residual, eps)
        y, mean, var = bn_add_relu_reference(x, weight, bias, residual, eps, relu)
        return y, mean.detach(), var.detach()
    return torch.ops.fused_resnet.bn_add_relu(x, weight, bias, residual, eps, relu)


def _bn_check(x: Tensor, weight: Any, bias: Any, residual: Any, eps: float) -> None:
    op = "bn_add_relu"
    check_x(op, x)
    check_channel(op, "weight", weight, x, x.shape[1])
    check_channel(op, "bias", bias, x, x.shape[1])
    check_same(op, "residual", residual, x, x.shape)
    require(
        x.shape[0] * x.shape[2] * x.shape[3] != 1,
        op,
        f"expected more than 1 value per channel when training, got input size {tuple(x.shape)}",
        ValueError,
    )
    require(eps > 0, op, f"eps must be positive, got {eps}", ValueError)


def _bn_add_relu(
    x: Tensor, weight: Any, bias: Any, residual: Any, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _bn_check(x, weight, bias, residual, eps)
    x = layout.dense(x)
    kernels = kernels_for("bn_add_relu", x)
    if kernels is not None:
        residual = None if residual is None else layout.like(residual, x)
        return kernels.bn_add_relu(x, vector(weight, x), vector(bias, x), residual, eps, relu)
    y, mean, var = bn_add_relu_reference(x, weight, bias, residual, eps, relu)
    return layout.like(y, x), mean, var


def _bn_fake(
    x: Tensor, weight: Any, bias: Any, residual: Any, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _bn_check(x, weight, bias, residual, eps)
    stat = x.new_empty(x.shape[1], dtype=accumulate_dtype(x.dtype))
    return layout.empty_like(layout.dense(x)), stat, torch.empty_like(stat)


def _bn_backward(
    dy: Tensor, x: Tensor, y: Any, weight: Any, mean: Tensor, var: Tensor,
    eps: float, relu: bool, need_dx: bool, need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    op = "bn_add_relu_backward"
    check_x(op, x)
    check_same(op, "dy", dy, x, x.shape)
    check_same(op, "y", y, x, x.shape)
    require(y is not None or not relu, op, "y must be given where relu is True, got None")
    for name, t in (("weight", weight), ("mean", mean), ("var", var)):
        check_channel(op, name, t, x, x.shape[1])
    x = layout.dense(x)
    flags = (mean, var, eps, relu, need_dx, need_dresidual)
    kernels = kernels_for("bn_add_relu", x)
    if kernels is not None:
        y = None if y is None else layout.like(y, x)
        return kernels.bn_add_relu_backward(layout.like(dy, x), x, y, vector(weight, x), *flags)
    dx, dweight, dbias, dresidual = bn_add_relu_backward_reference(dy, x, y, weight, *flags)
    dx = layout.like(dx, x) if need_dx else dx
    dresidual = layout.like(dresidual, x) if need_dresidual else dresidual
    return dx, dweight, dbias, dresidual


def _bn_backward_fake(
    dy: Tensor, x: Tensor, y: Any, weight: Any, mean: Tensor, var: Tensor,
    eps: float, relu: bool, need_dx: bool, need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dresidual = (
        layout.empty_like(layout.dense(x)) if needed else x.new_empty(0)
        for needed in (need_dx, need_dresidual)
    )
    return dx, torch.empty_like(mean), torch.empty_like(mean), dresidual


def _bn_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _residual, ctx.eps, ctx.relu = inputs
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, y if ctx.relu else None, weight, mean, var)


def _bn_grad(ctx: Any, dy: Tensor, _dmean: Any, _dvar: Any) -> tuple[Any, ...]:
    x, y, weight, mean, var = ctx.saved_tensors
    need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
    ops = torch.ops.fused_resnet
    if by_formula(dy):
        g = ops.add_relu_backward(dy, y) if ctx.relu else dy
        bias = None
        if need_bias:
            bias = torch.zeros_like(mean, dtype=ctx.bias_dtype).requires_grad_()
        grads = differentiable_gradients(
            lambda x, weight, bias: bn_add_relu_reference(
                x, weight, bias, None, ctx.eps, relu=False
            )[0],
            (x, weight, bias), (need_x, need_weight, need_bias), g,
        )  # fmt: skip
        return (*grads, g if need_residual else None, None, None)
    if not (need_x or need_weight or need_bias):
        g = ops.add_relu_backward(dy, y) if ctx.relu else dy
        return None, None, None, g, None, None
    # Without a ReLU, the residual's gradient is dy itself.
    masked = need_residual and ctx.relu
    dx, dweight, dbias, dresidual = ops.bn_add_relu_backward(
        dy, x, y, weight, mean, var, ctx.eps, ctx.relu, need_x, masked
    )
    return (
        dx if need_x else None,
        dweight.to(weight.dtype) if need_weight else None,
        dbias.to(ctx.bias_dtype) if need_bias else None,
        (dresidual if masked else dy) if need_residual else None,
        None,
        None,
    )


def _bn_backward_grad(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        "bn_add_relu_backward: not differentiable; for second derivatives, differentiate "
        "bn_add_relu twice (torch.autograd.grad with create_graph=True)"
    )


register(
    "bn_add_relu(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, bool relu)"
    " -> (Tensor, Tensor, Tensor)",
    _bn_add_relu, _bn_fake, _bn_save, _bn_grad,
)  # fmt: skip
register(
    "bn_add_relu_backward(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor mean, Tensor var,"
    " float eps, bool relu, bool need_dx, bool need_dresidual) -> (Tensor, Tensor, Tensor, Tensor)",
    _bn_backward, _bn_backward_fake, grad=_bn_backward_grad,
)  # fmt: skip
