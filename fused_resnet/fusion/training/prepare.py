"""A block's training step made ready: whether it can be one node of autograd's graph, which, and
the running statistics after it.

What was found out about a block is kept beside it, and used while nothing it came from has changed:
asking anew costs as much as the ops of a narrow block do."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fused_resnet import layout
from fused_resnet.fusion.fit import norm_fits, output_dtype, serves, weights_fit
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
    """A training step made ready. fused: what the CPU's ops for whole blocks need, or None."""

    spec: Spec
    parts: Parts
    norm_first: bool
    memory_format: torch.memory_format  # that it computes in
    survival: float
    fused: one_op.Layout | None

    def tensors(self) -> list[Any]:
        """Weight, norm's weight and bias, convolution by convolution; None for what is not there.

        What stochastic depth divides the block by is in the last of them."""
        found = [
            t
            for conv, bn in self.parts.pairs
            for t in (conv.weight, *((bn.weight, bn.bias) if bn is not None else (None, None)))
        ]
        if self.survival < 1:
            last = 3 * (len(self.parts.main) - 1)
            for i in (last,) if self.norm_first else (last + 1, last + 2):
                found[i] = found[i] / self.survival
        return found

    def enter(self, x: Tensor) -> Tensor:
        """x as the kernels take it."""
        return x.to(self.spec.dtype).contiguous(memory_format=self.memory_format)

    def run(self, x: Tensor) -> Tensor:
        """The block's output, in the layout that it computes in."""
        states: list[Any] = []
        function: Any = one_op.NativeBlockFunction
        how: Any = self.fused
        tensors = self.tensors()
        if how is None:
            function = PreactFunction if self.norm_first else BlockFunction
            how = self.spec
        elif tensors[-1] is None:
            del tensors[-2:]  # of a projection without a norm
        y = function.apply(how, states, self.enter(x), *tensors)
        self.track(states)
        return y

    def track(self, states: list[Any]) -> None:
        """Running statistics, as BatchNorm2d keeps them; states: of every norm what it normalised
        by and how many values per channel that was."""
        if recomputing.get():
            return
        norms = self.parts.norms
        if self.fused is None or not one_op.track(norms, states):
            for bn, (state, count) in zip(norms, states, strict=True):
                track(bn, state, count, self.spec.kernels.update_running)


def prepare(module: Any, names: Names, parts: Parts, x: Tensor) -> Prepared | None:
    """None where the block cannot be one node of autograd's graph.

    "auto" is "low" where that has been measured to take no longer: by the CPU's kernels. On a GPU
    "low" computes activations again but spares writing those that a 1x1 convolution normalises as
    it reads (cuda_training.py): a measurement of the two would decide there."""
    device = x.device.type
    dtype = output_dtype(x.dtype, device)
    if not trains_whole(parts, names, x.shape, dtype, x.dtype):
        return None
    kernels = passes_for(device, registry.choose("bn_add_relu", device))
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
    inside = torch.channels_last if device == "cpu" else layout.memory_format(x)
    survival = getattr(module, "survival", 1.0)
    found = Prepared(spec, parts, names.norm_first, inside, survival, None)
    fused = one_op.layout_of(spec, found.tensors(), names.norm_first, x.shape)
    return found._replace(fused=fused)


class _Kept(NamedTuple):
    key: Any
    structure: Structure
    prepared: Prepared


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def _key(block: Any, x: Tensor) -> Any:
    """What beside the block's modules and tensors its training step depends on."""
    device = x.device.type
    attributes = block.__dict__
    return (
        x.shape, x.dtype, output_dtype(x.dtype, device), torch.is_autocast_enabled(device),
        registry.choose("bn_add_relu", device), level_of(block),
        attributes.get("survival"), attributes.get("activation_shared"),
    )  # fmt: skip


def kept(block: nn.Module, x: Tensor) -> Prepared | None:
    """What was made ready for the block and such an x, if that is still so. On the CPU alone."""
    found = _kept.get(block)
    if found is None or x.device.type != "cpu" or found.key != _key(block, x):
        return None
    return found.prepared if found.structure.holds() else None


def prepare_block(block: nn.Module, names: Names, parts: Parts, x: Tensor) -> Prepared | None:
    """`prepare`, for next time too where it is for the CPU's ops for whole blocks."""
    prepared = prepare(block, names, parts, x)
    if prepared is not None and prepared.fused is not None:
        _kept[block] = _Kept(_key(block, x), Structure(parts), prepared)
    return prepared


def trains_whole(
    parts: Parts, names: Names, shape: Any, dtype: torch.dtype, x_dtype: torch.dtype
) -> bool:
    """Whether every unit normalises by the batch and is what stock would take as it is."""
    weight = parts.pairs[0][0].weight
    groups = [group_of(bn) for bn in parts.norms]
    synchronised = groups[0] is not None
    if not serves(True, weight) or any(group is not groups[0] for group in groups):
        return False
    if synchronised and weight.device.type != "cpu":
        return False  # PyTorch's own norm knows how
    if synchronised:
        shape = (max(1, shape[0]), *shape[1:])  # of no image: the others may have some
    found = tuple(shape)
    for i, (conv, bn) in enumerate(parts.pairs):
        branch = parts.downsample and i == len(parts.pairs) - 1
        out = output_shape(
            shape if branch else found, conv.weight.shape, conv.stride, conv.padding,
            conv.dilation, conv.groups,
        )  # fmt: skip
        if out is None or conv.bias is not None or not weights_fit(x_dtype, conv.weight):
            return False
        if branch and out != found:
            return False
        if bn is not None:
            normed = found if names.norm_first else out
            if normed[0] * normed[2] * normed[3] < 2 and not synchronised:
                return False
            if not uses_batch_statistics(bn) or is_frozen_bn(bn) or normed[1] != bn.num_features:
                return False
            if not bn.eps > 0 or not norm_fits(bn, dtype):
                return False
        found = out
    if parts.pad is not None:
        return parts.pad.output_shape(shape) == found
    return parts.shortcut != "identity" or found == tuple(shape)
