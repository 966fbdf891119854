"""Measures the memory of one contender: its peak, and in training what is saved for backward."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from pathlib import Path

import torch
from torch import Tensor

from fused_resnet.kernels import native

from .contenders import Case, Step, build, make_data

CALLS = 3  # calls over which the peak is measured


def saved_bytes(step: Step) -> int:
    """Bytes of distinct storages that one training step saves for backward, without parameters."""
    parameters = {
        p.untyped_storage().data_ptr() for p in (step.model.parameters() if step.model else ())
    }
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def activation_peak_bytes(step: Step) -> int:
    """Peak bytes allocated by one training step on the CPU, above those allocated before it:
    activations, their gradients and workspace. Gradients of parameters are dropped as soon as they
    are computed: they are equal for all contenders, and grow while activations are freed.

    PyTorch's allocations are counted by its profiler, those of this package by its own pool. The
    result is the sum of both peaks: an upper bound, since they may be reached at different times.
    """
    # Silences the profiler's messages at start and end.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    before = native.memory().get("used_bytes", 0)
    native.reset_memory_peak()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with contextlib.ExitStack() as stack:
        for p in step.model.parameters() if step.model else ():
            stack.callback(p.register_post_accumulate_grad_hook(_drop).remove)
        with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            step()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak + native.memory().get("peak_bytes", 0) - before


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def cuda_peak_bytes(step: Step, owned_bytes: int, device: str) -> int:
    """Peak bytes of one call on a GPU: `owned_bytes` (weights, caches) plus what the call adds."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return owned_bytes + torch.cuda.max_memory_allocated(device) - before


def status_bytes(key: str) -> int:
    """VmRSS (resident now) or VmHWM (its peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"memory: /proc/self/status has no {key}")


def release_free_memory() -> None:
    """Return freed memory to the system, and reset the peak where the kernel allows it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def process_peak_bytes(contender: str, case: Case) -> int:
    """Peak resident bytes of `contender` on the CPU, in a process that has run nothing else.

    The peak during the calls minus the resident size after the libraries are loaded. It includes
    the weights, packed copies, activations and the data of compilers.
    """
    # A small eager step first, which loads the libraries and starts their threads.
    warm = Case("resnet18", 1, case.dtype)
    build("eager", warm, make_data(warm))()
    release_free_memory()
    base = status_bytes("VmRSS")
    data = make_data(case)
    step = build(contender, case, data)
    del data
    release_free_memory()
    for _ in range(CALLS):
        step()
    return status_bytes("VmHWM") - base
