"""A whole network whose every block is fused, with one guard over all of it: little Python runs
between two convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fused_resnet import layout
from fused_resnet.fusion.fit import compute_dtype, output_dtype, weights_fit
from fused_resnet.fusion.members import has_stem, whole
from fused_resnet.fusion.pooling import pool_shape
from fused_resnet.fusion.structure import Guard
from fused_resnet.kernels import cache, native, registry
from fused_resnet.layers.hooks import is_fsdps, patched

from . import plans
from .plan import Flow, Plan, enter, leave
from .stem import run_stem

# Bytes of one activation. A convolution reads one or two and writes one, which a last-level cache
# of 32 MiB should hold; and so much less memory is in use, and asked of the system, at a time.
_AT_ONCE = 8 * 2**20


_pool_state = attrgetter(
    "kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"
)


class _Level(NamedTuple):
    """Blocks in a row that at most `images` images go through together."""

    plans: list[Plan]
    images: int


class Network:
    """The plans of stem and blocks in order, valid while nothing in the whole has changed."""

    def __init__(self, guard: Guard, members: list[Plan], model: Any) -> None:
        self.plans = members
        self._guard = guard
        self._pool = model._modules.get("maxpool")
        self._pool_state = self._pool_now()
        self._generation = plans.generation()
        self._levels: tuple[torch.Size, list[_Level]] | None = None

    def holds(self) -> bool:
        return (
            self._generation == plans.generation()
            and self._pool_now() == self._pool_state
            and self._guard.holds()
        )

    def _pool_now(self) -> Any:
        return None if self._pool is None else _pool_state(self._pool)

    def run(self, model: Any, x: Tensor) -> Tensor | None:
        """What `model.avgpool` gives; None where x does not fit, or a bound is needed and none
        rules out a NaN."""
        kept = self._levels  # read once: another thread may come with another size
        if kept is None or kept[0] != x.shape:
            kept = self._levels = (x.shape, self._find_levels(x.shape))
        levels = kept[1]
        flow = self._through(levels, x) if levels else None
        if flow is None:
            return None
        if x.device.type == "cpu" and averages_all(model.avgpool) and native.load() is None:
            y = torch.ops.fused_resnet_native.mean_pool(flow.x)
            return y.to(output_dtype(x.dtype, "cpu"))
        return model.avgpool(leave(flow.x, x.dtype, layout.memory_format(x)))

    def _find_levels(self, shape: Sequence[int]) -> list[_Level]:
        """For an x of this shape; empty where it does not go through."""
        levels: list[_Level] = []
        for plan in self.plans:
            shapes = plan.shapes(shape)
            if not shapes:
                return []
            N, *size = max(shapes[1:] if plan is self.plans[0] else shapes, key=math.prod)
            images = N
            if plan.weight.device.type == "cpu":
                most = _AT_ONCE // (math.prod(size) * plan.dtype.itemsize)
                images = min(N, max(most, torch.get_num_threads()))
            last = levels[-1].images if levels else 0
            # A batch put together again is a copy: not for a few images more.
            if not (last == images or last < images < min(2 * last, N)):
                levels.append(_Level([], images))
            levels[-1].plans.append(plan)
            shape = shapes[-1]
            if plan is self.plans[0] and self._pool is not None:
                pooled = pool_shape(self._pool, shape)
                if pooled is None:
                    return []
                shape = pooled
        return levels

    def _through(self, levels: Sequence[_Level], x: Tensor) -> Flow | None:
        """x (N, C, H, W) through these levels: the last one takes its images, a part at a time,
        from those before it."""
        *before, level = levels
        parts: list[Flow] = []
        for images in x.split(_evenly(len(x), level.images)):
            flow = self._through(before, images) if before else enter(images, self.plans[0])
            for plan in level.plans:
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


def _evenly(total: int, most: int) -> int:
    """The size of each of the fewest parts of at most `most`."""
    return -(-total // -(-total // most))


def averages_all(pool: Any) -> bool:
    """Whether this module is the mean over all pixels and nothing else."""
    plain = type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1))
    return plain and patched(pool) is None


# model -> (compute dtype, device, backend forced) -> network
_networks: WeakKeyDictionary[nn.Module, dict[Any, Network]] = WeakKeyDictionary()


def network_for(model: Any, dtype: torch.dtype, device: torch.device) -> Network | None:
    """The model as a `Network` for an x of `dtype` on `device`, made now if need be; None: walk."""
    inner = compute_dtype(dtype, device.type)
    kept = _networks.get(model, {})
    key = (inner, device, registry.forced())
    network = None if inner is None else kept.get(key)
    if network is not None:
        if network.holds() and weights_fit(dtype, network.plans[0].weight):
            return network
        _networks.pop(model, None)
    if inner is None or not has_stem(model):
        return None
    if not registry.gpu_kernels(device.type) and (registry.forced() or native.load()):
        return None  # the pooling between the blocks is native's
    found = whole(model)
    if found is None:
        return None
    parts, members = found
    made: list[Plan] = []
    for module, names in members:
        plan = plans.plan_for(module, names, dtype, device)
        if isinstance(plan, str):
            return None
        made.append(plan)
    network = Network(Guard(parts), made, model)
    # What it was made from is the graph's, or FSDP's.
    if cache.capturing(made[0].weight) or any(is_fsdps(conv) for conv, _ in parts.pairs):
        return network
    others = {k: n for k, n in kept.items() if k != key and n.holds()}
    _networks[model] = {**others, key: network}
    return network
