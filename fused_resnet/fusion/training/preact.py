"""A pre-activation block's training step as one node of autograd's graph.

He et al. 2016, "Identity Mappings in Deep Residual Networks" (1603.05027): norm and ReLU come
before each convolution, and nothing after the addition,

    h_i = relu(norm_i(z_{i-1})),   z_i = conv_i(h_i),   z_0 = x,   y = z_n + shortcut

The shortcut is added inside the last convolution. It reads x, or, where `shared`, h_1. Saved for
backward:

    full          every convolution's input and output
    low, lower    x and every convolution's output but the last; the ReLUs' outputs are recomputed
    minimal       only x
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fused_resnet.kernels.training.protocol import Normed
from fused_resnet.layers.shortcut import PadShortcut, add_padded_gradient

from .spec import Spec, differentiable, free_shortcut, units_of


class _Block:
    """A block's operands: (weight (K, C/groups, R, S), norm of C channels) for each convolution,
    and the weight of a projection shortcut, or None."""

    def __init__(self, spec: Spec, tensors: Sequence[Any]) -> None:
        self.spec, self.kernels = spec, spec.kernels
        self.units = units_of(spec, tensors)
        self.projection: Tensor | None = None
        if spec.shortcut == "projection":
            self.projection = tensors[3 * len(self.units)]

    def convolve(self, i: int, h: Tensor, residual: Tensor | None = None) -> Tensor:
        weight, geometry = self.units[i][0], self.spec.geometries[i]
        return self.kernels.convolution(h, weight, geometry, residual)

    def shortcut(self, source: Tensor) -> Tensor | None:
        """The shortcut's output (N, K, P, Q), None without a shortcut; source: x, or the first
        ReLU's output."""
        if self.projection is not None:
            geometry = self.spec.geometries[-1]
            return self.kernels.convolution(source, self.projection, geometry)
        return free_shortcut(self.spec, source, self.units[-1][0])

    def shortcut_gradient(self, dy: Tensor, source: Tensor, added: Tensor) -> Tensor:
        """`added` plus the shortcut's gradient for source; `added` may be overwritten."""
        spec = self.spec
        if self.projection is not None:
            return self.kernels.input_gradient(
                dy, source, self.projection, spec.geometries[-1], added
            )
        if spec.shortcut == "pad":
            return add_padded_gradient(added, dy, spec.stride)
        return added.add_(dy) if spec.shortcut == "identity" else added


class PreactFunction(torch.autograd.Function):
    """y = conv_n(relu(norm_n(... conv_1(relu(norm_1(x)))))) + shortcut, batch statistics.

    apply(spec, states, x, *tensors) as for `block.BlockFunction`; the weight of a projection
    shortcut is followed by two None.
    """

    @staticmethod
    def forward(ctx: Any, spec: Spec, states: list[Any], x: Tensor, *tensors: Any) -> Tensor:
        block, kernels = _Block(spec, tensors), spec.kernels
        last = len(block.units) - 1
        outputs, inner, moments = [x], [], []
        fused = None
        for i, (weight, norm) in enumerate(block.units):
            h, state = kernels.normalise_with(fused, outputs[i], norm, None, True)
            states.append((state, kernels.count(Normed(outputs[i], norm, state))))
            inner.append(h)
            moments.append(state)
            if i < last:
                z, fused = kernels.convolve(h, weight, spec.geometries[i])
                outputs.append(z)
        y = block.convolve(last, inner[last], block.shortcut(inner[0] if spec.shared else x))
        ctx.spec = spec
        ctx.save_for_backward(
            *(outputs if spec.level != "minimal" else outputs[:1]), *tensors,
            *(inner if spec.level == "full" else []), *(t for state in moments for t in state),
        )  # fmt: skip
        ctx.state_size, ctx.stride = len(moments[0]), y.stride()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        spec: Spec = ctx.spec
        n = len(spec.eps)
        output_count = n if spec.level != "minimal" else 1
        saved = ctx.saved_tensors
        outputs: list[Any] = list(saved[:output_count])
        rest = saved[output_count:]
        tensors, rest = rest[: 3 * len(spec.geometries)], rest[3 * len(spec.geometries) :]
        if torch.is_grad_enabled():
            needs = ctx.needs_input_grad[2:]
            return None, None, *differentiable(spec, outputs[0], tensors, dy, needs, formula)
        inner: list[Tensor | None] = [None] * n
        if spec.level == "full":
            inner, rest = list(rest[:n]), rest[n:]
        size = ctx.state_size
        states = [tuple(rest[i * size : (i + 1) * size]) for i in range(n)]
        block, kernels = _Block(spec, tensors), spec.kernels

        def unit_input(i: int) -> Tensor:
            h = inner[i]
            if h is None:
                while len(outputs) <= i:
                    j = len(outputs) - 1
                    outputs.append(block.convolve(j, unit_input(j)))
                normed = Normed(outputs[i], block.units[i][1], states[i])
                h = inner[i] = kernels.apply(normed, None, relu=True)
            return h

        _, _, need_x, *needs = ctx.needs_input_grad
        grads: list[Any] = [None] * len(needs)
        if dy.stride() != ctx.stride:
            dy = dy.new_empty_strided(dy.shape, ctx.stride).copy_(dy)
        # The first unit that needs a gradient; nothing is propagated to those before it.
        first = 0 if need_x else next(
            (i for i in range(n) if any(needs[3 * i : 3 * i + 3])), n
        )  # fmt: skip
        dz = dy
        for i in range(n - 1, first - 1, -1):
            weight, norm = block.units[i]
            h = unit_input(i)
            if needs[3 * i]:
                grads[3 * i] = kernels.weight_gradient(dz, h, weight, spec.geometries[i])
            if i == first and not need_x and not any(needs[3 * i + 1 : 3 * i + 3]):
                break
            normed, sums = Normed(outputs[i], norm, states[i]), None
            if i == 0 and spec.shared:
                dh = kernels.input_gradient(dz, h, weight, spec.geometries[i])
                dh = block.shortcut_gradient(dy, h, dh)
            else:
                dh, sums = kernels.relu_gradient(dz, h, weight, spec.geometries[i], normed)
            del dz
            norm_grads = kernels.norm_gradients_from_sums(sums, dh, h, normed)
            del dh, sums, h, normed
            for k, t, d in ((1, norm.weight, norm_grads.dweight), (2, norm.bias, norm_grads.dbias)):
                if t is not None and needs[3 * i + k]:
                    grads[3 * i + k] = d.to(t.dtype)
            dz = norm_grads.dx
            del norm_grads
            if i > 0:
                inner[i] = outputs[i] = None
        dx = None
        if need_x:
            dx = dz if spec.shared else block.shortcut_gradient(dy, outputs[0], dz)
        if block.projection is not None and needs[3 * n]:
            source = unit_input(0) if spec.shared else outputs[0]
            grads[3 * n] = kernels.weight_gradient(
                dy, source, block.projection, spec.geometries[-1]
            )
        return None, None, dx, *grads


def formula(spec: Spec, x: Tensor, tensors: Sequence[Any]) -> Tensor:
    """The block's output by PyTorch's differentiable operations."""

    def convolve(h: Tensor, weight: Tensor, i: int) -> Tensor:
        g = spec.geometries[i]
        weight = weight.to(spec.dtype)
        return functional.conv2d(h, weight, None, g.stride, g.padding, g.dilation, g.groups)

    block = _Block(spec, tensors)
    z = source = x  # source: what the shortcut reads
    for i, (weight, norm) in enumerate(block.units):
        h = torch.relu(
            functional.batch_norm(
                z, None, None, norm.weight, norm.bias, training=True, eps=norm.eps
            )
        )
        source = h if i == 0 and spec.shared else source
        z = convolve(h, weight, i)
    if block.projection is not None:
        return z + convolve(source, block.projection, len(spec.geometries) - 1)
    if spec.shortcut == "pad":
        return z + PadShortcut(x.shape[1], z.shape[1], spec.stride)(source)
    return z + source if spec.shortcut == "identity" else z
