"""Prepares the training step of a block or stem: whether it can be one node of autograd's graph, by
which function, and how running statistics are updated.

The result is used while nothing that it depends on has changed: preparing takes as long as the ops
of a narrow block."""

from __future__ import annotations

from collections.abc import Callable
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
from fused_resnet.fusion.guard import Guard
from fused_resnet.kernels import registry
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.cache import Entries, cacheable, to_keep
from fused_resnet.kernels.training.choice import empty, passes_for
from fused_resnet.kernels.training.native import Native, in_layout
from fused_resnet.layers.hooks import FSDP
from fused_resnet.layers.norms import (
    DEFAULT_EPS,
    is_frozen_bn,
    postpones,
    recomputing,
    track,
    uses_batch_statistics,
)
from fused_resnet.layers.released import restore_all
from fused_resnet.layers.sync_batch_norm import group_of
from fused_resnet.ops.conv_norm_relu import fold_norm

from . import one_op
from .activation_memory import in_segment
from .block import StepFunction
from .fixed import Fixed, FixedFunction
from .spec import Spec

Fold = tuple[Tensor | None, Tensor | None]  # scale and shift


class _Converted(torch.autograd.Function):
    """x.contiguous(memory_format=...), whose gradient has x's layout, as stock's has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory_format: torch.memory_format) -> Tensor:
        ctx.memory_format = layout.memory_format(x)
        return in_layout(x, memory_format)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        if torch._C._functorch.is_legacy_batchedtensor(dy):  # of is_grads_batched
            return dy.contiguous(), None
        return layout.exactly(in_layout(dy, ctx.memory_format), ctx.memory_format), None


def converted(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """x, or a differentiable copy of it, dense in this layout."""
    if x.is_contiguous(memory_format=memory_format) and not (x.requires_grad and _one_pixel(x)):
        return x
    return _Converted.apply(x, memory_format)


def _one_pixel(x: Tensor) -> bool:
    """Whether x is dense in both layouts with the strides of contiguous, which its gradient has in
    stock too; that of a channels_last node would have other strides."""
    return x.dim() == 4 and x.shape[1] > 1 and x.shape[2:].numel() == 1 and x.stride(3) == 1


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
        x = converted(x.to(self.spec.dtype), self.memory_format)
        states: list[Any] = []
        tensors = self.tensors if self.description.survival == 1 else self.scaled()
        if self.fused is not None:
            y = one_op.NativeBlockFunction.apply(self.fused, states, x, *tensors)
        else:
            y = StepFunction.apply(self.spec, states, x, *tensors)
        if not recomputing():
            if self.tracking is None or postpones():
                self.track(states)
            else:
                self.tracking.run(states)
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


class PreparedFixed(NamedTuple):
    """The same for a block without batch statistics: see `fixed`."""

    spec: Fixed
    description: Description
    folded: Callable[[torch.dtype], list[Fold]]
    extra: int  # outputs of a lone convolution that are computed and dropped

    def run(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The output, channels_last. residual: (N, K, P, Q) of the step's dtype."""
        folded = self.folded(torch.float32)
        units = zip(self.description.units, folded, strict=True)
        tensors: list[Any] = [t for unit, fold in units for t in (unit.conv.weight, *fold)]
        last, K = torch.channels_last, tensors[0].shape[0]
        x = converted(x.to(self.spec.dtype), last)
        residual = None if residual is None else converted(residual, last)
        if self.extra:
            tensors = [None if t is None else _extended(t, self.extra) for t in tensors]
        y = FixedFunction.apply(self.spec, x, residual, *tensors)
        if self.extra:  # a copy: what is flattened later must not show the outputs that are dropped
            y = y[:, :K].clone(memory_format=last)
        pool = self.description.pool
        return y if pool is None else pool(y)


def _extended(t: Tensor, extra: int) -> Tensor:
    """t (K, ...) with `extra` zeros (K + extra, ...)."""
    return torch.cat([t, t.new_zeros((extra, *t.shape[1:]))])


def _extra_outputs(description: Description) -> int:
    """How many outputs a lone convolution lacks to a multiple of the kernels' 16: few scores, as
    those of a detector's anchors, are computed faster with zeros than by PyTorch."""
    return -description.units[0].conv.out_channels % 16 if len(description.units) == 1 else 0


class Step:
    """A block's or stem's training step, prepared for the last input's shape and dtype."""

    def __init__(self, module: nn.Module, description: Description) -> None:
        restore_all(unit.conv.weight for unit in description.units)
        self.guard = Guard([description], values=False)
        self.holds = self.guard.structure_holds  # weights are written by every step
        self.description = description
        # FSDP gathers other tensors for every step.
        self.is_cached = not any([FSDP in unit.conv.__dict__ for unit in description.units])
        self._synchronised = [n for n in description.norms if type(n) is not BatchNorm2d]
        self._level: str = getattr(module, "activation_memory", "auto")
        self._prepared: tuple[Any, Prepared | PreparedFixed | None] = (None, None)
        self.packed: Entries = {}  # convolutions of units with frozen norms
        self._folded: dict[torch.dtype, tuple[Guard, list[Fold]]] = {}

    def prepared(
        self, x: Tensor, residual: Tensor | None = None
    ) -> Prepared | PreparedFixed | None:
        """The step for x and what is added to its output; None where it cannot be one node of
        autograd's graph."""
        # Processes may be joined or left between two steps.
        groups = tuple(map(group_of, self._synchronised))
        added = None if residual is None else (residual.shape, residual.dtype)
        key = (x.shape, x.dtype, in_segment.get(), groups, added)
        cached = self._prepared  # read once: another thread may replace it for another shape
        if cached[0] != key:
            # Inside a segment "minimal" is "low".
            level = "low" if self._level == "minimal" and key[2] else self._level
            found: Any = prepare_fixed(self, x, added)
            if found is None and added is None:
                found = prepare(self.description, level, x)
            cached = self._prepared = (key, found)
        return cached[1]

    def folded(self, dtype: torch.dtype) -> list[Fold]:
        """Scale and shift of every unit with a frozen norm (see `fold`), kept while their tensors
        are unchanged, unless these require a gradient: a convolution is packed per scale and shift.
        Without a norm, None and the convolution's bias; None, None for batch statistics."""
        units = self.description.units
        trained = [unit.norm is None or _is_trained(unit) for unit in units]
        if all(trained):
            return [_fold(unit, dtype) for unit in units]
        folded = self._folded.get(dtype)
        if folded is None or not folded[0].holds():
            places = [
                Place({"": m}, "", m, kind)
                for conv, norm, _ in units
                if _is_frozen(norm)
                for m, kind in ((norm, BatchNorm2d), (conv, Conv2d))
                if m is norm or conv.bias is not None
            ]
            guard = Guard([], places)
            with to_keep():
                folded = (guard, [_fold(unit, dtype) for unit in units])
            if cacheable(units[0].conv.weight) and guard.holds():
                self._folded[dtype] = folded
        return [
            _fold(unit, dtype) if now else kept
            for unit, now, kept in zip(units, trained, folded[1], strict=True)
        ]


def _is_frozen(norm: Any) -> bool:
    """Whether this is a norm by running statistics."""
    if norm is None or uses_batch_statistics(norm):
        return False
    return norm.running_mean is not None and norm.running_var is not None


def _is_trained(unit: Unit) -> bool:
    """Whether what is folded, besides statistics, requires a gradient."""
    conv, norm, _ = unit
    tensors = (conv.bias, norm.weight, norm.bias)
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def _fold(unit: Unit, dtype: torch.dtype) -> Fold:
    conv, norm, _ = unit
    if norm is None:
        return None, None if conv.bias is None else conv.bias.to(dtype).contiguous()
    if not _is_frozen(norm):
        return None, None
    eps = getattr(norm, "eps", DEFAULT_EPS)
    statistics = norm.running_mean, norm.running_var
    return fold_norm(conv.bias, norm.weight, norm.bias, *statistics, eps, dtype)


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
    reason = reason_against_step(description, x)
    return Step(module, description) if reason is None else reason


def reason_against_step(description: Description, x: Tensor) -> str | None:
    """Why the description has no step for x, of which only dtype and device are read; None if it
    has one."""
    if any(unit.conv.weight.device != x.device for unit in description.units):
        return f"x is on {x.device}, a weight is not"
    if not description.norm_first and len(description.norms) < len(description.units):
        if any(map(uses_batch_statistics, description.norms)):
            return "in training a convolution is fused with its norm"
        return reason_against_fixed(description, x)
    if not any(serves(uses_batch_statistics(norm), x) for norm in description.norms):
        return "no kernel is faster than stock's operations"
    return None


def reason_against_fixed(description: Description, x: Tensor) -> str | None:
    """Why the CPU's kernels do not compute such a step without batch statistics; None if they
    do."""
    device, dtype = x.device.type, output_dtype(x.dtype, x.device.type)
    kernels = passes_for(device)
    if registry.choose("conv_bn_relu", device) != "native" or not isinstance(kernels, Native):
        return "in training a convolution is fused with its norm"
    for *_, activation in description.units:
        if activation not in kernels.activations:
            return f"no kernel for the gradient of {activation.name}"
    extra = _extra_outputs(description)
    for (conv, *_), g in zip(description.units, description.geometries, strict=True):
        K, *rest = conv.weight.shape
        weight = conv.weight.new_empty((K + extra, *rest), device="meta")
        for work in ("convolution", "input_gradient", "weight_gradient"):
            if not kernels.supports(weight, dtype, g, work):
                return f"no kernel for its {work.replace('_', ' ')}"
    return None


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
    shapes = description.output_shapes(x.shape)
    normed = [x.shape, *shapes] if spec.norm_first else shapes
    fused = one_op.layout_of(spec, tensors, [float(N * H * W) for N, _, H, W in normed])
    if fused is None:
        return prepared
    if tensors[-1] is None:
        del tensors[-2:]  # of a projection without a norm
    tracking = one_op.prepare_tracking(norms, fused.counts)
    return prepared._replace(fused=fused, tracking=tracking)


def prepare_fixed(step: Step, x: Tensor, added: tuple[Any, ...] | None) -> PreparedFixed | None:
    """The step for x where no norm uses batch statistics; None where the CPU's kernels do not
    compute it. added: shape and dtype of a residual, or None."""
    description, device = step.description, x.device.type
    dtype = output_dtype(x.dtype, device)
    if description.norm_first or description.survival != 1 or 0 in x.shape:
        return None
    kernels: Any = passes_for(device)
    if reason_against_fixed(description, x) is not None:
        return None

    def fits(conv: Any, norm: Any, normed: Any) -> bool:
        return norm is None or (_is_frozen(norm) and norm_fits(norm, dtype))

    shape = _output_shape(description, x.shape, x.dtype, fits)
    if shape is None or (added is not None and added != (shape, dtype)):
        return None
    extra = _extra_outputs(description)
    if extra and added is not None:
        return None
    spec = Fixed(
        kernels, tuple(description.geometries),
        tuple(unit.activation for unit in description.units), description.shortcut, dtype,
        1 if description.pad is None else description.pad.stride,
    )  # fmt: skip
    return PreparedFixed(spec, description, step.folded, extra)


def _window(description: Description, spec: Spec, x: Tensor) -> list[int] | None:
    """Kernel, stride and padding of a stem's pooling where the kernels compute it."""
    pool = description.pool
    if not spec.kernels.pools:
        return None
    window = [n for sizes in pooling.window(pool) for n in sizes]
    shapes = description.output_shapes(x.shape)
    if not shapes or pooling.pool_shape(pool, shapes[0]) is None:
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

    def fits(conv: Any, bn: Any, normed: Any) -> bool:
        if bn is None or conv.bias is not None:
            return conv.bias is None and description.norm_first
        if normed[0] * normed[2] * normed[3] < 2 and not synchronised:
            return False
        if not uses_batch_statistics(bn) or is_frozen_bn(bn) or normed[1] != bn.num_features:
            return False
        return bn.eps > 0 and norm_fits(bn, dtype)

    return _output_shape(description, shape, x_dtype, fits) is not None


def shape_after(description: Description, shape: Any, dtype: torch.dtype) -> tuple[int, ...] | None:
    """The shape of a block's output, before pooling, for an x of this shape and dtype; None if
    stock would not accept it."""
    return _output_shape(description, shape, dtype, lambda *_: True)


def _output_shape(
    description: Description, shape: Any, x_dtype: torch.dtype, fits: Callable[..., bool]
) -> tuple[int, ...] | None:
    """The shape of a block's output for an input of `shape`, if stock would accept the shapes and
    dtypes of every unit; None if not, or if a unit does not fit: fits(conv, norm, shape of the
    norm's input)."""
    shapes = description.output_shapes(shape)
    normed = [tuple(shape), *shapes] if description.norm_first else shapes
    for (conv, bn, _), norm_shape in zip(description.units, normed, strict=False):
        if not weights_fit(x_dtype, conv.weight) or not fits(conv, bn, norm_shape):
            return None
    return shapes[len(description.main) - 1] if shapes else None
