"""The base classes of modules with cached inference plans."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from .released import restore_all

_callbacks: list[Callable[[nn.Module], None]] = []


def on_change(callback: Callable[[nn.Module], None]) -> None:
    """Calls callback(module) before a change of a `Planned` module that makes its plans useless."""
    _callbacks.append(callback)


MADE = "_fused_resnet_made"
"""The attribute of a module that holds what was made from it (see fusion/store.py)."""

FUSED = "_fused_resnet_region"
"""The attribute of a module that `fused_resnet.fuse` changed (see fusion/regions/region.py)."""

LINEAR = "_fused_resnet_linear"
"""The same of an nn.Linear (see fusion/regions/linear.py)."""


NUMBER = "_fused_resnet_number"
"""The attribute by which a compiled graph names a module (see fusion/compiled.py)."""

SLOTS = "_fused_resnet_slots"
"""The attribute with the places of a module's parameters and buffers (see fusion/compiled.py)."""

_numbers = itertools.count()
_numbered: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def numbered(number: int) -> nn.Module:
    """The module of this number. Raises RuntimeError if it is no more."""
    module = _numbered.get(number)
    if module is None:
        raise RuntimeError(f"module_inference: module {number} does not exist in this process")
    return module


class Planned(nn.Module):
    """A module whose inference plans are cached. A switch between training and eval mode, a
    conversion of the tensors (`.to()`, `.half()`, ...), `load_state_dict` and a replaced or deleted
    submodule drop them, with the memory they hold."""

    activation_memory = "auto"  # see fused_resnet.set_activation_memory

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Numbers the module; copies and those from pickles get numbers of their own."""
        module = super().__new__(cls)
        module.__dict__[NUMBER] = next(_numbers)
        _numbered[module.__dict__[NUMBER]] = module
        return module

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: everything but what was made from the module."""
        state = self.__dict__.copy()
        for name in (MADE, NUMBER, SLOTS):
            state.pop(name, None)
        return state

    def _changes(self) -> None:
        for callback in _callbacks:
            callback(self)

    def __prepare_scriptable__(self) -> Any:
        """For torch.jit.script, which reads parameters without asking them."""
        restore_all(self.parameters())
        return self

    def train(self, mode: bool = True) -> Any:
        if mode != self.training:  # many call eval() before every forward
            self._changes()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._changes()
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._changes()
        return super().load_state_dict(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_modules", ()):
            self._changes()
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._modules:
            self._changes()
        super().__delattr__(name)


class Block(Planned):
    """A residual block, or the same layers without the shortcut."""
