"""Detects modules whose call does more than the forward of their class: hooks and patches."""

from __future__ import annotations

from operator import attrgetter

from torch import nn
from torch.nn.modules import module as nn_module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
hooks_of = attrgetter(*HOOKS)

# Registered by torch.nn.modules.module.register_module_forward_hook and the like, for every module.
GLOBAL_HOOKS = [
    getattr(nn_module, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]


def patched(m: nn.Module) -> str | None:
    """Why calling m does more than the forward of its class, or None."""
    if any(hooks_of(m)):
        return "has hooks"
    if "forward" in m.__dict__:
        return "has its forward replaced"
    return None


def is_fsdps(m: nn.Module) -> bool:
    """Whether FSDP gathers m's parameters for every forward. It does not increment their version
    counters, and the address is often the same, so nothing derived from them can be cached."""
    return "_is_fsdp_managed_module" in m.__dict__
