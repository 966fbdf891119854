"""Parses residual blocks into their parts, and detects later changes to them.

A block is fused only while its parts are exactly Conv2d, BatchNorm2d (SyncBatchNorm,
FrozenBatchNorm2d) and ReLU, unhooked and unpatched, so that surgery on a model and feature
extraction keep working.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from operator import attrgetter, contains, getitem, is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from fused_resnet.layers.hooks import HOOKS, patched
from fused_resnet.layers.norms import is_frozen_bn
from fused_resnet.layers.shortcut import PadShortcut
from fused_resnet.layers.sync_batch_norm import SyncBatchNorm

_BN_TENSORS = ("weight", "bias", "running_mean", "running_var")
_SYNCHRONISED = (nn.SyncBatchNorm, SyncBatchNorm)
_conv_state = attrgetter("stride", "padding", "dilation", "groups", "padding_mode")
_bn_state = attrgetter("eps", "training")
_pad_state = attrgetter("in_channels", "out_channels", "stride")
_version, _dtype = attrgetter("_version"), attrgetter("dtype")


class Names(NamedTuple):
    """The names of a block's submodules. pairs: (convolution, batch norm) in order.

    downsample: the submodule that changes the shortcut's shape; None: the block has no shortcut.
    norm_first: norm and ReLU come before each convolution, and none after the addition."""

    pairs: tuple[tuple[str, str], ...]
    relu: str = "relu"
    downsample: str | None = "downsample"
    norm_first: bool = False


STEM = Names((("conv1", "bn1"),), downsample=None)


class Place(NamedTuple):
    """One part: `home[name] is part`, whose type must be exactly `kind`."""

    home: dict[str, Any]
    name: str
    part: Any
    kind: type


class Parts(NamedTuple):
    """A parsed block. pairs: (conv, bn) in order, the pair of a projecting shortcut last.

    shortcut: "none", "identity", "projection" or "pad" (by the module `pad`). The projection of a
    norm_first block has no norm: its pair is (conv, None)."""

    pairs: list[tuple[Any, Any]]
    shortcut: str
    places: list[Place]
    pad: PadShortcut | None = None

    @property
    def downsample(self) -> bool:
        return self.shortcut == "projection"

    @property
    def norms(self) -> list[Any]:
        return [bn for _, bn in self.pairs if bn is not None]

    @property
    def main(self) -> list[tuple[Any, Any]]:
        """The pairs of the residual branch."""
        return self.pairs[:-1] if self.downsample else self.pairs


def parse_block(block: nn.Module, names: Names) -> Parts | str:
    """The block's parts, or a one-line reason why it cannot be fused."""
    children = block._modules
    places: list[Place] = []

    def child(home: dict[str, Any], name: str, kind: type) -> Any:
        places.append(Place(home, name, home.get(name), kind))
        return places[-1].part

    pairs = [
        (child(children, c, nn.Conv2d), child(children, b, nn.BatchNorm2d)) for c, b in names.pairs
    ]
    child(children, names.relu, nn.ReLU)
    shortcut, pad = "none", None
    if names.downsample is not None:
        # `self.downsample = None` in __init__ sets a plain attribute, not a child module.
        child(block.__dict__, names.downsample, type(None))
        branch = children.get(names.downsample)
        if branch is None:
            shortcut = "identity"
            child(children, names.downsample, type(None))
        elif type(branch) is PadShortcut:
            shortcut = "pad"
            pad = child(children, names.downsample, PadShortcut)
        elif names.norm_first:
            shortcut = "projection"
            pairs.append((child(children, names.downsample, nn.Conv2d), None))
        else:
            shortcut = "projection"
            child(children, names.downsample, nn.Sequential)
            if type(branch) is not nn.Sequential or len(branch) != 2:
                return f"{names.downsample} is not a Sequential of a convolution and a norm"
            layers = branch._modules
            first, second = layers.keys()
            pairs.append((child(layers, first, nn.Conv2d), child(layers, second, nn.BatchNorm2d)))
    parts = Parts(pairs, shortcut, places, pad)
    return _structure_reason(parts, names.norm_first) or parts


def _structure_reason(parts: Parts, norm_first: bool) -> str | None:
    for _, name, part, kind in parts.places:
        norm = kind is nn.BatchNorm2d and (type(part) in _SYNCHRONISED or is_frozen_bn(part))
        if type(part) is not kind and not norm:
            return f"{name} is a {type(part).__name__}, not a {kind.__name__}"
        why = None if part is None else patched(part)
        if why is not None:
            return f"{name} {why}"
    for conv, bn in parts.pairs:
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return "a convolution's padding is not a number of zeros"
        for name, t in tensors_of(conv, bn):
            if t is None:
                continue
            if type(t) not in (Tensor, nn.Parameter):
                return f"{name} is a {type(t).__name__}"
            first = norm_first and name != "conv.bias"
            channels = conv.in_channels if first else conv.out_channels
            if name != "conv.weight" and t.shape != (channels,):
                return f"{name} has shape {tuple(t.shape)} for {channels} channels"
            if t.device != conv.weight.device:
                return f"{name} is on {t.device}, conv.weight on {conv.weight.device}"
    return None


def tensors_of(conv: Any, bn: Any) -> Iterator[tuple[str, Tensor | None]]:
    """(name, tensor) of every parameter and running statistic of the pair."""
    yield "conv.weight", conv.weight
    yield "conv.bias", conv.bias
    for name in _BN_TENSORS if bn is not None else ():
        yield f"bn.{name}", getattr(bn, name)


class Structure:
    """A snapshot of a parsed block; `holds` compares it with the block's current state.

    The comparisons run in C (`map` with builtins), since it is called in every forward. A snapshot
    must not hold a reference to the block, which is its key in a WeakKeyDictionary.
    """

    def __init__(self, parts: Parts) -> None:
        self._homes, self._names, self._parts, _ = (
            list(v) for v in zip(*parts.places, strict=True)
        )
        modules = [m for m in self._parts if m is not None]
        self._modules, self._types = modules, list(map(type, modules))
        self._hooks = [getattr(m, name) for m in modules for name in HOOKS]
        self._dicts = [m.__dict__ for m in modules]
        self._children = [m._modules for m in modules]
        self._counts = list(map(len, self._children))
        self._convs = [conv for conv, _ in parts.pairs]
        self._bns = parts.norms
        self._conv_states = list(map(_conv_state, self._convs))
        self._bn_states = list(map(_bn_state, self._bns))
        self._pads = [m for m in modules if type(m) is PadShortcut]
        self._pad_states = list(map(_pad_state, self._pads))
        slots = [
            (home, name)
            for conv, bn in parts.pairs
            for m, names in ((conv, ("weight", "bias")), (bn, _BN_TENSORS))
            if m is not None
            for name in names
            for home in (m._parameters, m._buffers)
            if name in home
        ]
        self._slots, self._keys = [h for h, _ in slots], [k for _, k in slots]
        self._values = [h[k] for h, k in slots]
        self._tensors = [t for t in self._values if t is not None]
        self._metadata = self._current_metadata()

    def _current_metadata(self) -> list[Any]:
        """What can change in a tensor without replacing it, except its values."""
        tensors = self._tensors
        return [
            *map(Tensor.data_ptr, tensors), *map(_dtype, tensors), *map(Tensor.size, tensors),
            *map(Tensor.stride, tensors),
        ]  # fmt: skip

    def holds(self) -> bool:
        """Whether nothing was replaced, hooked, patched or reconfigured."""
        try:
            return (
                all(map(is_, map(getitem, self._slots, self._keys), self._values))
                and self._current_metadata() == self._metadata
                and all(map(is_, map(dict.get, self._homes, self._names), self._parts))
                and list(map(type, self._modules)) == self._types
                and not any(self._hooks)
                and not any(map(contains, self._dicts, repeat("forward")))
                and list(map(_conv_state, self._convs)) == self._conv_states
                and list(map(_bn_state, self._bns)) == self._bn_states
                and list(map(_pad_state, self._pads)) == self._pad_states
                and list(map(len, self._children)) == self._counts
            )
        except (KeyError, AttributeError):  # a parameter or an attribute was deleted
            return False


class Guard(Structure):
    """A snapshot that also detects in-place writes to the tensors, for the caches of plans."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        # A tensor created in inference mode has no version counter, so writes go undetected.
        self.has_versions = not any(t.is_inference() for t in self._tensors)
        self._versions = list(map(_version, self._tensors)) if self.has_versions else []

    def holds(self) -> bool:
        """Whether nothing was replaced, hooked, patched, reconfigured or written to."""
        return list(map(_version, self._tensors)) == self._versions and super().holds()
