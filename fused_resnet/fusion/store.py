"""The one cache of what was made from modules: plans of inference and prepared training steps.

Entries are kept outside the modules, so that state_dict, deepcopy and pickle do not see them. Each
has a `guard` and `holds()`, is dropped as soon as that is False, and with its module."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from fused_resnet.layers.planned import on_mode_switch

# module -> what it was made for (dtype, device, ...) -> entry
_entries: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()
_generation = 0


def lookup(module: nn.Module, key: Any) -> Any:
    """The entry of `module` for `key`, or None. If it no longer holds, all of the module's are
    dropped: they were made from the same tensors."""
    entry = _entries.get(module, {}).get(key)
    if entry is None or entry.holds():
        return entry
    _entries.pop(module, None)
    return None


def insert(module: nn.Module, key: Any, entry: Any) -> None:
    """Adds an entry. Valid ones for other keys stay: autocast may alternate from call to call."""
    others = {k: e for k, e in _entries.get(module, {}).items() if k != key and e.holds()}
    _entries[module] = {**others, key: entry}


def forget(module: nn.Module) -> None:
    """Drops all entries of `module` and of the modules in it; the next call makes new ones."""
    global _generation
    _generation += 1
    for m in module.modules():
        _entries.pop(m, None)


def generation() -> int:
    """The number of calls of `forget`, after which entries held elsewhere are stale."""
    return _generation


def made_from(module: nn.Module) -> dict[Any, Any]:
    """A copy of what is cached for `module` itself, by what it was made for."""
    return dict(_entries.get(module, {}))


on_mode_switch(forget)
