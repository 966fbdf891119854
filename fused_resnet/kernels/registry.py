"""Which providers of kernels there are, and which of them serves an op.

A provider is one backend's kernels for one device type. `providers` lists this package's; tests
register more. Per device type and op, `PREFERENCE` orders the backends from best to last resort:
the first available one serves the op, unless `use_backend` or FUSED_RESNET_BACKEND forces one.

    native      this package's C++ (and CUDA) kernels; convolutions they do not cover are vendor's
    triton      this package's Triton kernels: on GPUs; on the CPU, in Triton's interpreter, only
                where forced
    vendor      fused ops that PyTorch carries: oneDNN's on the CPU, cuDNN's on GPUs
    reference   the eager specification; as a forced choice it also makes every block of the ResNet
                family run exactly torchvision's path
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
        # The order for problems that were not measured; `tuning` knows the fastest of the others.
        "conv_bn_relu": ("triton", "native", "vendor", "reference"),
    },
}


class Provider(NamedTuple):
    """One backend's kernels for one device type.

    missing: op -> None where it is available, else the reason in one line. kernels: a namespace of
    functions under the ops' names, or None where only convolutions are provided. convolution: the
    module of its convolution on GPUs (see `tuning`), imported when first used. for_gpus: kernels
    written for GPUs, whatever device their tensors are on. built_for: whether CUDA kernels were
    built for an architecture, as in TORCH_CUDA_ARCH_LIST. stands_for: the backend whose kernels
    these are, where they run elsewhere than on their device.
    """

    missing: Callable[[str], str | None]
    kernels: Callable[[], Any] | None = None
    convolution: Callable[[], Any] | None = None
    for_gpus: bool = False
    built_for: Callable[[str], bool] = lambda architecture: False
    stands_for: str | None = None


_providers: dict[tuple[str, str], Provider] = {}
_forced: ContextVar[str | None] = ContextVar("fused_resnet_backend", default=None)


def register(backend: str, device_type: str, provider: Provider) -> None:
    """Adds a provider. A backend that `PREFERENCE` does not list serves where it is forced."""
    _providers[backend, device_type] = provider
    missing.cache_clear()


def names() -> tuple[str, ...]:
    """The backends, in the order of their registration; the reference is the last of the package's
    own."""
    return tuple(dict.fromkeys(backend for backend, _ in _providers))


def provider(backend: str, device_type: str) -> Provider | None:
    """The backend's provider for such tensors, or None."""
    return _providers.get((backend, device_type))


def kernels(backend: str, device_type: str) -> Any:
    """The backend's kernels under the ops' names; None where it has none."""
    found = provider(backend, device_type)
    return None if found is None or found.kernels is None else found.kernels()


def stands_for(backend: str) -> str:
    """The backend whose kernels these are: `backend` itself, but for those that run elsewhere."""
    found = (p.stands_for for (name, _), p in _providers.items() if name == backend)
    return next(filter(None, found), backend)


@functools.cache
def missing(op: str, backend: str, device_type: str) -> str | None:
    """None when `backend` serves `op` on `device_type`, else the reason, in one line."""
    if backend == "reference":
        return None
    found = provider(backend, device_type)
    if found is None or not _may_serve(backend, op, device_type):
        return f"{backend} has no {op} for {device_type}"
    return found.missing(op)


def _may_serve(backend: str, op: str, device_type: str) -> bool:
    """Whether the table lists the backend for the op. One that it lists nowhere may serve all."""
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
        if backend == name and _may_serve(name, op, device)
    ]
    if all(reasons):
        raise RuntimeError(f"use_backend: {name!r} is not available: {reasons[0]}")
    return name


@functools.cache
def _from_environment() -> str | None:
    name = os.environ.get("FUSED_RESNET_BACKEND")
    return _validate(name) if name else None


def forced() -> str | None:
    """The backend that `use_backend` or FUSED_RESNET_BACKEND asks for, or None."""
    return _forced.get() or _from_environment()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within it, `name` serves every op that it provides; other ops keep their own order.

    name: "native", "triton", "vendor" or "reference". With "reference", models of the family run
    exactly torchvision's path. Raises ValueError for an unknown name and RuntimeError for a backend
    that is not available, saying how to get it. The choice belongs to the current thread (or task).
    """
    token = _forced.set(_validate(name))
    try:
        yield
    finally:
        _forced.reset(token)


def choose(op: str, device_type: str) -> str:
    """The name of the backend that serves `op` on `device_type` now."""
    return _forced_for(op, device_type) or _preferred_and_said(op, device_type)


def _forced_for(op: str, device_type: str) -> str | None:
    name = forced()
    return name if name is not None and missing(op, name, device_type) is None else None


@functools.cache
def _preferred(op: str, device_type: str) -> str:
    """The first available backend in the table."""
    order = PREFERENCE.get(device_type, {}).get(op, ("reference",))
    return next(name for name in order if missing(op, name, device_type) is None)


@functools.cache
def _preferred_and_said(op: str, device_type: str) -> str:
    """`_preferred`, with one warning where that is not the first choice."""
    first = PREFERENCE.get(device_type, {}).get(op, ("reference",))[0]
    reason = missing(op, first, device_type)
    if reason is not None:
        # The same message whichever backend serves instead, so that each cause is reported once.
        _say_once(f"fused_resnet: {reason}; PyTorch's or other kernels serve until then")
    return _preferred(op, device_type)


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def table(device_type: str) -> list[dict[str, str | None]]:
    """One row per op and backend: which serves it on `device_type`, and why another does not."""
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


# --- kernels of GPUs ------------------------------------------------------------------------------


def gpu_kernels(device_type: str) -> bool:
    """Whether kernels of GPUs take such tensors: CUDA tensors; CPU tensors where a provider that
    runs such kernels on the CPU (an interpreter, an emulator) is forced."""
    if device_type == "cuda":
        return True
    name = forced()
    found = None if name is None else provider(name, device_type)
    return found is not None and found.for_gpus


def gpu_conv_backends() -> tuple[str, ...]:
    """The backends that may compute a convolution on a GPU now, the preferred one first."""
    name = forced()
    if name is None:
        return _preferred_gpu_conv_backends()
    return () if name == "reference" else (stands_for(name),)


@functools.cache
def _preferred_gpu_conv_backends() -> tuple[str, ...]:
    op, device = "conv_bn_relu", "cuda"
    found = (b for b in PREFERENCE[device][op] if missing(op, b, device) is None)
    return tuple(b for b in found if b != "reference")


def gpu_convolution(backend: str) -> Any:
    """The module of the backend's convolution on GPUs: CONFIG, covers, candidates, choose and
    run_conv (see `tuning`)."""
    found = provider(backend, "cuda")
    assert found is not None and found.convolution is not None, backend
    return found.convolution()


def cuda_kernels() -> Provider:
    """The provider of this package's CUDA kernels: the forced one where it stands for them."""
    name = forced()
    for (backend, _), found in _providers.items():
        if backend == name and found.stands_for == "native":
            return found
    return _providers["native", "cuda"]
