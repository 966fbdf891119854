"""The base classes of modules with cached inference plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_mode_callbacks: list[Callable[[nn.Module], None]] = []


def on_mode_switch(callback: Callable[[nn.Module], None]) -> None:
    """Calls callback(module) before every `train()` and `eval()` of a `Planned` module."""
    _mode_callbacks.append(callback)


MADE = "_fused_resnet_made"
"""The attribute of a module that holds what was made from it (see fusion/store.py)."""


class Planned(nn.Module):
    """A module whose inference plans are cached: `train()` and `eval()` drop them."""

    activation_memory = "auto"  # see fused_resnet.set_activation_memory

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: everything but what was made from the module."""
        state = self.__dict__.copy()
        state.pop(MADE, None)
        return state

    def train(self, mode: bool = True) -> Any:
        for callback in _mode_callbacks:
            callback(self)
        return super().train(mode)


class Block(Planned):
    """A residual block, or the same layers without the shortcut."""
