"""Prepares a block's training step: whether it can be one node of autograd's graph, by which
function, and how running statistics are updated.

The result is cached per block and used while nothing that it depends on has changed: preparing
takes as long as the ops of a narrow block."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fused_resnet import layout
from fused_resnet.fusion.dtype_rules import norm_fits, output_dtype, serves, weights_fit
from fused_resnet.fusion.structure import Names, Parts, Structure
from fused_resnet.kernels import registry
from fused_resnet.kernels.problem import output_shape
from fused_resnet.kernels.training.choice import empty, passes_for
from fused_resnet.kernels.training.native import Native
from fused_resnet.kernels.training.protocol import Geometry
from fused_resnet.layers.norms import is_frozen_bn, recomputing, track, uses_batch_statistics
from fused_resnet.layers.sync_batch_norm import group_of

from . import one_op
from .activation_memory import level_of
from .block import BlockFunction
from .preact import PreactFunction
from .spec import Spec


class Prepared(NamedTuple):
    """A prepared training step. fused: the arguments of the CPU's ops for whole blocks, or None."""

    spec: Spec
    parts: Parts
    norm_first: bool
    memory_format: torch.memory_format  # of the activations
    survival: float
    fused: one_op.Layout | None

    def tensors(self) -> list[Any]:
        """Convolution weight, norm weight and bias of each convolution, None where absent.

        Stochastic depth's division by `survival` is applied to the last tensors of the main path:
        the convolution's weight if norms come first, else the norm's weight and bias."""
        tensors = [
            t
            for conv, bn in self.parts.pairs
            for t in (conv.weight, *((bn.weight, bn.bias) if bn is not None else (None, None)))
        ]
        if self.survival < 1:
            last = 3 * (len(self.parts.main) - 1)
            for i in (last,) if self.norm_first else (last + 1, last + 2):
                tensors[i] = tensors[i] / self.survival
        return tensors

    def enter(self, x: Tensor) -> Tensor:
        """x in the dtype and memory format that the kernels require."""
        return x.to(self.spec.dtype).contiguous(memory_format=self.memory_format)

    def run(self, x: Tensor) -> Tensor:
        """The block's output, in the step's dtype and memory format."""
        states: list[Any] = []
        function: Any = one_op.NativeBlockFunction
        description: Any = self.fused
        tensors = self.tensors()
        if description is None:
            function = PreactFunction if self.norm_first else BlockFunction
            description = self.spec
        elif tensors[-1] is None:
            del tensors[-2:]  # of a projection without a norm
        y = function.apply(description, states, self.enter(x), *tensors)
        self.track(states)
        return y

    def track(self, states: list[Any]) -> None:
        """Updates running statistics as BatchNorm2d does; states: (statistics, number of values per
        channel) of each norm."""
        if recomputing.get():
            return
        norms = self.parts.norms
        if self.fused is None or not one_op.track(norms, states):
            for bn, (state, count) in zip(norms, states, strict=True):
                track(bn, state, count, self.spec.kernels.update_running)


def prepare(module: Any, names: Names, parts: Parts, x: Tensor) -> Prepared | None:
    """The block's training step; None where it cannot be one node of autograd's graph.

    "auto" is "low" where measurements show that it takes no longer: with the CPU's kernels. On a
    GPU "low" recomputes activations but does not write those that a 1x1 convolution normalises as
    it reads (kernels/training/cuda.py); this has not been measured."""
    device = x.device.type
    dtype = output_dtype(x.dtype, device)
    if not trains_whole(parts, names, x.shape, dtype, x.dtype):
        return None
    kernels = passes_for(device)
    if x.shape[0] == 0:
        kernels = empty()
    level = level_of(module)
    if level == "auto":
        level = "low" if isinstance(kernels, Native) else "full"
    geometries = tuple(
        Geometry(conv.stride, conv.padding, conv.dilation, conv.groups) for conv, _ in parts.pairs
    )
    spec = Spec(
        kernels, geometries, tuple(bn.eps for bn in parts.norms), parts.shortcut,
        level, dtype,
        tuple(group_of(bn) for bn in parts.norms),
        1 if parts.pad is None else parts.pad.stride,
        names.norm_first and module.activation_shared,
    )  # fmt: skip
    memory_format = torch.channels_last if device == "cpu" else layout.memory_format(x)
    survival = getattr(module, "survival", 1.0)
    prepared = Prepared(spec, parts, names.norm_first, memory_format, survival, None)
    fused = one_op.layout_of(spec, prepared.tensors(), names.norm_first, x.shape)
    return prepared._replace(fused=fused)


class _CacheEntry(NamedTuple):
    key: Any
    structure: Structure
    prepared: Prepared


_cache: WeakKeyDictionary[nn.Module, _CacheEntry] = WeakKeyDictionary()


def _key(block: Any, x: Tensor) -> Any:
    """What the training step depends on, other than the block's modules and tensors."""
    device = x.device.type
    attributes = block.__dict__
    return (
        x.shape, x.dtype, output_dtype(x.dtype, device), torch.is_autocast_enabled(device),
        registry.choose("bn_add_relu", device), level_of(block),
        attributes.get("survival"), attributes.get("activation_shared"),
    )  # fmt: skip


def cached(block: nn.Module, x: Tensor) -> Prepared | None:
    """The cached step of the block for such an x, or None if it is not valid; CPU only."""
    entry = _cache.get(block)
    if entry is None or x.device.type != "cpu" or entry.key != _key(block, x):
        return None
    return entry.prepared if entry.structure.holds() else None


def prepare_block(block: nn.Module, names: Names, parts: Parts, x: Tensor) -> Prepared | None:
    """`prepare`; caches the result if it uses the CPU's ops for whole blocks."""
    prepared = prepare(block, names, parts, x)
    if prepared is not None and prepared.fused is not None:
        _cache[block] = _CacheEntry(_key(block, x), Structure(parts), prepared)
    return prepared


def trains_whole(
    parts: Parts, names: Names, shape: Any, dtype: torch.dtype, x_dtype: torch.dtype
) -> bool:
    """Whether the block trains as one node: every norm uses batch statistics, and stock would
    accept every unit's shapes and dtypes."""
    weight = parts.pairs[0][0].weight
    groups = [group_of(bn) for bn in parts.norms]
    synchronised = groups[0] is not None
    if not serves(True, weight) or any(group is not groups[0] for group in groups):
        return False
    if synchronised and weight.device.type != "cpu":
        return False  # PyTorch's SyncBatchNorm handles other devices
    if synchronised:
        shape = (max(1, shape[0]), *shape[1:])  # an empty batch: other processes may have images
    main_shape = tuple(shape)
    for i, (conv, bn) in enumerate(parts.pairs):
        branch = parts.downsample and i == len(parts.pairs) - 1
        out = output_shape(
            shape if branch else main_shape, conv.weight.shape, conv.stride, conv.padding,
            conv.dilation, conv.groups,
        )  # fmt: skip
        if out is None or conv.bias is not None or not weights_fit(x_dtype, conv.weight):
            return False
        if branch and out != main_shape:
            return False
        if bn is not None:
            normed = main_shape if names.norm_first else out
            if normed[0] * normed[2] * normed[3] < 2 and not synchronised:
                return False
            if not uses_batch_statistics(bn) or is_frozen_bn(bn) or normed[1] != bn.num_features:
                return False
            if not bn.eps > 0 or not norm_fits(bn, dtype):
                return False
        main_shape = out
    if parts.pad is not None:
        return parts.pad.output_shape(shape) == main_shape
    return parts.shortcut != "identity" or main_shape == tuple(shape)
