"""Properties of the GPU that kernels are chosen for."""

from __future__ import annotations

import functools

import torch


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU. 3 for CPU tensors, whose kernels run in an
    interpreter or emulator, so that tests need more than one wave of tiles."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; (9, 0), Hopper's, for CPU tensors."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
