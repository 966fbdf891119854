"""A residual block's training step on the CPU as one node of autograd's graph whose forward and
whose backward are one op each: csrc/cpu/block/train.cpp.

The ops run the passes of `training` and `preact_training`, keep what those keep at every level of
activation memory, and give the same results to the last bit. What they save is the interpreter
between the passes, a third of a step where feature maps are narrow and small. Blocks that need
something from outside between their passes (statistics of other processes, a convolution of
PyTorch's) go on pass by pass.
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
    plain,
    update_running_together,
)
from fused_resnet.kernels.training.protocol import Geometry, gradient_padding
from fused_resnet.layers.shortcut import SHORTCUTS

from . import block, preact
from .spec import Spec, differentiable, recomputed


class Layout(NamedTuple):
    """A block as the ops take it, without its tensors. keep: by number, what of the convolutions'
    outputs and of the ReLUs' inside is kept for backward; keep_output: whether the block's is."""

    spec: Spec
    sizes: tuple[Any, ...]  # geometry, eps, shortcut, pad_stride and, of norms first, shared
    keep: list[int]
    keep_output: bool
    norm_first: bool
    counts: list[float]  # values per channel of every norm


def layout_of(
    spec: Spec, tensors: Sequence[Any], norm_first: bool, shape: Sequence[int]
) -> Layout | None:
    """None where the block is none for these ops. tensors: as for `training.BlockFunction`; shape:
    of its input (N, C, H, W)."""
    weights = tensors[::3]
    vectors = [t for i, t in enumerate(tensors) if i % 3]
    norms = len(spec.eps)
    kernels = spec.kernels
    if not isinstance(kernels, Native) or any(group is not None for group in spec.groups):
        return None
    if not all(map(kernels._serves, weights, [spec.dtype] * len(weights), spec.geometries)):
        return None
    if any(w.dtype != torch.float32 for w in weights):
        return None
    if not all(map(_strides_serve, weights, spec.geometries)):
        return None
    if not all(plain(t) for t in vectors[: 2 * norms]):
        return None
    full = spec.level == "full"
    if norm_first:
        keep = [int(spec.level != "minimal")] * (norms - 1) + [int(full)] * norms
    else:
        again = recomputed(spec, weights)
        main = norms - (spec.shortcut == "projection")
        keep = [int(not a) for a in again] + [int(full)] * (main - 1)
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
    """The values per channel of every norm."""
    found = []
    for i, (weight, g) in enumerate(zip(weights, spec.geometries, strict=True)):
        before = shape
        if not (spec.shortcut == "projection" and i == len(weights) - 1):
            shape = output_shape(shape, weight.shape, *g) or shape
        N, _, H, W = before if norm_first else shape
        found.append(float(N * H * W))
    return found[: len(spec.eps)]


def _strides_serve(weight: Tensor, g: Geometry) -> bool:
    """Whether the gradient of such a convolution by its input is one of a kernel of ours."""
    return gradient_padding(weight, g) is not None or g.dilation == (1, 1)


class NativeBlockFunction(torch.autograd.Function):
    """As `training.BlockFunction`, or where norms come first `preact_training.PreactFunction`.

    apply(layout, states, x, *operands): operands are the tensors of those that are not None."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, states: list[Any], x: Tensor, *operands: Any) -> Tensor:
        ops = torch.ops.fused_resnet_native
        op = ops.preact_forward if layout.norm_first else ops.block_forward
        y, *kept = op.default(x, _ready(operands), *layout.sizes, layout.keep)
        states.extend(((s,), n) for s, n in zip(kept, layout.counts, strict=False))
        ctx.save_for_backward(x, y if layout.keep_output else None, *operands, *kept)
        ctx.layout, ctx.strides, ctx.operands = layout, y.stride(), len(operands)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        layout: Layout = ctx.layout
        x, y, *rest = ctx.saved_tensors
        operands, kept = rest[: ctx.operands], rest[ctx.operands :]
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
        found = op.default(
            dy, x, *outputs, _ready(operands), kept, *layout.sizes, layout.keep, list(needs)
        )
        grads = iter(found)
        return None, None, *[next(grads) if need else None for need in needs]


def track(norms: Sequence[Any], states: Sequence[Any]) -> bool:
    """The running statistics of all norms by one op; False, and nothing done, where some norm keeps
    its own otherwise. states: (statistics, number of values per channel) of each."""
    counters = [bn.num_batches_tracked for bn in norms]
    usual = all(
        bn.training and bn.track_running_stats and bn.momentum is not None for bn in norms
    ) and not any(
        counter is None or counter.dtype != torch.int64 or counter.is_inference()
        for counter in counters
    )
    means, variances = [bn.running_mean for bn in norms], [bn.running_var for bn in norms]
    if not usual or not all(map(plain, (*means, *variances))):
        return False
    update_running_together(
        means, variances, counters, [state for (state,), _ in states],
        [bn.momentum for bn in norms], [count for _, count in states],
    )  # fmt: skip
    return True


def _ready(operands: Sequence[Tensor]) -> list[Tensor]:
    """As the ops take them: weights channels_last."""
    return [
        t if t.dim() == 1 or t.is_contiguous(memory_format=torch.channels_last)
        else channels_last(t)
        for t in operands
    ]  # fmt: skip
