"""Inference of a network whose every block is fused: one guard covers the whole network, so that
little Python runs between two convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fused_resnet import layout
from fused_resnet.fusion.dtype_rules import compute_dtype, weights_fit
from fused_resnet.fusion.members import has_stem, whole
from fused_resnet.fusion.pooling import pool_shape
from fused_resnet.fusion.structure import Guard
from fused_resnet.kernels import cache, native, registry
from fused_resnet.layers.hooks import is_fsdps

from . import plan_cache
from .plan import Flow, Plan, enter, leave
from .stem import run_stem

# Largest activation of a micro-batch on the CPU, in bytes. A convolution reads one or two
# activations and writes one, which should fit a last-level cache of 32 MiB. It also lowers the peak
# memory.
_MICRO_BATCH_BYTES = 8 * 2**20

_pool_state = attrgetter(
    "kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"
)


class _Stage(NamedTuple):
    """Consecutive blocks (not a ResNet stage) that run on micro-batches of at most `images`."""

    plans: list[Plan]
    images: int


class Network:
    """The plans of stem and blocks in order, valid while nothing in the network has changed."""

    def __init__(self, guard: Guard, members: list[Plan], model: Any) -> None:
        self.plans = members
        self._guard = guard
        self._pool = model._modules.get("maxpool")
        self._pool_state = self._current_pool_state()
        self._generation = plan_cache.generation()
        self._stages: tuple[torch.Size, list[_Stage]] | None = None  # of the last input shape

    def holds(self) -> bool:
        return (
            self._generation == plan_cache.generation()
            and self._current_pool_state() == self._pool_state
            and self._guard.holds()
        )

    def _current_pool_state(self) -> Any:
        return None if self._pool is None else _pool_state(self._pool)

    def run(self, model: Any, x: Tensor) -> Tensor | None:
        """The output of `model.avgpool`; None if x does not fit, or if NaN must be ruled out by a
        bound and none does."""
        cached = self._stages  # read once: another thread may replace it for another shape
        if cached is None or cached[0] != x.shape:
            cached = self._stages = (x.shape, self._find_stages(x.shape))
        stages = cached[1]
        flow = self._run_stages(stages, x) if stages else None
        if flow is None:
            return None
        return model.avgpool(leave(flow.x, x.dtype, layout.memory_format(x)))

    def _find_stages(self, shape: Sequence[int]) -> list[_Stage]:
        """The stages and micro-batch sizes for x of this shape; empty if it does not fit."""
        stages: list[_Stage] = []
        for plan in self.plans:
            shapes = plan.shapes(shape)
            if not shapes:
                return []
            N, *size = max(shapes[1:] if plan is self.plans[0] else shapes, key=math.prod)
            images = N
            if plan.weight.device.type == "cpu":
                most = _MICRO_BATCH_BYTES // (math.prod(size) * plan.dtype.itemsize)
                images = min(N, max(most, torch.get_num_threads()))
            last = stages[-1].images if stages else 0
            # A new stage concatenates micro-batches, which is a copy: not worth it for fewer than
            # twice as many images.
            if not (last == images or last < images < min(2 * last, N)):
                stages.append(_Stage([], images))
            stages[-1].plans.append(plan)
            shape = shapes[-1]
            if plan is self.plans[0] and self._pool is not None:
                pooled = pool_shape(self._pool, shape)
                if pooled is None:
                    return []
                shape = pooled
        return stages

    def _run_stages(self, stages: Sequence[_Stage], x: Tensor) -> Flow | None:
        """Runs x (N, C, H, W): for each micro-batch of the last stage, the stages before it run
        first (recursively), then the blocks of the last stage."""
        *before, stage = stages
        parts: list[Flow] = []
        for images in x.split(_even_size(len(x), stage.images)):
            flow = self._run_stages(before, images) if before else enter(images, self.plans[0])
            for plan in stage.plans:
                if plan is self.plans[0] and self._pool is not None:
                    flow = None if flow is None else run_stem(plan, self._pool, flow)
                else:
                    flow = None if flow is None else plan.run(flow)
            if flow is None:
                return None
            parts.append(flow)
        if len(parts) == 1:
            return parts[0]
        bounds = [part.bound for part in parts if part.bound is not None]
        bound = max(bounds) if len(bounds) == len(parts) else None
        return Flow(torch.cat([part.x for part in parts]), bound, True)


def _even_size(total: int, most: int) -> int:
    """The part size when `total` is split evenly into the fewest parts of at most `most`."""
    return -(-total // -(-total // most))


# model -> (compute dtype, device, forced backend) -> network
_networks: WeakKeyDictionary[nn.Module, dict[Any, Network]] = WeakKeyDictionary()


def network_for(model: Any, dtype: torch.dtype, device: torch.device) -> Network | None:
    """The model's `Network` for an x of `dtype` on `device`, cached or built now; None if not
    everything in it is fused: use a `Walk`."""
    conv_dtype = compute_dtype(dtype, device.type)
    cached = _networks.get(model, {})
    key = (conv_dtype, device, registry.forced())
    network = None if conv_dtype is None else cached.get(key)
    if network is not None:
        if network.holds() and weights_fit(dtype, network.plans[0].weight):
            return network
        _networks.pop(model, None)
    if conv_dtype is None or not has_stem(model):
        return None
    if not registry.gpu_kernels(device.type) and (registry.forced() or native.load()):
        return None  # on the CPU the pooling after the stem runs in the native extension
    parsed = whole(model)
    if parsed is None:
        return None
    parts, members = parsed
    member_plans: list[Plan] = []
    for module, names in members:
        plan = plan_cache.plan_for(module, names, dtype, device)
        if isinstance(plan, str):
            return None
        member_plans.append(plan)
    network = Network(Guard(parts), member_plans, model)
    # During capture the packed weights belong to the graph's memory pool; FSDP rewrites weights
    # without changing their version counters.
    if cache.capturing(member_plans[0].weight) or any(is_fsdps(conv) for conv, _ in parts.pairs):
        return network
    others = {k: n for k, n in cached.items() if k != key and n.holds()}
    _networks[model] = {**others, key: network}
    return network
