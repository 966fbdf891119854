"""The processor that kernels are chosen for: vendor and architecture, not PyTorch's device string.

PyTorch's HIP builds call AMD's GPUs "cuda" too, and report compute capabilities for them that
resemble those of NVIDIA's.
"""

from __future__ import annotations

import contextlib
import functools
import re
from typing import Any, NamedTuple

import torch

from . import native


class Target(NamedTuple):
    """vendor: "nvidia" or "amd" for GPUs, else PyTorch's device type ("cpu"). architecture:
    "sm_90", "gfx942"; for the CPU the instruction set of its kernels, "avx512", "avx2" or
    "generic"; "none" without a device."""

    vendor: str
    architecture: str

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability of an NVIDIA GPU, (9, 0) for "sm_90"; (0, 0) of all others."""
        match = re.fullmatch(r"sm_(\d+)(\d)a?", self.architecture)
        return (int(match[1]), int(match[2])) if match and self.vendor == "nvidia" else (0, 0)


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target of kernels that run on `device` itself."""
    if device.type == "cpu":
        return Target("cpu", str(native.build_info().get("cpu_isa", "generic")))
    if device.type != "cuda":
        return Target(device.type, "none")
    vendor = "nvidia" if torch.version.hip is None else "amd"
    if not torch.cuda.is_available():
        return Target(vendor, "none")
    properties = torch.cuda.get_device_properties(device)
    if vendor == "amd":
        return Target(vendor, properties.gcnArchName.split(":")[0])  # "gfx942:sramecc+:xnack-"
    return Target(vendor, f"sm_{properties.major}{properties.minor}")


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current device of this thread: events, streams and Triton's kernels belong to
    the current one. "cuda" is that already."""
    named = device.type == "cuda" and device.index is not None
    return torch.cuda.device(device) if named else contextlib.nullcontext()


# Of device types that are no GPUs, for providers whose GPU kernels run on them.
MULTIPROCESSORS: dict[str, int] = {}


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of the GPU that kernels for `device` are launched for."""
    if device.type == "cuda":
        return _multiprocessors(device)
    return MULTIPROCESSORS.get(device.type, 1)
