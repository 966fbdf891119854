"""Detects modules whose call does more than the forward of their class: hooks and patches. Looks
at the outputs of modules by hooks of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
hooks_of = attrgetter(*HOOKS)

# Registered by torch.nn.modules.module.register_module_forward_hook and the like, for every module.
GLOBAL_HOOKS = [
    getattr(nn_module, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]


# What a call of a module looks up on the instance before its class.
_METHODS = ("forward", "_call_impl", "_compiled_call_impl", "_conv_forward")
_TENSORS = ("weight", "bias", "running_mean", "running_var")


def overridable(m: nn.Module) -> tuple[str, ...]:
    """The attributes that would change what m computes if they were the instance's own. Parameters
    and buffers are not: they lie in dicts of their own."""
    return _METHODS + _TENSORS if m._parameters or m._buffers else _METHODS[:-1]


def overrides(m: nn.Module) -> list[str]:
    """Those that are. The class's own method, bound to the instance, does not count: tools that
    have removed their wrapper leave it there."""

    def is_own(name: str, found: Any) -> bool:
        function = getattr(found, "__func__", None)
        return found is None or (
            function is getattr(type(m), name, m) and getattr(found, "__self__", None) is m
        )

    attributes = m.__dict__
    return [n for n in overridable(m) if n in attributes and not is_own(n, attributes[n])]


def patched(m: nn.Module) -> str | None:
    """Why calling m does more than the forward of its class with its parameters, or None."""
    if any(hooks_of(m)):
        return "has hooks"
    for name in overrides(m):
        return f"has its {name} " + ("a plain attribute" if name in _TENSORS else "replaced")
    return None


def is_fsdps(m: nn.Module) -> bool:
    """Whether FSDP gathers m's parameters for every forward. It does not increment their version
    counters, and the address is often the same, so nothing derived from them can be cached."""
    return "_is_fsdp_managed_module" in m.__dict__


@contextlib.contextmanager
def watching(
    modules: Iterable[tuple[str, nn.Module]], see: Callable[[str, Any], None]
) -> Iterator[None]:
    """Calls see(name, output) after every forward of each of the named modules."""
    with contextlib.ExitStack() as stack:
        for name, m in modules:
            hook = m.register_forward_hook(lambda module, inputs, y, name=name: see(name, y))
            stack.callback(hook.remove)
        yield


@contextlib.contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """Restores the buffers, such as running statistics, on exit."""
    before = [b.clone() for b in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for b, was in zip(model.buffers(), before, strict=True):
                b.copy_(was)
