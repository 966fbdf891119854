"""Which implementation of the passes serves a training step."""

from __future__ import annotations

import functools

from fused_resnet.kernels import registry

from .cuda import CUDA
from .empty import Empty
from .native import Native
from .protocol import Passes

_portable: list[Passes] = []


def register_portable(passes: Passes) -> None:
    """By the registered ops, on any device; they are defined above the kernels."""
    _portable[:] = [passes]


def portable() -> Passes:
    return _portable[0]


@functools.cache
def _native() -> Native:
    return Native()


@functools.cache
def empty() -> Empty:
    """For a batch without images, on one of several processes whose norms are synchronised."""
    return Empty()


def passes_for(device_type: str, backend: str) -> Passes:
    """The passes for tensors on such a device, where `backend` serves bn_add_relu."""
    if registry.gpu_kernels(device_type) and registry.stands_for(backend) == "native":
        return CUDA
    if device_type != "cpu" or backend != "native":
        return portable()
    return _native()
