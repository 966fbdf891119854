"""Selects the implementation of the passes of a training step."""

from __future__ import annotations

import functools

from fused_resnet.kernels import registry

from .cuda import CUDA
from .empty import Empty
from .native import Native
from .protocol import Passes

_portable: list[Passes] = []


def register_portable(passes: Passes) -> None:
    """Sets the passes that call registered ops; `ops` does this, as kernels cannot import it."""
    _portable[:] = [passes]


def portable() -> Passes:
    return _portable[0]


@functools.cache
def _native() -> Native:
    return Native()


@functools.cache
def empty() -> Empty:
    """The passes of an empty batch on one of several processes with synchronised norms."""
    return Empty()


def passes_for(device_type: str, backend: str) -> Passes:
    """The passes for tensors on such a device, where `backend` computes bn_add_relu."""
    if registry.gpu_kernels(device_type) and registry.emulated(backend) == "native":
        return CUDA
    if device_type != "cpu" or backend != "native":
        return portable()
    return _native()
