"""Consecutive plans, run one after the other: activations stay channels_last in the compute dtype
between them, and are converted to stock's dtype and layout only at their end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from fused_resnet import layout
from fused_resnet.fusion.call import call_reason
from fused_resnet.fusion.dtype_rules import compute_dtype, output_dtype, weights_fit

from .plan import Blocks, Plan

# Largest activation of a micro-batch on the CPU, in bytes, but for a chain's input and output. A
# convolution reads one or two activations and writes one, which should fit a last-level cache of
# 32 MiB. It also lowers the peak memory.
_MICRO_BATCH_BYTES = 8 * 2**20


class _Stage(NamedTuple):
    """Consecutive plans (not a ResNet stage) that run on micro-batches of at most `images`, and how
    they run: by one op where that supports them."""

    plans: list[Plan]
    images: int
    steps: list[Plan | Blocks]


class Chain:
    """Consecutive plans, and how they run for the last input shape."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self._stages: tuple[torch.Size, list[_Stage]] | None = None  # of the last input shape

    def accepts(self, x: Tensor) -> bool:
        """Whether the plans are for such an x; the modules before may return anything."""
        if call_reason(x) is not None or x.device != self.plans[0].weight.device:
            return False
        if x.requires_grad and torch.is_grad_enabled():
            return False
        same = compute_dtype(x.dtype, x.device.type) == self.plans[0].usual_dtype
        return same and weights_fit(x.dtype, self.plans[0].weight)

    def run(self, x: Tensor, residual: Tensor | None = None, keep: bool = False) -> Tensor | None:
        """The output for x (N, C, H, W) of any layout, of stock's dtype and, unless `keep`, layout;
        None if x does not fit: stock then runs, or raises the error. residual: what the only plan's
        only unit adds before its activation, of the output's shape."""
        if residual is not None:
            return self._run_with(residual, x)
        cached = self._stages  # read once: another thread may replace it for another shape
        if cached is None or cached[0] != x.shape:
            cached = self._stages = (x.shape, stages_of(self.plans, x.shape))
        return _left(run_stages(cached[1], x), x, keep) if cached[1] else None

    def _run_with(self, residual: Tensor, x: Tensor) -> Tensor | None:
        (plan,) = self.plans
        shapes = plan.shapes(x.shape)
        if not shapes or tuple(residual.shape) != tuple(shapes[-1]):
            return None
        if residual.dtype != output_dtype(x.dtype, x.device.type) or residual.device != x.device:
            return None
        residual = residual.to(plan.dtype).contiguous(memory_format=torch.channels_last)
        return _left(plan.run(*_entered(x, plan), residual), x, keep=True)


def stages_of(plans: Sequence[Plan], shape: Sequence[int]) -> list[_Stage]:
    """The stages and micro-batch sizes for x of this shape; empty if it does not fit."""
    stages: list[_Stage] = []
    for plan in plans:
        shapes = plan.shapes(shape)
        if not shapes:
            return []
        images = N = shapes[0][0]
        # What the chain writes and reads again.
        inside = shapes[plan is plans[0] : len(shapes) - (plan is plans[-1])]
        if plan.weight.device.type == "cpu" and inside:
            _, *size = max(inside, key=math.prod)
            most = _MICRO_BATCH_BYTES // (math.prod(size) * plan.dtype.itemsize)
            images = min(N, max(most, torch.get_num_threads()))
        last = stages[-1].images if stages else 0
        # A new stage concatenates micro-batches, which is a copy: not worth it for fewer than
        # twice as many images.
        if not (last == images or last < images < min(2 * last, N)):
            stages.append(_Stage([], images, []))
        stages[-1].plans.append(plan)
        shape = shapes[-1]
    for group, _, steps in stages:
        steps += steps_of(group)
    return stages


def steps_of(plans: Sequence[Plan]) -> list[Plan | Blocks]:
    """The plans, where the CPU runs consecutive ones of a dtype by one op, together."""
    steps: list[Plan | Blocks] = []
    for (alone, _), group in groupby(plans, key=lambda plan: (plan.one_op is None, plan.dtype)):
        consecutive = list(group)
        steps += consecutive if alone else [Blocks(consecutive)]
    return steps


def run_steps(steps: Sequence[Plan | Blocks], x: Tensor, owned: bool, writes: bool) -> Tensor:
    """The steps one after the other for x (N, C, H, W), entered for the first, which may overwrite
    it if `owned`. writes: whether the others may overwrite copies and results between them."""
    for step in steps:
        if x.dtype != step.dtype and not step.takes_any:
            x, owned = x.to(step.dtype), True
        x, owned = step.run(x, owned and writes), True
    return x


def run_stages(stages: Sequence[_Stage], x: Tensor, writes: bool = True) -> Tensor:
    """Runs x (N, C, H, W): for each micro-batch of the last stage, the stages before it run first
    (recursively), then the plans of the last stage. writes: whether copies and results between
    them may be overwritten."""
    *before, stage = stages
    parts: list[Tensor] = []
    size = -(-len(x) // -(-len(x) // stage.images))  # even parts
    for images in x.split(size) if size < len(x) else (x,):
        if before:
            y, owned = run_stages(before, images, writes), True
        else:
            y, owned = _entered(images, stage.plans[0])
        parts.append(run_steps(stage.steps, y, owned, writes))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def run_plan(plan: Plan, x: Tensor) -> Tensor | None:
    """As `Chain.run`, of one plan."""
    return _left(plan.run(*_entered(x, plan)), x) if plan.shapes(x.shape) else None


def _entered(x: Tensor, plan: Plan) -> tuple[Tensor, bool]:
    """x (N, C, H, W) of any layout and dtype, converted for `plan`, and whether that is a copy."""
    if plan.takes_any:
        return x, False
    converted = x.to(plan.dtype).contiguous(memory_format=torch.channels_last)
    return converted, converted is not x


def _left(y: Tensor, x: Tensor, keep: bool = False) -> Tensor:
    """Converts a plan's output to stock's dtype and, unless `keep`, layout for x. Always another
    tensor: providers may store what they know of an output with it (see kernels/cpu/onednn.py), and
    the caller may write to what it gets."""
    stock_dtype = output_dtype(x.dtype, y.device.type)
    y = y.detach().to(stock_dtype)
    return y if keep else y.contiguous(memory_format=layout.memory_format(x))
