"""A residual block's training step as one node of autograd's graph.

One node for all convolutions, norms, additions and ReLUs allows fusion across them: the two norms
of a downsampling block are applied and added in one pass and reduced in one, and the gradient of
the identity shortcut is added inside the convolution's input gradient. The level of activation
memory sets what is saved for backward:

    full     the outputs of all convolutions and ReLUs
    low      the outputs of all convolutions and of the block; the outputs of the inner ReLUs are
             recomputed from the convolutions', in one elementwise pass each
    lower    as low, but the outputs of widening 1x1 convolutions and of the shortcut's convolution
             are also recomputed from their inputs
    minimal  only the block's input: everything is recomputed

Recomputed tensors are bitwise equal. A double backward runs the block's formula by PyTorch's
operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fused_resnet.kernels.training.protocol import Normed
from fused_resnet.layers.shortcut import PadShortcut, add_padded_gradient

from .spec import Spec, Units, differentiable, free_shortcut, recomputed, units_of


def _convolve_next(
    spec: Spec, fused: Any, z: Tensor, units: Units, i: int
) -> tuple[Tensor | None, tuple[Any, ...], tuple[Tensor, Any]]:
    """h = relu(norm(z)) of the unit before main unit i, and the convolution of unit i on h.

    fused: the fused statistics of z, or None. Returns h, or None where it is not saved and was not
    written; the norm's state; what `convolve` returns."""
    kernels, norm = spec.kernels, units[i - 1][1]
    weight, g = units[i][0], spec.geometries[i]
    if fused is None:
        h, state = kernels.normalise(z, norm, None, True)
        return h, state, kernels.convolve(h, weight, g)
    state = kernels.statistics(z, norm.group, fused)
    normed = Normed(z, norm, state)
    convolved = kernels.convolve_normed(normed, weight, g) if spec.level != "full" else None
    if convolved is not None:
        return None, state, convolved
    h = kernels.apply(normed, None, True)
    return h, state, kernels.convolve(h, weight, g)


class BlockFunction(torch.autograd.Function):
    """y = relu(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + shortcut(x)), batch statistics.

    apply(spec, states, x, *tensors): x (N, C, H, W) of spec.dtype, in the layout that the kernels
    require; tensors as for `units_of`. Appends each unit's statistics and number of values per
    channel to `states`.
    """

    @staticmethod
    def forward(ctx: Any, spec: Spec, states: list[Any], x: Tensor, *tensors: Any) -> Tensor:
        kernels = spec.kernels
        units = units_of(spec, tensors)
        projection = spec.shortcut == "projection"
        main = len(units) - projection
        outputs: list[Tensor] = []  # of convolutions
        inner: list[Tensor | None] = []  # outputs of the inner ReLUs; None: not written
        moments: list[tuple[Tensor, ...]] = []
        z, fused = kernels.convolve(x, units[0][0], spec.geometries[0])
        outputs.append(z)
        for i in range(1, main):
            h, state, (z, fused) = _convolve_next(spec, fused, z, units, i)
            outputs.append(z)
            inner.append(h)
            moments.append(state)
        weight, norm = units[main - 1]
        residual: Tensor | Normed | None = free_shortcut(spec, x, weight)
        if projection:
            branch, branch_stats = kernels.convolve(x, units[-1][0], spec.geometries[-1])
            branch_stats = kernels.statistics(branch, units[-1][1].group, branch_stats)
            residual = Normed(branch, units[-1][1], branch_stats)
        y, state = kernels.normalise_with(fused, z, norm, residual, True)
        moments.append(state)
        if isinstance(residual, Normed):
            outputs.append(residual.x)
            moments.append(residual.state)
        for z, (_, norm), state in zip(outputs, units, moments, strict=True):
            states.append((state, kernels.count(Normed(z, norm, state))))

        dropped = recomputed(spec, [weight for weight, _ in units])
        saved = [None if drop else z for drop, z in zip(dropped, outputs, strict=True)]
        ctx.spec = spec
        ctx.state_size = len(moments[0])
        ctx.save_for_backward(
            x, None if spec.level == "minimal" else y, *tensors, *saved,
            *(inner if spec.level == "full" else []), *(t for state in moments for t in state),
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        spec: Spec = ctx.spec
        x, y, *rest = ctx.saved_tensors
        n = len(spec.eps)
        tensors, rest = rest[: 3 * n], rest[3 * n :]
        if torch.is_grad_enabled():
            needs = ctx.needs_input_grad[2:]
            return None, None, *differentiable(spec, x, tensors, dy, needs, formula)
        return _Backward(ctx, x, y, tensors, rest).run(dy)


class _Backward:
    """One call of `BlockFunction.backward`, on what forward saved."""

    def __init__(
        self, ctx: Any, x: Tensor, y: Tensor | None, tensors: Any, rest: Sequence[Any]
    ) -> None:
        self.spec: Spec = ctx.spec
        self.kernels = self.spec.kernels
        self.x = x
        self.units = units_of(self.spec, tensors)
        n = len(self.units)
        self.main = n - (self.spec.shortcut == "projection")
        self.outputs = list(rest[:n])
        rest = rest[n:]
        self.inner: list[Tensor | None] = [None] * (self.main - 1)
        if self.spec.level == "full":
            self.inner, rest = list(rest[: self.main - 1]), rest[self.main - 1 :]
        size = ctx.state_size
        self.states = [tuple(rest[i * size : (i + 1) * size]) for i in range(n)]
        _, _, self.need_x, *self.needs = ctx.needs_input_grad
        self.y = self.output() if y is None else y

    def normed(self, i: int) -> Normed:
        """Unit i's norm of its convolution output, which is recomputed if not saved."""
        if self.outputs[i] is None:
            self.outputs[i] = self.convolved(i)
        return Normed(self.outputs[i], self.units[i][1], self.states[i])

    def convolved(self, i: int) -> Tensor:
        """Unit i's convolution output, recomputed by the same kernels as in forward."""
        weight, g = self.units[i][0], self.spec.geometries[i]
        if 0 < i < self.main and self.inner[i - 1] is None:
            convolved = self.kernels.convolve_normed(self.normed(i - 1), weight, g)
            if convolved is not None:
                return convolved[0]
        source = self.x if i >= self.main else self.unit_input(i)
        return self.kernels.convolution(source, weight, g)

    def unit_input(self, i: int) -> Tensor:
        """The input of main unit i: x, or the previous ReLU's output, recomputed if not saved."""
        if i == 0:
            return self.x
        h = self.inner[i - 1]
        if h is None:
            h = self.inner[i - 1] = self.kernels.apply(self.normed(i - 1), None, relu=True)
        return h

    def output(self) -> Tensor:
        """The block's output, recomputed."""
        weight = self.units[self.main - 1][0]
        residual: Tensor | Normed | None = free_shortcut(self.spec, self.x, weight)
        if self.spec.shortcut == "projection":
            residual = self.normed(self.main)
        return self.kernels.apply(self.normed(self.main - 1), residual, relu=True)

    def run(self, dy: Tensor) -> tuple[Any, ...]:
        spec, kernels = self.spec, self.kernels
        if dy.stride() != self.y.stride():
            dy = torch.empty_like(self.y).copy_(dy)
        grads: list[Any] = [None] * len(self.needs)
        projection = spec.shortcut == "projection"
        # The first main unit that needs a gradient; nothing is propagated to those before it.
        first = 0 if self.need_x else next(
            (i for i in range(self.main) if any(self.needs[3 * i : 3 * i + 3])), self.main
        )  # fmt: skip
        masked = spec.shortcut in ("identity", "pad") and self.need_x
        last = self.main - 1
        other = self.normed(last + 1) if projection else None
        norm_grads: Any
        norm_grads, branch, g = kernels.norm_gradients(
            dy, self.y, self.normed(last), other, has_residual=spec.shortcut != "none",
            masked=masked,
        )  # fmt: skip
        del dy
        self.outputs[last] = None
        dx = g if spec.shortcut == "identity" and self.need_x else None
        if branch is not None:
            self.store_norm_gradients(grads, last + 1, branch)
            if self.needs[3 * (last + 1)]:
                grads[3 * (last + 1)] = self.weight_gradient(last + 1, branch.dx, self.x)
            self.outputs[last + 1] = other = None
        g = g if spec.shortcut == "pad" else None
        for i in range(last, first - 1, -1):
            self.store_norm_gradients(grads, i, norm_grads)
            source = self.unit_input(i)
            if self.needs[3 * i]:
                grads[3 * i] = self.weight_gradient(i, norm_grads.dx, source)
            if i == 0:
                if self.need_x:
                    dx = kernels.input_gradient(
                        norm_grads.dx, source, self.units[0][0], spec.geometries[0], dx
                    )
                break
            if i == first:
                break
            before = self.normed(i - 1)
            dh, sums = kernels.relu_gradient(
                norm_grads.dx, source, self.units[i][0], spec.geometries[i], before
            )
            norm_grads = None  # frees its memory before the next allocation
            norm_grads = kernels.norm_gradients_from_sums(sums, dh, source, before)
            del dh, sums, source, before
            self.inner[i - 1] = self.outputs[i - 1] = None
        if branch is not None and self.need_x:
            dx = kernels.input_gradient(
                branch.dx, self.x, self.units[-1][0], spec.geometries[-1], dx
            )
        if dx is not None and g is not None:
            dx = add_padded_gradient(dx, g, spec.stride)
        return None, None, dx, *grads

    def store_norm_gradients(self, grads: list[Any], i: int, norm_grads: Any) -> None:
        norm = self.units[i][1]
        if norm.weight is not None and self.needs[3 * i + 1]:
            grads[3 * i + 1] = norm_grads.dweight.to(norm.weight.dtype)
        if norm.bias is not None and self.needs[3 * i + 2]:
            grads[3 * i + 2] = norm_grads.dbias.to(norm.bias.dtype)

    def weight_gradient(self, i: int, dy: Tensor, x: Tensor) -> Tensor:
        return self.kernels.weight_gradient(dy, x, self.units[i][0], self.spec.geometries[i])


def formula(spec: Spec, x: Tensor, tensors: Sequence[Any]) -> Tensor:
    """The block's output by PyTorch's differentiable operations."""

    def unit(i: int, h: Tensor) -> Tensor:
        weight, norm = units[i]
        g = spec.geometries[i]
        z = functional.conv2d(
            h, weight.to(spec.dtype), None, g.stride, g.padding, g.dilation, g.groups
        )
        return functional.batch_norm(
            z, None, None, norm.weight, norm.bias, training=True, eps=norm.eps
        )

    units = units_of(spec, tensors)
    main = len(units) - (spec.shortcut == "projection")
    h = x
    for i in range(main - 1):
        h = torch.relu(unit(i, h))
    y = unit(main - 1, h)
    if spec.shortcut == "projection":
        y = y + unit(main, x)
    elif spec.shortcut == "pad":
        y = y + PadShortcut(x.shape[1], y.shape[1], spec.stride)(x)
    elif spec.shortcut == "identity":
        y = y + x
    return torch.relu(y)
