"""Selects the implementation of the passes of a training step."""

from __future__ import annotations

import functools

from fused_resnet.kernels import registry

from .empty import Empty
from .protocol import Passes

# The passes of an empty batch on one of several processes with synchronised norms.
empty = functools.cache(Empty)


def portable() -> Passes:
    """The passes that call registered ops; `ops` provides them, as kernels cannot import it."""
    return registry.provider("reference", "cpu").passes()


def passes_for(device_type: str) -> Passes:
    """The passes for tensors on such a device, by the provider that computes bn_add_relu."""
    backend = registry.choose("bn_add_relu", device_type)
    return registry.provider(backend, device_type).passes() or portable()
