"""Prepares the training step of a block or stem: whether it can be one node of autograd's graph, by
which function, and how running statistics are updated.

The result is used while nothing that it depends on has changed: preparing takes as long as the ops
of a narrow block."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import BatchNorm2d, Conv2d

from fused_resnet import layout
from fused_resnet.fusion import pooling, store
from fused_resnet.fusion.description import (
    Description,
    Names,
    Place,
    Unit,
    attributes_of,
    describe,
)
from fused_resnet.fusion.dtype_rules import norm_fits, output_dtype, serves, weights_fit
from fused_resnet.fusion.fold import scale_and_shift
from fused_resnet.fusion.guard import Guard
from fused_resnet.kernels import registry
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.cache import Entries, cacheable, to_keep
from fused_resnet.kernels.problem import output_shape
from fused_resnet.kernels.training.choice import empty, passes_for
from fused_resnet.kernels.training.native import Native
from fused_resnet.layers.hooks import FSDP
from fused_resnet.layers.norms import is_frozen_bn, recomputing, track, uses_batch_statistics
from fused_resnet.layers.sync_batch_norm import group_of

from . import one_op
from .activation_memory import in_segment
from .block import StepFunction
from .spec import Spec


class _Converted(torch.autograd.Function):
    """x.contiguous(memory_format=...), whose gradient has x's layout, as stock's has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory_format: torch.memory_format) -> Tensor:
        ctx.memory_format = layout.memory_format(x)
        return x.contiguous(memory_format=memory_format)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy.contiguous(memory_format=ctx.memory_format), None


class Prepared(NamedTuple):
    """A training step as one node of autograd's graph, for one shape and dtype of x.

    fused: the arguments of the CPU's ops for whole blocks, or None. tracking: the update of running
    statistics by one op, or None."""

    spec: Spec
    description: Description
    tensors: list[Any]
    memory_format: torch.memory_format  # of the activations
    fused: one_op.Layout | None
    tracking: one_op.Tracking | None

    def run(self, x: Tensor) -> Tensor:
        """The output in the step's dtype and memory format, which the next blocks also use."""
        x = x.to(self.spec.dtype)
        if not x.is_contiguous(memory_format=self.memory_format):
            x = _Converted.apply(x, self.memory_format)
        states: list[Any] = []
        tensors = self.tensors if self.description.survival == 1 else self.scaled()
        if self.fused is not None:
            y = one_op.NativeBlockFunction.apply(self.fused, states, x, *tensors)
        else:
            y = StepFunction.apply(self.spec, states, x, *tensors)
        if not recomputing():
            self.track(states) if self.tracking is None else self.tracking.run(states)
        pool = self.description.pool
        return y if pool is None or self.spec.window is not None else pool(y)

    def scaled(self) -> list[Any]:
        """`tensors`, with stochastic depth's division by `survival` applied to the last ones of the
        main path: the convolution's weight if norms come first, else the norm's parameters."""
        tensors, last = list(self.tensors), 3 * (len(self.description.main) - 1)
        for i in (last,) if self.description.norm_first else (last + 1, last + 2):
            tensors[i] = tensors[i] / self.description.survival
        return tensors

    def track(self, states: list[Any]) -> None:
        """Updates running statistics as BatchNorm2d does; states: as the step's function appended
        them."""
        if self.fused is not None:
            states = [((s,), n) for s, n in zip(states, self.fused.counts, strict=True)]
        for bn, (state, count) in zip(self.description.norms, states, strict=True):
            track(bn, state, count, self.spec.kernels.update_running)


class Step:
    """A block's or stem's training step, prepared for the last input's shape and dtype."""

    def __init__(self, module: nn.Module, description: Description) -> None:
        self.guard = Guard([description], values=False)
        self.holds = self.guard.structure_holds  # weights are written by every step
        self.description = description
        # FSDP gathers other tensors for every step.
        self.is_cached = not any([FSDP in unit.conv.__dict__ for unit in description.units])
        self._synchronised = [n for n in description.norms if type(n) is not BatchNorm2d]
        self._level: str = getattr(module, "activation_memory", "auto")
        self._prepared: tuple[Any, Prepared | None] = (None, None)
        self.packed: Entries = {}  # convolutions of units with frozen norms
        self._folded: dict[Any, tuple[Guard, Tensor, Tensor]] = {}

    def prepared(self, x: Tensor) -> Prepared | None:
        """The step for x; None where it cannot be one node of autograd's graph."""
        # Processes may be joined or left between two steps.
        groups = tuple(map(group_of, self._synchronised))
        key = (x.shape, x.dtype, in_segment.get(), groups)
        cached = self._prepared  # read once: another thread may replace it for another shape
        if cached[0] != key:
            # Inside a segment "minimal" is "low".
            level = "low" if self._level == "minimal" and key[2] else self._level
            cached = self._prepared = (key, prepare(self.description, level, x))
        return cached[1]

    def scale_and_shift(self, unit: Unit, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Those of a frozen norm (see `fold`), kept while its tensors are unchanged, unless they
        require a gradient: a convolution is packed per scale and shift."""
        conv, norm, _ = unit
        tensors = (conv.bias, norm.weight, norm.bias)
        if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]):
            return scale_and_shift(conv, norm, dtype)
        folded = self._folded.get((norm, dtype))
        if folded is None or not folded[0].holds():
            places = [Place({"norm": norm}, "norm", norm, BatchNorm2d)]
            if conv.bias is not None:
                places.append(Place({"conv": conv}, "conv", conv, Conv2d))
            guard = Guard([], places)
            with to_keep():
                folded = (guard, *scale_and_shift(conv, norm, dtype))
            if cacheable(folded[1]) and guard.holds():
                self._folded[norm, dtype] = folded
        return folded[1:]


def step_for(module: nn.Module, names: Names, x: Tensor) -> Step | str:
    """The step of a block or stem for x, cached or made now; or the reason why there is none."""
    key = ("step", *setting(x), attributes_of(module))
    step = store.lookup(module, key)
    if step is not None:
        return step
    description = describe(module, names)
    step = description if isinstance(description, str) else step_of(module, description, x)
    if not isinstance(step, str) and step.is_cached:
        store.insert(module, key, step)
    return step


def step_of(module: nn.Module, description: Description, x: Tensor) -> Step | str:
    """A new step of the description for x; or the reason why there is none. `is_cached` says
    whether later calls may use it. module: has the level of activation memory."""
    if any(unit.conv.weight.device != x.device for unit in description.units):
        return f"x is on {x.device}, a weight is not"
    if not any(serves(uses_batch_statistics(norm), x) for norm in description.norms):
        return "no kernel is faster than stock's operations"
    return Step(module, description)


def setting(x: Tensor) -> tuple[Any, ...]:
    """What a step depends on, other than modules, tensors and x's shape."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    return (
        x.device, x.dtype, output_dtype(x.dtype, device), autocast,
        registry.choose("bn_add_relu", device), registry.forced(),
    )  # fmt: skip


def prepare(description: Description, level: str, x: Tensor) -> Prepared | None:
    """The step for x; None where it cannot be one node of autograd's graph.

    "auto" is "low" where measurements show that it takes no longer: with the CPU's kernels. On a
    GPU "low" recomputes activations but does not write those that a 1x1 convolution normalises as
    it reads (kernels/training/cuda.py); this has not been measured."""
    device = x.device.type
    dtype = output_dtype(x.dtype, device)
    if not trains_whole(description, x.shape, dtype, x.dtype):
        return None
    kernels = passes_for(device)
    if x.shape[0] == 0:
        kernels = empty()
    if level == "auto":
        level = "low" if isinstance(kernels, Native) else "full"
    units, norms = description.units, description.norms
    spec = Spec(
        kernels,
        tuple(description.geometries),
        tuple(norm.eps for norm in norms), description.shortcut, level, dtype,
        tuple(group_of(norm) for norm in norms),
        1 if description.pad is None else description.pad.stride,
        description.shared, description.norm_first,
    )  # fmt: skip
    tensors = [
        t
        for conv, norm, _ in units
        for t in (conv.weight, *((None, None) if norm is None else (norm.weight, norm.bias)))
    ]
    memory_format = torch.channels_last if device == "cpu" else layout.memory_format(x)
    if description.pool is not None:
        spec = spec._replace(window=_window(description, spec, x))
        return Prepared(spec, description, tensors, memory_format, None, None)
    prepared = Prepared(spec, description, tensors, memory_format, None, None)
    fused = one_op.layout_of(spec, tensors, x.shape)
    if fused is None:
        return prepared
    if tensors[-1] is None:
        del tensors[-2:]  # of a projection without a norm
    tracking = one_op.prepare_tracking(norms, fused.counts)
    return prepared._replace(fused=fused, tracking=tracking)


def _window(description: Description, spec: Spec, x: Tensor) -> list[int] | None:
    """Kernel, stride and padding of a stem's pooling where the kernels compute it."""
    pool = description.pool
    if not spec.kernels.pools:
        return None
    conv_shape = output_shape(x.shape, description.units[0].conv.weight.shape, *spec.geometries[0])
    window = [n for sizes in pooling.window(pool) for n in sizes]
    if conv_shape is None or pooling.pool_shape(pool, conv_shape) is None:
        return None
    return window if window[0] * window[1] <= 256 else None  # a tap's index is one byte


def trains_whole(
    description: Description, shape: Any, dtype: torch.dtype, x_dtype: torch.dtype
) -> bool:
    """Whether the block trains as one node: every norm uses batch statistics, every activation is
    a ReLU, and stock would accept every unit's shapes and dtypes."""
    weight = description.units[0].conv.weight
    groups = [group_of(bn) for bn in description.norms]
    synchronised = groups[0] is not None
    if any(unit.activation != Activation.RELU for unit in description.main):
        return False
    if not serves(True, weight) or any(group is not groups[0] for group in groups):
        return False
    if synchronised and weight.device.type != "cpu":
        return False  # PyTorch's SyncBatchNorm handles other devices
    if synchronised:
        shape = (max(1, shape[0]), *shape[1:])  # an empty batch: other processes may have images
    main_shape = tuple(shape)
    projects = description.shortcut == "projection"
    for i, (conv, bn, _) in enumerate(description.units):
        branch = projects and i == len(description.units) - 1
        source = shape if branch else main_shape
        out = output_shape(source, conv.weight.shape, *description.geometries[i])
        if out is None or conv.bias is not None or not weights_fit(x_dtype, conv.weight):
            return False
        if branch and out != main_shape:
            return False
        if bn is not None:
            normed = main_shape if description.norm_first else out
            if normed[0] * normed[2] * normed[3] < 2 and not synchronised:
                return False
            if not uses_batch_statistics(bn) or is_frozen_bn(bn) or normed[1] != bn.num_features:
                return False
            if not bn.eps > 0 or not norm_fits(bn, dtype):
                return False
        main_shape = out
    if description.pad is not None:
        return description.pad.output_shape(shape) == main_shape
    return description.shortcut != "identity" or main_shape == tuple(shape)
