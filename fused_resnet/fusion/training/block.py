"""A residual block's training step as one node of autograd's graph, pass by pass.

One node for all convolutions, norms, additions and ReLUs allows fusion across them: the two norms
of a downsampling block are applied and added in one pass and reduced in one, and the gradient of
the identity shortcut is added inside the convolution's input gradient. With norms first, the
shortcut is added inside the last convolution. The level of activation memory sets what is saved
for backward besides x:

    full     the outputs of all convolutions and ReLUs
    low      the outputs of all convolutions and of the block; the outputs of the inner ReLUs are
             recomputed from the convolutions', in one elementwise pass each
    lower    as low, but the outputs of widening 1x1 convolutions and of the shortcut's convolution
             are also recomputed from their inputs; with norms first, the same as low
    minimal  nothing: everything is recomputed

With norms first, backward reads neither the block's output nor the shortcut's, and neither is
saved. Recomputed tensors are bitwise equal. A double backward runs the block's formula by
PyTorch's operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.training.protocol import Normed
from fused_resnet.layers.shortcut import add_padded_gradient, padded
from fused_resnet.ops.library import by_formula

from .spec import Spec, differentiable, kept, laid_out, norms_of


class StepFunction(torch.autograd.Function):
    """A block's output (N, K, P, Q) by batch statistics; see `spec`.

    apply(spec, states, x, *tensors): x (N, C, H, W) of spec.dtype, in the layout that the kernels
    require; tensors: weight, norm weight and norm bias of each convolution, None where absent.
    Appends each norm's statistics and number of values per channel to `states`.
    """

    @staticmethod
    def forward(ctx: Any, spec: Spec, states: list[Any], x: Tensor, *tensors: Any) -> Tensor:
        step, kernels, last = _Step(spec, x, tensors), spec.kernels, spec.main - 1
        index = None
        if spec.window is not None:
            y, index = kernels.pool(step.normed(0), spec.window)
            step.h[0] = y
        elif spec.norm_first:
            h = step.input(last)
            y = kernels.convolution(h, *step.convolution(last), step.shortcut())
        else:
            y = step.relu(last)
        states.extend((s, kernels.count(step.normed(j))) for j, s in enumerate(step.states))
        flags = kept(spec, step.weights)
        saved = [t if keep else None for t, keep in zip((*step.z, *step.h), flags, strict=True)]
        ctx.spec, ctx.strides, ctx.state_size = spec, y.stride(), len(step.states[0])
        ctx.save_for_backward(
            x, index, *tensors, *saved, *(t for state in step.states for t in state)
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        spec: Spec = ctx.spec
        x, index, *rest = ctx.saved_tensors
        count, n = 3 * len(spec.geometries), len(spec.eps)
        tensors, rest = rest[:count], rest[count:]
        needs = ctx.needs_input_grad[2:]
        if by_formula(dy):
            return None, None, *differentiable(spec, x, tensors, dy, needs)
        if dy.stride() != ctx.strides:
            dy = dy.new_empty_strided(dy.shape, ctx.strides).copy_(dy)
        step = _Step(spec, x, tensors)
        step.z[spec.norm_first :] = rest[spec.norm_first : n]
        step.h, rest, size = rest[n : n + spec.main], rest[n + spec.main :], ctx.state_size
        step.states = [tuple(rest[j * size : (j + 1) * size]) for j in range(n)]
        return None, None, *laid_out(step.gradients(dy, index, needs), tensors)


class _Step:
    """The activations of one step. Each is computed from those before it when it is first needed,
    in forward, and in backward if it was not saved."""

    def __init__(self, spec: Spec, x: Tensor, tensors: Sequence[Any]) -> None:
        self.spec, self.kernels, self.x = spec, spec.kernels, x
        self.weights, self.norms = tensors[::3], norms_of(spec, tensors)
        n = len(self.norms)
        self.z: list[Any] = [x if spec.norm_first else None, *[None] * (n - 1)]
        self.h: list[Any] = [None] * spec.main
        self.states: list[Any] = [None] * n  # of norms; None until computed in forward
        self.fused: list[Any] = [None] * n  # the statistics that z's convolution computed

    def convolution(self, i: int) -> tuple[Tensor, Any]:
        """Weight and geometry of convolution i."""
        return self.weights[i], self.spec.geometries[i]

    def input(self, i: int) -> Tensor:
        """The input of convolution i."""
        j = self.spec.norm_before(i)
        return self.x if j is None else self.relu(j)

    def output(self, j: int) -> Tensor:
        """z[j]"""
        if self.z[j] is None:
            kernels, i = self.kernels, self.spec.conv_before(j)
            before, found = self.spec.norm_before(i), None
            if before is not None and self.h[before] is None and self.spec.level != "full":
                self.output(before)
                # Statistics that are not fused are computed together with h.
                if (self.states[before] or self.fused[before]) is not None:
                    normed = self.normed(before)
                    found = kernels.convolve_normed(normed, *self.convolution(i))
            if found is None and self.states[j] is None:
                found = kernels.convolve(self.input(i), *self.convolution(i))
            elif found is None:
                found = kernels.convolution(self.input(i), *self.convolution(i)), None
            self.z[j], self.fused[j] = found
        return self.z[j]

    def normed(self, j: int) -> Normed:
        z, norm = self.output(j), self.norms[j]
        if self.states[j] is None:
            self.states[j] = self.kernels.statistics(z, norm.group, self.fused[j])
        return Normed(z, norm, self.states[j])

    def relu(self, j: int) -> Tensor:
        """h[j]"""
        if self.h[j] is None:
            z, last = self.output(j), not self.spec.norm_first and j == self.spec.main - 1
            residual = self.shortcut() if last else None
            if self.states[j] is None:
                self.h[j], self.states[j] = self.kernels.normalise_with(
                    self.fused[j], z, self.norms[j], residual, Activation.RELU
                )
            else:
                self.h[j] = self.kernels.apply(self.normed(j), residual, Activation.RELU)
        return self.h[j]

    def shortcut(self) -> Any:
        """What is added to the residual branch: a tensor (N, K, P, Q), a `Normed`, or None."""
        spec, main = self.spec, self.spec.main
        if spec.shortcut == "none":
            return None
        if spec.shortcut == "projection" and not spec.norm_first:
            return self.normed(main)
        source = self.input(main)
        if spec.shortcut == "projection":
            return self.kernels.convolution(source, *self.convolution(main))
        if spec.shortcut == "pad":
            return padded(source, self.weights[main - 1].shape[0], spec.stride)
        return source

    def add_shortcut_gradient(self, dx: Tensor, ds: Tensor | None) -> Tensor:
        """dx (N, C, H, W), which may be overwritten, plus the gradient of the shortcut's input for
        ds (N, K, P, Q) of its output; None: there is none."""
        shortcut, main = self.spec.shortcut, self.spec.main
        if ds is None or shortcut == "none":
            return dx
        if shortcut == "projection":
            return self.kernels.input_gradient(ds, self.x, *self.convolution(main), dx)
        return add_padded_gradient(dx, ds, self.spec.stride) if shortcut == "pad" else dx.add_(ds)

    def gradients(self, dy: Tensor, index: Any, needs: Sequence[bool]) -> list[Any]:
        """The gradients of x and of every tensor for dy (N, K, P, Q), None where not needed."""
        spec, kernels, main = self.spec, self.kernels, self.spec.main
        projection = spec.shortcut == "projection"
        grads: list[Any] = [None] * len(needs)  # of x, then three per convolution

        def store_norm(j: int, found: Any) -> None:
            for k, t, d in zip((2, 3), self.norms[j], found[1:], strict=False):
                if needs[3 * j + k]:
                    grads[3 * j + k] = d.to(t.dtype)

        def store_weight(i: int, dz: Tensor) -> None:
            if needs[3 * i + 1]:
                source = self.input(i)
                grads[3 * i + 1] = kernels.weight_gradient(dz, source, *self.convolution(i))

        # Gradients of a convolution's output, the shortcut's output, and (identity, norms last) the
        # shortcut's input, to which the first convolution's input gradient is added.
        dz: Any
        ds: Any
        dz, ds, added = dy, dy, None
        if not spec.norm_first:
            y: Any = self.relu(main - 1)
            if spec.window is not None:
                dy, y = kernels.pool_gradient(dy, y, index, self.output(0), spec.window), None
            first, second, ds = kernels.norm_gradients(
                dy, y, self.normed(main - 1), self.normed(main) if projection else None,
                has_residual=spec.shortcut != "none",
                masked=spec.shortcut in ("identity", "pad") and needs[0],
            )  # fmt: skip
            del dy, y
            store_norm(main - 1, first)
            dz = first.dx
            self.z[main - 1] = self.h[main - 1] = None
            if second is not None:
                store_norm(main, second)
                ds, self.z[main] = second.dx, None
            if spec.shortcut == "identity":
                added, ds = ds, None
            del first, second
        for i in reversed(range(main)):
            store_weight(i, dz)
            own_norm = spec.norm_first and any(needs[3 * i + 2 : 3 * i + 4])
            if not own_norm and not any(needs[: 3 * i + 1]):
                break  # nothing before requires a gradient
            j, convolution = spec.norm_before(i), self.convolution(i)
            if j is None:
                dz = kernels.input_gradient(dz, self.x, *convolution, added)
                break
            h, normed, sums = self.relu(j), self.normed(j), None
            if spec.shared and i == 0:
                dz = kernels.input_gradient(dz, h, *convolution)
                dz = self.add_shortcut_gradient(dz, ds)
            else:
                dz, sums = kernels.relu_gradient(dz, h, *convolution, normed)
            found = kernels.norm_gradients_from_sums(sums, dz, h, normed)
            store_norm(j, found)
            dz = found.dx
            del h, normed, sums, found
            if i > 0:
                self.z[j] = self.h[j] = None
        if needs[0]:
            grads[0] = dz if spec.shared else self.add_shortcut_gradient(dz, ds)
        if projection:
            store_weight(main, ds)
        return grads
