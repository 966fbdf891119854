"""Measures the memory of one contender: its peak, and in training what is saved for backward."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_resnet.kernels import native

from .contenders import Case, Step, build, make_data

__all__ = ["activation_peak_bytes", "cuda_peak_bytes", "fresh_process_peak_bytes", "saved_bytes"]

CALLS = 3  # calls over which the peak is measured
TIMEOUT_S = 600


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
    parameters = list(step.model.parameters()) if step.model else []
    handles = [p.register_post_accumulate_grad_hook(_drop) for p in parameters]
    # Silences the profiler's messages at start and end.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    before = native.memory().get("used_bytes", 0)
    native.reset_memory_peak()
    try:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            step()
    finally:
        for handle in handles:
            handle.remove()
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


def fresh_process_peak_bytes(contender: str, case: Case, threads: int) -> int:
    """Peak resident bytes of `contender` on the CPU, measured in a new process.

    The peak during the calls minus the resident size after the libraries are loaded. It includes
    the weights, packed copies, activations and the data of compilers.
    """
    request = json.dumps({"contender": contender, "case": asdict(case), "threads": threads})
    command = [sys.executable, "-m", "fused_resnet.bench.memory", request]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"memory: {contender} on {case.label} failed: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def _status_bytes(key: str) -> int:
    """VmRSS (resident now) or VmHWM (its peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"memory: /proc/self/status has no {key}")


def _release_free_memory() -> None:
    """Return freed memory to the system, and reset the peak where the kernel allows it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _measure(request: dict[str, Any]) -> dict[str, int]:
    torch.set_num_threads(request["threads"])
    case = Case(**request["case"])
    # A small eager step first, which loads the libraries and starts their threads.
    warm = Case("resnet18", 1, case.dtype)
    build("eager", warm, make_data(warm))()
    _release_free_memory()
    base = _status_bytes("VmRSS")
    data = make_data(case)
    step = build(request["contender"], case, data)
    del data
    _release_free_memory()
    for _ in range(CALLS):
        step()
    return {"peak_bytes": _status_bytes("VmHWM") - base, "base_bytes": base}


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
