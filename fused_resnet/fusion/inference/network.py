"""Inference of a whole network by one plan: one guard covers everything that is fused in it, so
that little Python runs between two convolutions.

Consecutive fused members are a chain, in which activations stay channels_last in the compute dtype.
They are converted to stock's dtype and layout only where a module that is not fused reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet import layout
from fused_resnet.fusion import store
from fused_resnet.fusion.call import call_reason
from fused_resnet.fusion.dtype_rules import compute_dtype, output_dtype, weights_fit
from fused_resnet.fusion.guard import Guard
from fused_resnet.fusion.network import Member, NetworkNames, members_of
from fused_resnet.kernels import registry

from .make import plan_for
from .plan import Blocks, Plan, enter, leave

# Largest activation of a micro-batch on the CPU, in bytes. A convolution reads one or two
# activations and writes one, which should fit a last-level cache of 32 MiB. It also lowers the peak
# memory.
_MICRO_BATCH_BYTES = 8 * 2**20


class _Stage(NamedTuple):
    """Consecutive plans (not a ResNet stage) that run on micro-batches of at most `images`, and how
    they run: by one op where that supports them."""

    plans: list[Plan]
    images: int
    steps: list[Plan | Blocks]


class _Chain:
    """Consecutive fused members."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.plans: list[Plan] = []
        self._stages: tuple[torch.Size, list[_Stage]] | None = None  # of the last input shape

    def accepts(self, x: Tensor) -> bool:
        """Whether the plans are for such an x; the modules before may return anything."""
        if call_reason(x) is not None or x.device != self.plans[0].weight.device:
            return False
        if x.requires_grad and torch.is_grad_enabled():
            return False
        same = compute_dtype(x.dtype, x.device.type) == self.plans[0].dtype
        return same and weights_fit(x.dtype, self.plans[0].weight)

    def run(self, x: Tensor) -> Tensor | None:
        """x of stock's dtype and any layout -> channels_last in the compute dtype; None if x does
        not fit: stock then runs, or raises the error."""
        cached = self._stages  # read once: another thread may replace it for another shape
        if cached is None or cached[0] != x.shape:
            cached = self._stages = (x.shape, self._find_stages(x.shape))
        return _run_stages(cached[1], x) if cached[1] else None

    def _find_stages(self, shape: Sequence[int]) -> list[_Stage]:
        """The stages and micro-batch sizes for x of this shape; empty if it does not fit."""
        stages: list[_Stage] = []
        for plan in self.plans:
            shapes = plan.shapes(shape)
            if not shapes:
                return []
            N, *size = max(shapes, key=math.prod)
            images = N
            if plan.weight.device.type == "cpu":
                most = _MICRO_BATCH_BYTES // (math.prod(size) * plan.dtype.itemsize)
                images = min(N, max(most, torch.get_num_threads()))
            last = stages[-1].images if stages else 0
            # A new stage concatenates micro-batches, which is a copy: not worth it for fewer than
            # twice as many images.
            if not (last == images or last < images < min(2 * last, N)):
                stages.append(_Stage([], images, []))
            stages[-1].plans.append(plan)
            shape = shapes[-1]
        for plans, _, steps in stages:
            for alone, group in groupby(plans, key=lambda plan: plan.one_op is None):
                consecutive = list(group)
                steps += consecutive if alone else [Blocks(consecutive)]
        return stages


def _run_stages(stages: Sequence[_Stage], x: Tensor) -> Tensor:
    """Runs x (N, C, H, W): for each micro-batch of the last stage, the stages before it run first
    (recursively), then the plans of the last stage."""
    *before, stage = stages
    parts: list[Tensor] = []
    size = -(-len(x) // -(-len(x) // stage.images))  # even parts
    for images in x.split(size) if size < len(x) else (x,):
        if before:
            y, owned = _run_stages(before, images), True
        else:
            y, owned = enter(images, stage.plans[0])
        for step in stage.steps:
            y, owned = step.run(y, owned), True
        parts.append(y)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Network:
    """The chains of plans of a network and the modules between them, valid while `guard` holds."""

    def __init__(self, model: Any, names: NetworkNames, x: Tensor) -> None:
        self.generation = store.generation()
        stem, stages, places = members_of(model, names)
        self.segments: list[_Chain | Member] = []
        self.plans: list[Plan] = []
        for member in (stem, *chain.from_iterable(stages)):
            plan: Plan | str = "not a block"
            if member.names is not None:
                plan = plan_for(member.module(model), member.names, x.dtype, x.device)
            last = self.segments[-1] if self.segments else None
            if isinstance(plan, Plan):
                if not isinstance(last, _Chain):
                    last = _Chain()
                    self.segments.append(last)
                last.plans.append(plan)
                last.members.append(member)
                self.plans.append(plan)
                pool = member.names.pool if member.names else None
                if pool is not None and not plan.pools:
                    assert isinstance(stem.target, tuple)
                    last.members[0] = stem._replace(target=stem.target[:-1])
                    self.segments.append(Member((pool,), None))
            else:
                self.segments.append(member)
        self.guard = Guard.combined([Guard([], places), *(plan.guard for plan in self.plans)])
        self.holds = self.guard.holds

    def run(self, model: Any, names: NetworkNames, x: Tensor) -> Tensor:
        """The output of `model.avgpool`, for x (N, C, H, W) of any layout."""
        for segment in self.segments:
            if isinstance(segment, Member):
                x = segment.call(model, x)
                continue
            fits = segment is self.segments[0] or segment.accepts(x)
            y = segment.run(x) if fits else None
            if y is None:
                for member in segment.members:
                    x = member.call(model, x)
            else:
                x = leave(y, x.dtype, layout.memory_format(x))
        if names.norm is not None:
            norm, relu = names.norm
            x = getattr(model, relu)(getattr(model, norm)(x))
        return model.avgpool(x)


def run_network(model: Any, names: NetworkNames, x: Tensor) -> Tensor:
    """The network's logits (N, classes), by its plan, cached or made now."""
    kind = x.device.type
    # Autocast also decides which weights stock accepts.
    autocast = torch.is_autocast_enabled(kind)
    dtypes = x.dtype, output_dtype(x.dtype, kind), autocast
    key = ("network", *dtypes, x.device, registry.forced())
    network = store.lookup(model, key)
    if network is None or network.generation != store.generation():
        network = Network(model, names, x)
        if all(plan.is_cached for plan in network.plans) and network.holds():
            store.insert(model, key, network)
    return model.fc(torch.flatten(network.run(model, names, x), 1))
