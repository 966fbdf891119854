"""conv_norm_relu: conv_bn_relu of a convolution's and a norm's own parameters.

y = relu((conv(x, weight) + bias[k] - running_mean[k]) / sqrt(running_var[k] + eps)
         * norm_weight[k] + norm_bias[k] + residual)

What is packed is kept as long as these tensors are unchanged, so a caller that cannot keep a scale
and a shift, as a compiler's graph, folds and packs once and not at each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_resnet import layout
from fused_resnet.dtypes import accumulate_dtype

from .checks import pair, require
from .conv_bn_relu import (
    Vectors,
    by_triton,
    conv_bn_relu_reference,
    conv_gradients,
    conv_shape,
    convolved,
    count_flops,
    register_autocast,
)
from .library import by_formula, differentiable_gradients, in_transform, register

OP = "conv_norm_relu"


def fold_norm(
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """scale, shift: (K,) of `dtype`, such that norm(conv(x) + bias) = conv(x) * scale + shift.

    scale = norm_weight / sqrt(running_var + eps),
    shift = norm_bias + (bias - running_mean) * scale

    All tensors: (K,) floating; None means no bias, and a norm_weight of 1 and a norm_bias of 0.
    Source: Jacob et al. 2018, section 3.2.
    """
    scale = torch.rsqrt(running_var.to(dtype) + eps)
    if norm_weight is not None:
        scale = scale * norm_weight.to(dtype)
    mean = running_mean.to(dtype)
    shift = (mean.neg() if bias is None else bias.to(dtype) - mean) * scale
    if norm_bias is not None:
        shift = shift + norm_bias.to(dtype)
    return scale, shift


def conv_norm_relu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolution, batch normalisation by running statistics, residual, ReLU.

    y = relu((conv(x, weight) + bias[k] - running_mean[k]) / sqrt(running_var[k] + eps)
             * norm_weight[k] + norm_bias[k] + residual)

    x: (N, C, H, W); weight: (K, C/groups, R, S); bias, norm_weight, norm_bias: (K,) or None;
    running_mean, running_var: (K,); residual: (N, K, P, Q) of x's dtype, or None. Returns
    (N, K, P, Q) in x's dtype; all is computed in float32 (float64 for float64) and rounded once.
    Source: Ioffe and Szegedy 2015, algorithm 2 (inference).
    """
    acc = accumulate_dtype(x.dtype)
    scale, shift = fold_norm(bias, norm_weight, norm_bias, running_mean, running_var, eps, acc)
    return conv_bn_relu_reference(
        x, weight, scale, shift, residual, relu, stride, padding, dilation, groups
    )


def conv_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = True,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution, batch normalisation by running statistics, residual, ReLU.

    y = relu((conv(x, weight) + bias[k] - running_mean[k]) / sqrt(running_var[k] + eps)
             * norm_weight[k] + norm_bias[k] + residual)

    x: (N, C, H, W); weight: (K, C/groups, R, S) of x's dtype (float32, float16, bfloat16, float64);
    bias, norm_weight, norm_bias, running_mean, running_var: (K,) floating, the first three may be
    None: no bias, 1 and 0; residual: (N, K, P, Q) of x's dtype, or None. eps: at least 0. stride,
    padding, dilation in pixels. Returns (N, K, P, Q) in x's dtype and layout; sums are accumulated
    in float32 (float64 for float64). Differentiable to any order in all eight tensors.

    It computes as `conv_bn_relu`, with the scale and shift of the norm. The packed weights are kept
    while weight, bias and the norm's tensors are the same and unchanged, from the second call with
    them on. Under autocast x, weight, bias and residual are cast, as F.conv2d casts its bias, but
    not the norm's tensors; weights in autocast's dtype already are not cast, and so stay packed.
    Raises RuntimeError that names the argument for invalid shapes, dtypes, devices and sizes,
    ValueError for a negative eps.
    Source: Ioffe and Szegedy 2015, algorithm 2 (inference); Jacob et al. 2018, section 3.2.
    """
    pairs = (("stride", stride), ("padding", padding), ("dilation", dilation))
    geometry: Any = (*(pair(OP, name, v) for name, v in pairs), groups)
    operands = (x, weight, bias, norm_weight, norm_bias, running_mean, running_var, eps, residual)
    if in_transform():
        _shape(*operands, *geometry)
        return conv_norm_relu_reference(*operands, relu, *geometry)
    count_flops(OP)
    return torch.ops.fused_resnet.conv_norm_relu(*operands, relu, *geometry)


def _shape(
    x: Tensor, weight: Tensor, bias: Any, norm_weight: Any, norm_bias: Any,
    running_mean: Tensor, running_var: Tensor, eps: float, residual: Any, *geometry: Any,
) -> list[int]:  # fmt: skip
    require(eps >= 0, OP, f"eps must be at least 0, got {eps}", ValueError)
    vectors = {
        "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias,
        "running_mean": running_mean, "running_var": running_var,
    }  # fmt: skip
    return conv_shape(OP, x, weight, vectors, residual, *geometry)


def _conv_norm_relu(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    *tensors, eps, residual, relu = arguments[:8]
    geometry = arguments[8:]
    shape = _shape(x, weight, *tensors, eps, residual, *geometry)
    # In float64, as for a model's plan: scale and shift are rounded once, by their kernel.
    vectors = Vectors(tuple(tensors), fold_norm, (eps, torch.float64))
    return convolved(
        lambda: conv_norm_relu_reference(x, weight, *arguments),
        shape, x, weight, vectors, residual, relu, *geometry,
    )  # fmt: skip


def _norm_fake(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    shape = _shape(x, weight, *arguments[:7], *arguments[8:])
    return layout.empty(shape, x, layout.memory_format(x))


def _norm_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, _residual, ctx.relu = inputs[:10]
    ctx.geometry, ctx.triton = inputs[10:], by_triton(tensors[0])
    ctx.save_for_backward(*tensors, output if ctx.relu else None)


def _norm_grad(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """dresidual = g = dy * (y > 0). With the scale and shift of `fold_norm`, conv_bn_relu's
    gradients of them for g, and invstd = 1 / sqrt(running_var + eps):

    d = dscale + dshift * (bias - running_mean), as shift is computed from scale
    dnorm_weight = d * invstd,   dnorm_bias = dshift,   drunning_var = -d * scale * invstd^2 / 2
    dbias = dshift * scale,   drunning_mean = -dshift * scale
    """
    *operands, y = ctx.saved_tensors
    needs, need_residual = ctx.needs_input_grad[:7], ctx.needs_input_grad[8]
    g = torch.ops.fused_resnet.add_relu_backward(dy, y) if ctx.relu else dy
    if by_formula(dy):
        grads: list[Tensor | None] = differentiable_gradients(
            lambda x, weight, bias, gain, offset, mean, var: conv_norm_relu_reference(
                x, weight, bias, gain, offset, mean, var, ctx.eps, None, False, *ctx.geometry
            ),
            operands, needs, g,
        )  # fmt: skip
    else:
        grads = _gradients(ctx, g, operands, needs)
    return (*grads, None, g if need_residual else None, *(None,) * 5)


def _gradients(
    ctx: Any, g: Tensor, operands: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """See `_norm_grad`."""
    x, weight, bias, norm_weight, norm_bias, mean, var = operands
    acc = accumulate_dtype(x.dtype)
    scale, shift = fold_norm(bias, norm_weight, norm_bias, mean, var, ctx.eps, acc)
    of_conv = (*needs[:2], needs[3] or needs[6], any(needs[2:]))
    dx, dweight, dscale, dshift = conv_gradients(
        g, x, weight, scale, shift, of_conv, ctx.geometry, ctx.triton
    )
    vectors: list[Tensor | None] = [None] * 5
    if dshift is not None:
        dmean = -dshift * scale
        vectors = [-dmean, None, dshift, dmean, None]
        if dscale is not None:
            invstd = torch.rsqrt(var.to(acc) + ctx.eps)
            offset = -mean.to(acc) if bias is None else bias.to(acc) - mean.to(acc)
            d = dscale + dshift * offset
            vectors[1], vectors[4] = d * invstd, -d * scale * invstd.square() / 2
    parts = zip(vectors, operands[2:], needs[2:], strict=True)
    return [
        dx,
        dweight,
        *[v.to(t.dtype) if need and v is not None else None for v, t, need in parts],
    ]


register(
    "conv_norm_relu(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias,"
    " Tensor running_mean, Tensor running_var, float eps, Tensor? residual, bool relu,"
    " SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor",
    _conv_norm_relu, _norm_fake, _norm_save, _norm_grad,
)  # fmt: skip
# x, weight, bias and residual, but not the norm's tensors.
register_autocast("conv_norm_relu", (0, 1, 2, 8))
