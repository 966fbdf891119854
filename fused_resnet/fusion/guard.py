"""The one mechanism that notices change in the modules that something was made from."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from itertools import chain, compress, repeat
from operator import attrgetter, contains, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn import BatchNorm2d, Conv2d, MaxPool2d

from fused_resnet.kernels.fingerprint import (
    enabled,
    fingerprint,
    ranges_of,
    start,
    sum_of,
    table_of,
)
from fused_resnet.layers.hooks import OVERRIDABLE, hooks_of, overrides
from fused_resnet.layers.released import Released
from fused_resnet.layers.shortcut import PadShortcut

from .description import Description, Place

_PER_TENSOR = 3  # the first lists of `Guard._current_state` have an entry per tensor
# Longer than a thread that copies a parameter is likely to be suspended for.
_SETTLING_S = 0.25
# The attributes of a guard that describe modules, and how much of its state describes tensors.
_OF_MODULES = (
    "_homes", "_names", "_modules", "_children", "_dicts", "_overrides", "_hooks", "_settings",
    "_setting_names", "_slots", "_keys", "_values",
)  # fmt: skip
_OF_TENSORS = 3
_version, _dtype = attrgetter("_version"), attrgetter("dtype")
_has_storage = torch._C._has_storage
_SETTINGS = {
    Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    BatchNorm2d: ("eps", "training", "momentum", "track_running_stats", "process_group"),
    MaxPool2d: (
        "kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode",
    ),
    PadShortcut: ("in_channels", "out_channels", "stride"),
}  # fmt: skip

_Noted = list["weakref.ref[Guard]"]
_noted: ContextVar[_Noted | None] = ContextVar("fused_resnet_guards", default=None)


@contextlib.contextmanager
def noting_guards() -> Iterator[_Noted]:
    """Collects the guards that this thread makes: they share the memory of what they guard."""
    made: _Noted = []
    token = _noted.set(made)
    try:
        yield made
    finally:
        _noted.reset(token)


class Guard:
    """A snapshot of described modules, taken before anything is read from them.

    `holds` compares it with their current state: identity and type of every module, hooks and
    patched forwards, configuration, identity, address, dtype, shape and version counter of every
    parameter and buffer, and a fingerprint of their values (kernels/fingerprint.py). The tensors'
    memory is kept alive, so that no address is reused while the guard exists. The comparisons run
    in C (`map` with builtins), since they run in every forward. Of a released parameter
    (layers/released.py) they see that it still is: nobody can have written to it.

    places: further modules, as those between blocks, and attributes. values: whether fingerprints
    are taken; `structure_holds` needs none. beside: guards that it is combined with, which compare
    what their modules hold.
    """

    def __init__(
        self,
        descriptions: Sequence[Description],
        places: Sequence[Place] = (),
        values: bool = True,
        beside: Sequence[Guard] = (),
    ) -> None:
        inside = {id(module) for guard in beside for module in guard._modules}
        self._homes: list[Any] = []
        self._names: list[str] = []
        self._modules: list[Any] = []
        self._children: list[Any] = []
        self._dicts: list[Any] = []
        self._overrides: list[str] = []
        self._hooks: list[Any] = []
        self._settings: list[Any] = []
        self._setting_names: list[str] = []
        self._slots: list[Any] = []
        self._keys: list[str] = []
        for home, name, module, kind in chain(places, *(d.places for d in descriptions)):
            self._homes.append(home)
            self._names.append(name)
            self._modules.append(module)
            if kind is type(module):  # which of its settings are compared depends on it
                if id(module) in inside:
                    continue
                inside.add(id(module))
            # A scripted module keeps its tensors and children in C++, and is only called.
            if not isinstance(module, nn.Module) or isinstance(module, ScriptModule):
                if kind in (list, dict, set):
                    self._children.append(module)
                continue
            attributes, settings = module.__dict__, _SETTINGS.get(kind, ())
            self._children.append(module._modules)
            # A module with hooks or replaced methods is not fused, and may keep them.
            names = OVERRIDABLE[bool(module._parameters or module._buffers)]
            found = names & attributes.keys()
            if not any(hooks_of(module)) and not (found and overrides(module)):
                self._hooks += hooks_of(module)
                for own in found:  # methods of the module's class
                    self._homes.append(attributes)
                    self._names.append(own)
                    self._modules.append(attributes[own])
                names -= found
                self._dicts += repeat(attributes, len(names))
                self._overrides += names
            self._settings += repeat(attributes, len(settings))
            self._setting_names += settings
            for tensors in (module._parameters, module._buffers):
                if tensors and settings:  # __setstate__ replaces the dict itself
                    self._homes.append(attributes)
                    self._names.append("_buffers" if tensors is module._buffers else "_parameters")
                    self._modules.append(tensors)
                keys = dict.fromkeys(tensors)
                if values:  # inference does not read a counter of batches
                    keys.pop("num_batches_tracked", None)
                self._slots += repeat(tensors, len(keys))
                self._keys += keys
        self._values = list(map(getitem, self._slots, self._keys))
        present: list[Any] = [t for t in self._values if t is not None]
        self._released = [t for t in present if type(t) is Released]
        # A sparse tensor has no address, and nothing is made from it: its identity is compared.
        self._tensors = [t for t in present if type(t) is not Released and _has_storage(t)]
        self._alive = list(map(Tensor.detach, self._tensors))
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        # A tensor created in inference mode has no version counter: writes go undetected.
        self.has_versions = not any(map(Tensor.is_inference, self._tensors))
        self._versions = list(map(_version, self._tensors)) if self.has_versions else []
        self._state = self._current_state()
        self._ranges = ranges_of(self._tensors) if values else []
        self._table = table_of(self._ranges)
        self._print = fingerprint(self._table)
        self._whole = self._table.clone()
        self._whole[:, 2] = 0
        self._whole_print = fingerprint(self._whole)
        self._settled = time.monotonic() + _SETTLING_S
        self._confirmed = not self._ranges
        self._note()

    def _note(self) -> None:
        made = _noted.get()
        if made is not None:
            made.append(weakref.ref(self))

    def aliases(self, p: Tensor) -> list[Tensor]:
        """The guard's own tensors that share the memory of a parameter."""
        return [a for t, a in zip(self._tensors, self._alive, strict=True) if t is p]

    def released(self, p: Any, sampled: int, whole: int) -> None:
        """Guards a parameter as a released one from now on. sampled, whole: the fingerprints of its
        values before; if it was written to since the snapshot, the guard does not hold now."""
        kept = [t is not p for t in self._tensors]
        count = len(kept) - sum(kept)
        if count == 0:
            return
        if self._ranges:
            self._print = sum_of([self._print, *repeat(-sampled, count)])
            self._whole_print = sum_of([self._whole_print, *repeat(-whole, count)])
            self._ranges = ranges_of(compress(self._tensors, kept))
            self._table = table_of(self._ranges)
            self._whole = self._table.clone()
            self._whole[:, 2] = 0
        self._alive = list(compress(self._alive, kept))
        self._addresses = list(compress(self._addresses, kept))
        if self.has_versions:
            self._versions = list(compress(self._versions, kept))
        of_tensors = [list(compress(values, kept)) for values in self._state[:_PER_TENSOR]]
        self._state = (*of_tensors, *self._state[_PER_TENSOR:])
        self._tensors = list(compress(self._tensors, kept))
        self._released = [*self._released, p]

    @staticmethod
    def combined(guards: Sequence[Guard]) -> Guard:
        """One guard for everything that `guards` hold, by their snapshots."""
        all_of = Guard.__new__(Guard)
        states = map(attrgetter("_state"), guards)
        for name, value in vars(guards[0]).items():
            if type(value) is list:
                setattr(all_of, name, list(chain.from_iterable(map(attrgetter(name), guards))))
        all_of.has_versions = all(map(attrgetter("has_versions"), guards))
        all_of._state = tuple(map(list, map(chain.from_iterable, zip(*states, strict=True))))
        all_of._table = table_of(all_of._ranges)
        all_of._whole = all_of._table.clone()
        all_of._whole[:, 2] = 0
        all_of._print = sum_of(map(attrgetter("_print"), guards))
        all_of._whole_print = sum_of(map(attrgetter("_whole_print"), guards))
        all_of._settled = max(map(attrgetter("_settled"), guards))
        all_of._confirmed = not all_of._ranges
        all_of._note()
        return all_of

    def forget_modules(self) -> None:
        """Leaves the tensors alone to compare: for modules that only the guard's owner has."""
        for name in _OF_MODULES:
            setattr(self, name, [])
        self._state = (*self._state[:_OF_TENSORS], *([] for _ in self._state[_OF_TENSORS:]))

    def _current_state(self) -> tuple[list[Any], ...]:
        """What is compared by value, and can change without replacing a module or tensor."""
        tensors = self._tensors
        return (
            list(map(_dtype, tensors)),
            list(map(Tensor.size, tensors)),
            list(map(Tensor.stride, tensors)),
            list(map(type, self._modules)),
            list(map(tuple, self._children)),
            list(map(dict.get, self._settings, self._setting_names)),
        )

    def holds(self) -> bool:
        """Whether nothing was replaced, hooked, patched, reconfigured or written to."""
        if not self._is_placed():
            return False
        if not enabled.get() or not self._ranges:
            return self._is_unchanged()
        # Until the guard has settled, and once after, of every byte: another thread may have been
        # in the middle of a write when the fingerprint was taken.
        confirmed, settled = self._confirmed, time.monotonic() >= self._settled
        table = self._table if confirmed else self._whole
        try:
            start(table)  # the other threads read it meanwhile: nothing of it was freed
            same = self._is_unchanged()
        finally:
            found = fingerprint(table)
        same = same and found == (self._print if confirmed else self._whole_print)
        self._confirmed = confirmed or (same and settled)
        return same

    def _is_placed(self) -> bool:
        """Whether all tensors have their memory where it was."""
        return list(map(Tensor.data_ptr, self._tensors)) == self._addresses

    def _is_unchanged(self) -> bool:
        """`holds`, but for addresses and writes that increment no version counter."""
        try:
            versions = list(map(_version, self._tensors))
        except RuntimeError:  # a tensor created in inference mode
            return False
        return versions == self._versions and self._is_structured()

    def structure_holds(self) -> bool:
        """`holds`, except that values may have been written."""
        return self._is_placed() and self._is_structured()

    def _is_structured(self) -> bool:
        """`structure_holds`, but for addresses."""
        try:
            return (
                all(map(is_, map(getitem, self._slots, self._keys), self._values))
                and self._current_state() == self._state
                and all(map(is_, map(dict.get, self._homes, self._names), self._modules))
                and all(map(is_, map(type, self._released), repeat(Released)))
                and not any(self._hooks)
                and not any(map(contains, self._dicts, self._overrides))
            )
        except (KeyError, AttributeError):  # a parameter or an attribute was deleted
            return False
