"""What `fuse` puts in the place of modules' calls. Their classes, forwards and attributes stay."""

from __future__ import annotations

import weakref
from typing import Any

from torch import fx, nn


class Installed:
    """Runs in the place of a module's call: it lies in the module's dict under `attribute` and
    belongs to this module alone. One that was given a copy of the dict, as DataParallel's replicas
    are, is not fused."""

    attribute: str

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def belongs_to(self, module: nn.Module) -> bool:
        return self._module() is module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Installed:
        module = self._module()
        # A module that makes its own copy, as GraphModule does, is not known here yet.
        known = id(module) in memo
        return install(memo[id(module)], type(self)) if known else _nowhere(type(self))

    def __reduce__(self) -> Any:
        module, own = self._module(), type(self)
        graph = isinstance(module, fx.GraphModule)
        return (_nowhere, (own,)) if graph else (install, (module, own))


class _Call:
    """A class's `_compiled_call_impl`, which `nn.Module.__call__` runs instead of `_call_impl`
    unless it is None, as it is for all modules of the class that are not fused."""

    def __init__(self, attribute: str) -> None:
        self._attribute = attribute

    def __get__(self, module: Any, owner: type) -> Installed | None:
        found = None if module is None else module.__dict__.get(self._attribute)
        return found if found is not None and found.belongs_to(module) else None


def install(module: Any, kind: type[Installed]) -> Installed:
    """Puts one of `kind` in the place of the module's call, for the class of which PyTorch then
    asks."""
    if type(type(module).__dict__.get("_compiled_call_impl")) is not _Call:
        type(module)._compiled_call_impl = _Call(kind.attribute)
    found = module.__dict__[kind.attribute] = kind(module)
    return found


def _nowhere(kind: type[Installed]) -> Installed:
    """One of no module."""
    return kind(nn.Module())


def installed_in(module: nn.Module, kind: type[Installed]) -> bool:
    """Whether one of `kind` is in the place of the module's call."""
    found = module.__dict__.get(kind.attribute)
    return isinstance(found, kind) and found.belongs_to(module)
