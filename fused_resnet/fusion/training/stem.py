"""A network's stem in training: convolution, norm, ReLU and max pooling as one autograd node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fused_resnet.kernels.training.protocol import Norm, Normed

from .block import formula
from .spec import Spec, differentiable, units_of


class StemFunction(torch.autograd.Function):
    """y = maxpool(relu(bn(conv(x)))), batch statistics: a network's stem.

    apply(spec, window, states, x, weight, norm weight, norm bias): x (N, C, H, W) in the layout
    that the kernels require; window: kernel, stride, padding, (height, width) each; `states` as in
    `BlockFunction`. Saved for backward: x, the convolution's output (at "minimal" recomputed), the
    pooled output and one byte per element of it.
    """

    @staticmethod
    def forward(
        ctx: Any, spec: Spec, window: list[int], states: list[Any], x: Tensor, *tensors: Any
    ) -> Tensor:
        ((weight, norm),) = units_of(spec, tensors)
        z = spec.kernels.convolution(x, weight, spec.geometries[0])
        normed = Normed(z, norm, spec.kernels.statistics(z, norm.group))
        y, index = spec.kernels.pool(normed, window)
        states.append((normed.state, spec.kernels.count(normed)))
        ctx.spec, ctx.window = spec, window
        saved = None if spec.level == "minimal" else z
        ctx.save_for_backward(x, *tensors, saved, y, index, *normed.state)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        spec: Spec = ctx.spec
        kernels, geometry = spec.kernels, spec.geometries[0]
        x, weight, norm_weight, norm_bias, z, y, index, *state = ctx.saved_tensors
        tensors = (weight, norm_weight, norm_bias)
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            window = ctx.window

            def pooled(*operands: Any) -> Tensor:
                y = formula(*operands)
                return functional.max_pool2d(y, window[:2], window[2:4], window[4:])

            return None, None, None, *differentiable(spec, x, tensors, dy, needs, pooled)
        norm = Norm(norm_weight, norm_bias, spec.eps[0], spec.groups[0])
        z = kernels.convolution(x, weight, geometry) if z is None else z
        if dy.stride() != y.stride():
            dy = torch.empty_like(y).copy_(dy)
        g = kernels.pool_gradient(dy, y, index, z, ctx.window)
        normed = Normed(z, norm, tuple(state))
        dz, *norm_grads = kernels.norm_gradients(g, None, normed, has_residual=False)[0]
        dx = kernels.input_gradient(dz, x, weight, geometry) if needs[0] else None
        dweight = kernels.weight_gradient(dz, x, weight, geometry) if needs[1] else None
        dnorm = [
            d.to(t.dtype) if need else None
            for d, t, need in zip(norm_grads, tensors[1:], needs[2:], strict=True)
        ]
        return None, None, None, dx, dweight, *dnorm
