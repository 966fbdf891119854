"""The one cache of what was made from modules: plans of inference and prepared training steps.

Entries are kept on the module that they are for, but left out of state_dict, deepcopy and pickle.
So a module that its own parts refer to, as a hook may, is freed with its entries. Each entry has a
`guard` and `holds()`, and is dropped as soon as that is False."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from fused_resnet.kernels import cache
from fused_resnet.layers.planned import FUSED, MADE, on_change

_generation = 0


def _entries(module: nn.Module) -> dict[Any, Any]:
    """What is cached for `module`, by what it was made for (dtype, device, ...)."""
    owner, entries = module.__dict__.get(MADE, (None, {}))
    # A copy of the module's dict, as DataParallel's replicas have, is another module's.
    return entries if owner is not None and owner() is module else {}


def lookup(module: nn.Module, key: Any) -> Any:
    """The entry of `module` for `key`, or None. If it no longer holds, all of the module's are
    dropped: they were made from the same tensors."""
    entry = _entries(module).get(key)
    if entry is None or entry.holds():
        return entry
    module.__dict__.pop(MADE, None)
    return None


def insert(module: nn.Module, key: Any, entry: Any) -> None:
    """Adds an entry. Valid ones for other keys stay: autocast may alternate from call to call."""
    others = {k: e for k, e in _entries(module).items() if k != key and e.holds()}
    module.__dict__[MADE] = (weakref.ref(module), {**others, key: entry})


def forget(module: nn.Module) -> None:
    """Drops all entries of `module` and of the modules in it; the next call makes new ones."""
    global _generation
    _generation += 1
    for m in module.modules():
        m.__dict__.pop(MADE, None)
        if FUSED in m.__dict__:
            m.__dict__[FUSED].forget()


def refresh(model: nn.Module) -> None:
    """Forgets everything that was made from the tensors of `model`: packed weights, folded norms,
    plans of inference and training steps. The next call reads them anew.

    Needed only after writes that nothing shows: a few values changed through `.data`, a NumPy or
    DLPack view, a collective or another process (README.md, "Limits"). Raises TypeError if model
    is no nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"refresh: model must be an nn.Module, got {type(model).__name__}")
    forget(model)
    cache.forget(model.parameters())


def generation() -> int:
    """The number of calls of `forget`, after which entries held elsewhere are stale."""
    return _generation


def made_from(module: nn.Module) -> dict[Any, Any]:
    """A copy of what is cached for `module` itself, by what it was made for."""
    return dict(_entries(module))


on_change(forget)
