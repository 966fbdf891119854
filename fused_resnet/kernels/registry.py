"""The registry of kernel providers, and the choice of a backend for an op.

A provider is one backend's kernels for one device type. `providers` registers this package's
providers; tests register more. `PREFERENCE` orders the backends per device type and op. The first
available backend is used, unless `use_backend` or FUSED_RESNET_BACKEND forces one.

    native      this package's C++ and CUDA kernels; unsupported convolutions fall back to vendor
    triton      this package's Triton kernels: on GPUs; on the CPU, in Triton's interpreter, only
                if forced
    vendor      fused ops of PyTorch: oneDNN's on the CPU, cuDNN's on GPUs
    reference   the eager specification; if forced, every block of the ResNet family also runs
                exactly torchvision's path
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

OPS = ("add_relu", "bn_add_relu", "conv_bn_relu")

PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "add_relu": ("native", "reference", "triton"),
        "bn_add_relu": ("native", "reference", "triton"),
        "conv_bn_relu": ("native", "vendor", "reference", "triton"),
    },
    "cuda": {
        "add_relu": ("native", "triton", "reference"),
        "bn_add_relu": ("native", "triton", "reference"),
        # For problems without measurements; for the others `tuning` chooses the fastest.
        "conv_bn_relu": ("triton", "native", "vendor", "reference"),
    },
}


class Provider(NamedTuple):
    """One backend's kernels for one device type.

    missing: op -> None if it is available, else the reason in one line. kernels: a namespace of
    functions named after the ops, or None if only convolutions are provided. convolution: the
    module of the GPU convolution (see `tuning`), imported on first use. for_gpus: the kernels are
    written for GPUs, regardless of the device of their tensors. built_for: whether CUDA kernels
    were built for an architecture, named as in TORCH_CUDA_ARCH_LIST. emulates: the backend
    whose kernels these are, if they run on a device other than theirs.
    """

    missing: Callable[[str], str | None]
    kernels: Callable[[], Any] | None = None
    convolution: Callable[[], Any] | None = None
    for_gpus: bool = False
    built_for: Callable[[str], bool] = lambda architecture: False
    emulates: str | None = None


_providers: dict[tuple[str, str], Provider] = {}
_forced: ContextVar[str | None] = ContextVar("fused_resnet_backend", default=None)


def register(backend: str, device_type: str, provider: Provider) -> None:
    """Adds a provider. A backend that `PREFERENCE` does not list is used only if forced."""
    _providers[backend, device_type] = provider
    missing.cache_clear()


def names() -> tuple[str, ...]:
    """The backends in order of registration; the last of this package's is "reference"."""
    return tuple(dict.fromkeys(backend for backend, _ in _providers))


def provider(backend: str, device_type: str) -> Provider | None:
    """The provider of `backend` for tensors on `device_type`, or None."""
    return _providers.get((backend, device_type))


def kernels(backend: str, device_type: str) -> Any:
    """The kernels of `backend` in a namespace named after the ops, or None."""
    entry = provider(backend, device_type)
    return None if entry is None or entry.kernels is None else entry.kernels()


def emulated(backend: str) -> str:
    """The backend that `backend` emulates; `backend` itself if it is not an emulator."""
    backends = (p.emulates for (name, _), p in _providers.items() if name == backend)
    return next(filter(None, backends), backend)


@functools.cache
def missing(op: str, backend: str, device_type: str) -> str | None:
    """None if `backend` supports `op` on `device_type`, else the reason in one line."""
    if backend == "reference":
        return None
    entry = provider(backend, device_type)
    if entry is None or not _may_provide(backend, op, device_type):
        return f"{backend} has no {op} for {device_type}"
    return entry.missing(op)


def _may_provide(backend: str, op: str, device_type: str) -> bool:
    """Whether `PREFERENCE` lists the backend for the op, or does not list it for any op."""
    orders = PREFERENCE.get(device_type, {})
    return backend in orders.get(op, ()) or not any(backend in o for o in orders.values())


def _validate(name: str) -> str:
    if name not in names():
        raise ValueError(f"use_backend: name must be one of {', '.join(names())}, got {name!r}")
    if name == "reference":
        return name
    reasons = [
        missing(op, name, device)
        for backend, device in _providers
        for op in OPS
        if backend == name and _may_provide(name, op, device)
    ]
    if all(reasons):
        raise RuntimeError(f"use_backend: {name!r} is not available: {reasons[0]}")
    return name


@functools.cache
def _from_environment() -> str | None:
    name = os.environ.get("FUSED_RESNET_BACKEND")
    return _validate(name) if name else None


def forced() -> str | None:
    """The backend forced by `use_backend` or FUSED_RESNET_BACKEND, or None."""
    return _forced.get() or _from_environment()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context manager: forces backend `name` for every op that it provides.

    Other ops keep their default order. name: "native", "triton", "vendor" or "reference". With
    "reference", models of the ResNet family run exactly torchvision's path. Raises ValueError for
    an unknown name, and RuntimeError for an unavailable backend, with the reason. The choice
    applies to the current thread or asyncio task.
    """
    token = _forced.set(_validate(name))
    try:
        yield
    finally:
        _forced.reset(token)


def choose(op: str, device_type: str) -> str:
    """The name of the backend in use for `op` on `device_type`."""
    return _forced_for(op, device_type) or _preferred_with_warning(op, device_type)


def _forced_for(op: str, device_type: str) -> str | None:
    name = forced()
    return name if name is not None and missing(op, name, device_type) is None else None


@functools.cache
def _preferred(op: str, device_type: str) -> str:
    """The first available backend in `PREFERENCE`."""
    order = PREFERENCE.get(device_type, {}).get(op, ("reference",))
    return next(name for name in order if missing(op, name, device_type) is None)


@functools.cache
def _preferred_with_warning(op: str, device_type: str) -> str:
    """`_preferred`, with one warning if the first choice is unavailable."""
    first = PREFERENCE.get(device_type, {}).get(op, ("reference",))[0]
    reason = missing(op, first, device_type)
    if reason is not None:
        # The message does not name the fallback, so that each reason is reported once.
        _warn_once(f"fused_resnet: {reason}; falling back to PyTorch's or other kernels")
    return _preferred(op, device_type)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def table(device_type: str) -> list[dict[str, str | None]]:
    """One row per op and backend: whether it is in use on `device_type`, and why it is missing."""
    serving = {op: _forced_for(op, device_type) or _preferred(op, device_type) for op in OPS}
    return [
        {
            "op": op,
            "backend": backend,
            "serves": "yes" if backend == serving[op] else "no",
            "missing": missing(op, backend, device_type),
        }
        for op in OPS
        for backend in PREFERENCE.get(device_type, {}).get(op, ("reference",))
    ]


# --- GPU kernels ----------------------------------------------------------------------------------


def gpu_kernels(device_type: str) -> bool:
    """Whether GPU kernels process tensors on `device_type`: CUDA tensors, and CPU tensors if a
    provider that runs GPU kernels on the CPU (an interpreter or emulator) is forced."""
    if device_type == "cuda":
        return True
    name = forced()
    entry = None if name is None else provider(name, device_type)
    return entry is not None and entry.for_gpus


def gpu_conv_backends() -> tuple[str, ...]:
    """The backends allowed to compute a GPU convolution, in order of preference."""
    name = forced()
    if name is None:
        return _preferred_gpu_conv_backends()
    return () if name == "reference" else (emulated(name),)


@functools.cache
def _preferred_gpu_conv_backends() -> tuple[str, ...]:
    op, device = "conv_bn_relu", "cuda"
    available = (b for b in PREFERENCE[device][op] if missing(op, b, device) is None)
    return tuple(b for b in available if b != "reference")


def gpu_convolution(backend: str) -> Any:
    """The module of the GPU convolution of `backend`: CONFIG, covers, candidates, choose and
    run_conv (see `tuning`)."""
    entry = provider(backend, "cuda")
    assert entry is not None and entry.convolution is not None, backend
    return entry.convolution()


def cuda_kernels() -> Provider:
    """The provider of this package's CUDA kernels: the forced one if it emulates them."""
    name = forced()
    for (backend, _), entry in _providers.items():
        if backend == name and entry.emulates == "native":
            return entry
    return _providers["native", "cuda"]
