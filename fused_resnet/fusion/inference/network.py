"""A whole network's inference: activations stay in the fused blocks' own layout from stem to pool.

Two ways. `Network` is for a network whose every block is fused: one guard over all of it, so that
little Python runs between two convolutions. `_Walk` is for any other: block by block, converting
to what stock would have wherever a module that is not fused must see the activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fused_resnet import layout
from fused_resnet.fusion import blocks
from fused_resnet.fusion.blocks import FORWARDS, call_reason, enter, leave, wants_grad
from fused_resnet.fusion.pooling import is_plain, pool_shape, window
from fused_resnet.fusion.structure import (
    STEM,
    Guard,
    Names,
    Parts,
    Place,
    is_fsdps,
    patched,
    take_apart,
)
from fused_resnet.fusion.training import activation_memory
from fused_resnet.kernels import backends, convolution, native
from fused_resnet.kernels.cuda.convolution import GpuConv

from . import plans
from .plans import Flow, Plan

_STAGES = ("layer1", "layer2", "layer3", "layer4")
# Bytes of one activation. A convolution reads one or two and writes one, which a last-level cache
# of 32 MiB should hold; and so much less memory is in use, and asked of the system, at a time.
_AT_ONCE = 8 * 2**20
_pool_state = attrgetter(
    "kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"
)


def run_resnet(model: Any, x: Tensor) -> Tensor | None:
    """A whole network's inference (N, classes), fused where it can be, or None: run torchvision's.

    x: (N, C, H, W) of any layout. Only plans are used here; without one for the stem, each block
    decides for itself as torchvision's path comes to it.
    """
    if model.training or call_reason(x) is not None or wants_grad(model, x):
        return None
    network = _network_for(model, x.dtype, x.device)
    pooled = None if network is None else network.run(model, x)
    if pooled is not None:
        return model.fc(torch.flatten(pooled, 1))
    walk = _Walk(x)
    pool = model._modules.get("maxpool")
    if not _has_stem(model):
        walk.call(model.conv1)
    elif not walk.fused(model, STEM):
        return None
    elif pool is not None and not walk.max_pool(pool):
        walk.call(pool)
    for stage in _stages(model):
        walk.stage(stage)
    return head(model, walk.leave())


def _has_stem(model: Any) -> bool:
    """Whether norm and ReLU follow the first convolution at once."""
    return "bn1" in model._modules


def _stages(model: Any) -> list[Any]:
    return [model._modules[name] for name in _STAGES if name in model._modules]


def enter_stages(model: Any, x: Tensor) -> Tensor:
    """What a network's first stage reads, by whichever path takes it."""
    return blocks.stem_and_pool(model, x) if _has_stem(model) else model.conv1(x)


def head(model: Any, x: Tensor) -> Tensor:
    """The last stage's output (N, C, H, W) -> (N, classes)."""
    if not _has_stem(model):
        y = blocks.run_norm(model.bn, model.relu, x)
        x = model.relu(model.bn(x)) if y is None else y
    return model.fc(torch.flatten(model.avgpool(x), 1))


def run_in_segments(model: Any, x: Tensor) -> Tensor | None:
    """A network's forward (N, classes) that keeps the inputs of segments of blocks alone, where its
    activation memory is "minimal"; None where it is not, or where running a segment once more would
    count or call something twice: hooks, or norms that PyTorch has to compute."""
    if getattr(model, "activation_memory", "auto") != "minimal":
        return None
    if call_reason(x, model.training) is not None or not wants_grad(model, x):
        return None
    whole = _whole(model)
    if whole is None or not blocks.counts_once(whole[0], x):
        return None
    if _has_stem(model):
        y = activation_memory.run_segment(
            partial(blocks.stem_and_pool, model), x, [model.conv1, model.bn1]
        )
    else:
        y = model.conv1(x)
    running = model.running() if hasattr(model, "running") else map(list, _stages(model))
    return head(model, activation_memory.run_stages(list(running), y))


# --- every block fused ----------------------------------------------------------------------------


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
            return y.to(plans.output_dtype(x.dtype, "cpu"))
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


def _network_for(model: Any, dtype: torch.dtype, device: torch.device) -> Network | None:
    """The model as a `Network` for an x of `dtype` on `device`, made now if need be; None: walk."""
    inner = plans.compute_dtype(dtype, device.type)
    kept = _networks.get(model, {})
    key = (inner, device, backends.forced())
    network = None if inner is None else kept.get(key)
    if network is not None:
        if network.holds() and plans.weights_fit(dtype, network.plans[0].weight):
            return network
        _networks.pop(model, None)
    if inner is None or not _has_stem(model):
        return None
    if not backends.gpu_kernels(device.type) and (backends.forced() or native.load()):
        return None  # the pooling between the blocks is native's
    found = _whole(model)
    if found is None:
        return None
    whole, members = found
    made: list[Plan] = []
    for module, names in members:
        plan = plans.plan_for(module, names, dtype, device)
        if isinstance(plan, str):
            return None
        made.append(plan)
    network = Network(Guard(whole), made, model)
    # What it was made from is the graph's, or FSDP's.
    if convolution.capturing(made[0].weight) or any(is_fsdps(conv) for conv, _ in whole.pairs):
        return network
    others = {k: n for k, n in kept.items() if k != key and n.holds()}
    _networks[model] = {**others, key: network}
    return network


def _whole(model: Any) -> tuple[Parts, list[tuple[nn.Module, Names]]] | None:
    """Stem, pool, stages and blocks as one set of parts, and what plans are made for."""
    members: list[tuple[nn.Module, Names]] = [(model, STEM)] if _has_stem(model) else []
    places = []
    if "maxpool" in model._modules:
        places.append(Place(model._modules, "maxpool", model.maxpool, nn.MaxPool2d))
    for name in [name for name in _STAGES if name in model._modules]:
        stage = model._modules[name]
        places.append(Place(model._modules, name, stage, nn.Sequential))
        if type(stage) is not nn.Sequential:
            return None
        for key, block in stage._modules.items():
            names = FORWARDS.get(type(block).forward)
            if names is None:
                return None
            places.append(Place(stage._modules, key, block, type(block)))
            members.append((block, names))
    if [type(p.part) for p in places] != [p.kind for p in places]:
        return None
    if any(patched(p.part) is not None for p in places):
        return None
    pairs = []
    for module, names in members:
        parts = take_apart(module, names)
        if isinstance(parts, str):
            return None
        pairs += parts.pairs
        places += parts.places
    return Parts(pairs, "none", places), members


# --- block by block -------------------------------------------------------------------------------


class _Walk:
    """One inference, block by block: between fused blocks nothing is converted back."""

    def __init__(self, x: Tensor) -> None:
        self._plain: Tensor | None = x  # the activation as stock would have it, or None
        self._flow: Flow | None = None  # the same between fused blocks, or None
        self._outside = (x.dtype, layout.memory_format(x))  # what was last seen as stock has it

    def leave(self) -> Tensor:
        """The activation as stock would have it here."""
        if self._plain is None:
            assert self._flow is not None
            self._plain, self._flow = leave(self._flow.x, *self._outside), None
        return self._plain

    def call(self, module: Callable[[Tensor], Tensor]) -> None:
        """A module of any kind, on the activation as stock would have it."""
        self._plain = module(self.leave())

    def fused(self, module: nn.Module, names: Names) -> bool:
        """`module` by its plan; False where it has none for this activation."""
        flow = self._flow
        if flow is None:
            x = self.leave()
            if call_reason(x) is not None:
                return False
            self._outside = (x.dtype, layout.memory_format(x))
        device = flow.x.device if flow is not None else self.leave().device
        plan = plans.plan_for(module, names, self._outside[0], device)
        if isinstance(plan, str):
            return False
        if flow is None:
            flow = enter(x, plan)
        after = plan.run(flow) if plan.shapes(flow.x.shape) else None
        if after is None:
            return False
        self._plain, self._flow = None, after
        return True

    def max_pool(self, pool: nn.Module) -> bool:
        """`pool` by this package's kernel; False where it is something else."""
        if self._flow is None or not is_plain(pool):
            return False
        gpu = backends.gpu_kernels(self._flow.x.device.type)
        if not gpu and (native.load() is not None or backends.forced() is not None):
            return False
        after = max_pool(pool, self._flow)
        if after is not None:
            self._flow = after
        return after is not None

    def stage(self, stage: nn.Module) -> None:
        if type(stage) is not nn.Sequential or patched(stage) is not None:
            self.call(stage)
            return
        for block in stage:
            names = FORWARDS.get(type(block).forward)
            plain = names is None or patched(block) is not None
            if plain or names is None or not self.fused(block, names):
                self.call(block)


def max_pool(pool: Any, flow: Flow) -> Flow | None:
    """`pool` on a fused activation; None where the kernel does not do what is asked."""
    if pool_shape(pool, flow.x.shape) is None:
        return None
    kernel, stride, padding = window(pool)
    gpu = backends.gpu_kernels(flow.x.device.type)
    run = torch.max_pool2d if gpu else torch.ops.fused_resnet_native.max_pool2d
    y = run(flow.x, kernel, stride, padding)
    return Flow(y, flow.bound, True)


def run_stem(plan: Plan, pool: Any, flow: Flow) -> Flow | None:
    """The stem and the pooling behind it: by one kernel where there is one."""
    (conv,) = plan.convs
    plain = window(pool) == [[3, 3], [2, 2], [1, 1]] and pool_shape(
        pool, plan.shapes(flow.x.shape)[-1]
    )
    if plain and isinstance(conv, GpuConv) and conv.pools(flow.x):
        return Flow(conv.run_pooled(flow.x), None, True)
    after = plan.run(flow)
    return None if after is None else max_pool(pool, after)
