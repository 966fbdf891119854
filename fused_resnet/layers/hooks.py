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
_METHODS = frozenset(("forward", "_call_impl", "_compiled_call_impl", "_conv_forward"))
_TENSORS = frozenset(("weight", "bias", "running_mean", "running_var"))


# By whether a module has parameters or buffers of its own: the attributes that would change what it
# computes if they lay beside those in the instance's dict.
OVERRIDABLE = (_METHODS, _METHODS | _TENSORS)


def overrides(m: nn.Module) -> list[str]:
    """The instance's attributes that replace its class's methods or its parameters. The class's own
    method, bound to the instance, does not count: tools that removed their wrapper leave it."""

    attributes, found = m.__dict__, []
    for name in attributes.keys() & OVERRIDABLE[bool(m._parameters or m._buffers)]:
        method = attributes[name]
        own = getattr(method, "__func__", None) is getattr(type(m), name, m)
        if method is not None and not (own and method.__self__ is m):
            found.append(name)
    return sorted(found)


def patched(m: nn.Module) -> str | None:
    """Why calling m does more than the forward of its class with its parameters, or None."""
    if any(hooks_of(m)):
        return "has hooks"
    if m.__dict__.keys() & OVERRIDABLE[True]:
        for name in overrides(m):
            return f"has its {name} " + ("a plain attribute" if name in _TENSORS else "replaced")
    return None


# The attribute of a module whose parameters FSDP gathers for every forward. It does not increment
# their version counters, and the address is often the same, so nothing made from them is cached.
FSDP = "_is_fsdp_managed_module"


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
