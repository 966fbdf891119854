"""A fingerprint of tensors' values: notices writes that move neither version counter nor address,
through `.data`, NumPy, DLPack, collectives or another process's mapping of the memory.

It reads vectors and small weights whole, and of each output channel of a larger weight one cache
line or a few (csrc/cpu/fingerprint.cpp). Only of tensors on the CPU, by the native build."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from . import native

enabled: ContextVar[bool] = ContextVar("fused_resnet_fingerprints", default=True)
"""Whether plans compare fingerprints (`inference`'s `check`)."""

_NOTHING = torch.empty(0, 3, dtype=torch.int64, device="cpu")


def ranges_of(tensors: Iterable[Tensor], whole: bool = False) -> list[int]:
    """The memory of the tensors on the CPU: address, bytes and rows of each, one after the other.
    whole: every byte is to be read."""
    ranges: list[int] = []
    for t in tensors:
        if t.device.type != "cpu" or t.numel() == 0:
            continue
        elements, rows = t.numel(), 0
        if t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last):
            rows = t.shape[0] if t.dim() == 4 and not whole else 0
        else:  # with what lies between the elements
            elements = 1 + sum([(n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)])
        ranges += (t.data_ptr(), elements * t.element_size(), rows)
    return ranges


def table_of(ranges: Sequence[int]) -> Tensor:
    """`ranges_of`'s list as `fingerprint` takes it: (n, 3) int64, whose last column is 0 for ranges
    to be read whole."""
    if not ranges or native.load() is not None:
        return _NOTHING
    return torch.tensor(ranges, dtype=torch.int64, device="cpu").view(-1, 3)


def sum_of(prints: Iterable[int]) -> int:
    """The fingerprint of several tables together."""
    return (sum(prints) + 2**63) % 2**64 - 2**63  # as int64 adds


def start(table: Tensor) -> None:
    """Other threads begin to compute this thread's next `fingerprint`, if that is of this table.
    Its memory must stay allocated until that has returned."""
    if len(table):
        torch.ops.fused_resnet_native.fingerprint_start.default(table)


def fingerprint(table: Tensor) -> int:
    """The sum over all ranges of a hash of values and address; their memory must be allocated.
    0 without the native build."""
    if not len(table):
        return 0
    return torch.ops.fused_resnet_native.fingerprint.default(table)
