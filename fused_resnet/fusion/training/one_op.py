"""A residual block's training step on the CPU with one op for forward and one for backward.

The ops (csrc/cpu/block/train.cpp) run the passes of block.py and preact.py, save the same tensors
at every level of activation memory, and give bitwise equal results. They remove the interpreter's
overhead between the passes, a third of a step where feature maps are narrow and small. Blocks whose
passes need anything else (statistics of other processes, a convolution of PyTorch's) run pass by
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet.kernels.problem import output_shape
from fused_resnet.kernels.training.native import (
    Native,
    channels_last,
    has_input_gradient,
    plain,
    update_running_together,
)
from fused_resnet.layers.shortcut import SHORTCUTS

from . import block, preact
from .spec import Spec, differentiable, recomputed


class Layout(NamedTuple):
    """The arguments of the ops except the tensors. keep: 1 for each output of a convolution, then
    of an inner ReLU, that is saved for backward; keep_output: whether the block's output is."""

    spec: Spec
    sizes: tuple[Any, ...]  # geometry, eps, shortcut, pad_stride and, if norm_first, shared
    keep: list[int]
    keep_output: bool
    norm_first: bool
    counts: list[float]  # number of values per channel of each norm


def layout_of(
    spec: Spec, tensors: Sequence[Any], norm_first: bool, shape: Sequence[int]
) -> Layout | None:
    """The block's `Layout`; None where the ops do not support the block. tensors: as for
    `block.BlockFunction`; shape: of the input (N, C, H, W)."""
    weights = tensors[::3]
    vectors = [t for i, t in enumerate(tensors) if i % 3]
    norms = len(spec.eps)
    kernels = spec.kernels
    if not isinstance(kernels, Native) or any(group is not None for group in spec.groups):
        return None
    if not all(map(kernels.supports, weights, [spec.dtype] * len(weights), spec.geometries)):
        return None
    if any(w.dtype != torch.float32 for w in weights):
        return None
    if not all(map(has_input_gradient, weights, spec.geometries)):
        return None
    if not all(plain(t) for t in vectors[: 2 * norms]):
        return None
    full = spec.level == "full"
    if norm_first:
        keep = [int(spec.level != "minimal")] * (norms - 1) + [int(full)] * norms
    else:
        main = norms - (spec.shortcut == "projection")
        keep = [int(not drop) for drop in recomputed(spec, weights)] + [int(full)] * (main - 1)
    sizes: tuple[Any, ...] = (
        [n for g in spec.geometries for n in (*g.stride, *g.padding, *g.dilation)],
        list(spec.eps), SHORTCUTS[spec.shortcut], spec.stride,
    )  # fmt: skip
    return Layout(
        spec, (*sizes, spec.shared) if norm_first else sizes, keep,
        not norm_first and spec.level != "minimal", norm_first,
        _counts(spec, weights, norm_first, shape),
    )  # fmt: skip


def _counts(
    spec: Spec, weights: Sequence[Tensor], norm_first: bool, shape: Sequence[int]
) -> list[float]:
    """The number of values per channel of each norm."""
    counts = []
    for i, (weight, g) in enumerate(zip(weights, spec.geometries, strict=True)):
        before = shape
        if not (spec.shortcut == "projection" and i == len(weights) - 1):
            shape = output_shape(shape, weight.shape, *g) or shape
        N, _, H, W = before if norm_first else shape
        counts.append(float(N * H * W))
    return counts[: len(spec.eps)]


class NativeBlockFunction(torch.autograd.Function):
    """`block.BlockFunction`, or for norm_first `preact.PreactFunction`, by one op per direction.

    apply(layout, states, x, *operands): operands are the tensors of these that are not None."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, states: list[Any], x: Tensor, *operands: Any) -> Tensor:
        ops = torch.ops.fused_resnet_native
        op = ops.preact_forward if layout.norm_first else ops.block_forward
        y, *saved = op.default(x, _channels_last_weights(operands), *layout.sizes, layout.keep)
        # saved begins with the norms' statistics.
        states.extend(((s,), n) for s, n in zip(saved, layout.counts, strict=False))
        ctx.save_for_backward(x, y if layout.keep_output else None, *operands, *saved)
        ctx.layout, ctx.strides, ctx.operands = layout, y.stride(), len(operands)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        layout: Layout = ctx.layout
        x, y, *rest = ctx.saved_tensors
        operands, saved = rest[: ctx.operands], rest[ctx.operands :]
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            formula = preact.formula if layout.norm_first else block.formula
            grads = differentiable(layout.spec, x, operands, dy, needs, formula)
            return None, None, *grads
        if dy.stride() != ctx.strides:
            dy = dy.new_empty_strided(dy.shape, ctx.strides).copy_(dy)
        ops = torch.ops.fused_resnet_native
        op = ops.preact_backward if layout.norm_first else ops.block_backward
        outputs = () if layout.norm_first else (y,)
        needed_grads = op.default(
            dy, x, *outputs, _channels_last_weights(operands), saved, *layout.sizes, layout.keep,
            list(needs),
        )  # fmt: skip
        grads = iter(needed_grads)
        return None, None, *[next(grads) if need else None for need in needs]


def track(norms: Sequence[Any], states: Sequence[Any]) -> bool:
    """Updates the running statistics of all norms by one op. Returns False, without an update, if
    the op does not support one of the norms. states: (statistics, number of values per channel) of
    each norm."""
    counters = [bn.num_batches_tracked for bn in norms]
    supported = all(
        bn.training and bn.track_running_stats and bn.momentum is not None for bn in norms
    ) and not any(
        counter is None or counter.dtype != torch.int64 or counter.is_inference()
        for counter in counters
    )
    means, variances = [bn.running_mean for bn in norms], [bn.running_var for bn in norms]
    if not supported or not all(map(plain, (*means, *variances))):
        return False
    update_running_together(
        means, variances, counters, [state for (state,), _ in states],
        [bn.momentum for bn in norms], [count for _, count in states],
    )  # fmt: skip
    return True


def _channels_last_weights(operands: Sequence[Tensor]) -> list[Tensor]:
    """The operands with weights channels_last, as the ops require."""
    return [
        t if t.dim() == 1 or t.is_contiguous(memory_format=torch.channels_last)
        else channels_last(t)
        for t in operands
    ]  # fmt: skip
