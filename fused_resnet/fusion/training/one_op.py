"""A residual block's training step on the CPU with one op for forward and one for backward.

The ops (csrc/cpu/block/train.cpp) run the passes of block.py, save the same tensors at every level
of activation memory, and give bitwise equal results. They remove the interpreter's overhead between
the passes, a third of a step where feature maps are narrow and small. Blocks whose passes need
anything else (statistics of other processes, a convolution of PyTorch's) run pass by pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet.kernels.training.native import (
    Native,
    has_input_gradient,
    plain,
    sizes,
    update_running_together,
)
from fused_resnet.layers.shortcut import SHORTCUTS
from fused_resnet.ops.library import by_formula

from .spec import Spec, differentiable, kept, laid_out


class Layout(NamedTuple):
    """The arguments of the ops except the tensors."""

    spec: Spec
    arguments: tuple[Any, ...]  # geometry, eps, shortcut, pad_stride, norm_first, shared, keep
    keep_output: bool  # whether the block's output is saved for backward
    counts: list[float]  # number of values per channel of each norm


def layout_of(spec: Spec, tensors: Sequence[Any], counts: list[float]) -> Layout | None:
    """The block's `Layout`; None where the ops do not support the block. tensors: as for
    `block.StepFunction`; counts: of values per channel, of each norm at least."""
    weights, kernels = tensors[::3], spec.kernels
    vectors = [t for i, t in enumerate(tensors) if i % 3]
    if not isinstance(kernels, Native) or any(group is not None for group in spec.groups):
        return None
    if not all(map(kernels.supports, weights, [spec.dtype] * len(weights), spec.geometries)):
        return None
    if any(w.dtype != torch.float32 for w in weights):
        return None
    if not all(map(has_input_gradient, weights, spec.geometries)):
        return None
    if not all(plain(t) for t in vectors[: 2 * len(spec.eps)]):
        return None
    keep = kept(spec, weights)
    geometry = [n for g in spec.geometries for n in sizes(g)]
    shortcut = SHORTCUTS[spec.shortcut], spec.stride, spec.norm_first, spec.shared
    return Layout(
        spec, (geometry, list(spec.eps), *shortcut, list(map(int, keep))),
        keep[-1] and not spec.norm_first, counts[: len(spec.eps)],
    )  # fmt: skip


class NativeBlockFunction(torch.autograd.Function):
    """`block.StepFunction` by one op per direction.

    apply(layout, states, x, *operands): operands are those of its tensors that are not None.
    Appends mean and biased variance, (2, C) float64, of each norm to `states`. Both directions run
    for every block in every step, so they call few Python functions: the op, and what autograd
    requires."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, states: list[Any], x: Tensor, *operands: Any) -> Tensor:
        op = torch.ops.fused_resnet_native.block_forward.default
        *saved, y = op(x, operands, *layout.arguments)
        states += saved[: len(layout.counts)]
        if layout.keep_output:
            saved.append(y)
        ctx.layout, ctx.strides, ctx.operands = layout, y.stride(), len(operands)
        ctx.save_for_backward(x, *operands, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        layout: Layout = ctx.layout
        x, *rest = ctx.saved_tensors
        operands, saved = rest[: ctx.operands], rest[ctx.operands :]
        needs = ctx.needs_input_grad[2:]
        if by_formula(dy):
            return None, None, *differentiable(layout.spec, x, operands, dy, needs)
        if dy.stride() != ctx.strides:
            dy = dy.new_empty_strided(dy.shape, ctx.strides).copy_(dy)
        op = torch.ops.fused_resnet_native.block_backward.default
        grads = op(dy, x, operands, saved, *layout.arguments, needs)
        if len(grads) < len(needs):
            needed = iter(grads)
            grads = [next(needed) if need else None for need in needs]
        return None, None, *laid_out(grads, operands)


class Tracking(NamedTuple):
    """The running statistics of several norms, which one op updates."""

    means: list[Tensor]  # (C,) float32 each, as the variances
    variances: list[Tensor]
    counters: list[Tensor]  # num_batches_tracked
    momenta: list[float]
    counts: list[float]  # number of values per channel

    def run(self, states: Sequence[Tensor]) -> None:
        """states: mean and biased variance of the batch, (2, C) float64, of each norm."""
        update_running_together(
            self.means, self.variances, self.counters, states, self.momenta, self.counts
        )


def prepare_tracking(norms: Sequence[Any], counts: list[float]) -> Tracking | None:
    """The update of the norms' running statistics by one op; None if it does not support one of
    them. Valid while neither the norms' attributes nor their buffers are replaced."""
    for bn in norms:
        counter = bn.num_batches_tracked
        if not (bn.training and bn.track_running_stats) or bn.momentum is None:
            return None
        if counter is None or counter.dtype != torch.int64 or counter.is_inference():
            return None
        if not plain(bn.running_mean) or not plain(bn.running_var):
            return None
    return Tracking(
        [bn.running_mean for bn in norms], [bn.running_var for bn in norms],
        [bn.num_batches_tracked for bn in norms], [bn.momentum for bn in norms], counts,
    )  # fmt: skip
