"""The registry of kernel providers, and the choice among them.

A provider is one backend's kernels for tensors of one device type. It is asked one question:
whether it supports a problem on a target, else why not. `providers` registers this package's
providers; tests register more. `PREFERENCE` orders the backends per device type and op. The first
one that supports a problem computes it, unless `use_backend` or FUSED_RESNET_BACKEND forces one.

    native      this package's C++ and CUDA kernels; unsupported convolutions fall back to vendor
    triton      this package's Triton kernels, on GPUs
    vendor      fused ops of PyTorch: oneDNN's on the CPU, cuDNN's on GPUs
    reference   the eager specification; if forced, every block of the ResNet family also runs
                exactly torchvision's path
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch

from fused_resnet.dtypes import convolves_in_tf32

from .activation import Activation
from .convolution import Kind
from .problem import Problem
from .target import Target, target_of

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


class Provider:
    """One backend's kernels for tensors of one device type; the base class of all providers."""

    ops: tuple[str, ...] = OPS
    activations: tuple[Activation, ...] = (Activation.NONE, Activation.RELU)
    # Of GPU kernels: what the measured winners of `tuning` are stored under.
    name = ""
    # Why this provider's convolutions run in the ops alone and not in blocks of models, or None.
    no_blocks: str | None = None

    def supports(self, problem: Problem, target: Target) -> str | None:
        """None if it computes the problem, one of `ops`, on the target, else the reason in one
        line. Must be cheap or cached: it is asked once per problem."""
        raise NotImplementedError

    def target(self, device: torch.device) -> Target:
        """What its kernels run on for tensors on `device`."""
        return target_of(device)

    def kernels(self) -> Any:
        """A namespace of functions named after `ops`, or None if only convolutions are provided."""
        return None

    def convolution(self) -> Kind | None:
        """The class of its fused convolutions, for conv_bn_relu and inference."""
        return None

    def gpu_convolution(self) -> Any:
        """The module of its convolution on GPUs (see `tuning`), imported on first use, or None."""
        return None

    def passes(self) -> Any:
        """Its passes of a training step (training/protocol.py); None: those of the ops."""
        return None


_providers: dict[tuple[str, str], Provider] = {}
_forced: ContextVar[str | None] = ContextVar("fused_resnet_backend", default=None)
_candidates: dict[Any, tuple[str, ...]] = {}
_MAX_CANDIDATES = 4096


def register(backend: str, device_type: str, provider: Provider) -> None:
    """Adds a provider. A backend that `PREFERENCE` does not list is used only if forced."""
    _providers[backend, device_type] = provider
    _candidates.clear()
    gpu_provider.cache_clear()


def names() -> tuple[str, ...]:
    """The backends in order of registration; the last of this package's is "reference"."""
    return tuple(dict.fromkeys(backend for backend, _ in _providers))


def provider(backend: str, device_type: str) -> Provider:
    """The provider of `backend` for tensors on `device_type`."""
    return _providers[backend, device_type]


def kernels(backend: str, device_type: str) -> Any:
    """The kernels of `backend` in a namespace named after the ops, or None."""
    return provider(backend, device_type).kernels()


@functools.cache
def gpu_provider(name: str, device_type: str) -> Provider:
    """The provider of the GPU kernels called `name`, for tensors on `device_type`."""
    return next(p for (_, d), p in _providers.items() if (p.name, d) == (name, device_type))


def gpu_convolution(name: str) -> Any:
    """The module of the GPU convolution called `name` (see `tuning`)."""
    return gpu_provider(name, "cuda").gpu_convolution()


def missing(problem: Problem | str, backend: str, device_type: str) -> str | None:
    """None if `backend` supports the problem, or an op in general, for tensors on `device_type`,
    else the reason in one line."""
    problem = Problem(problem) if isinstance(problem, str) else problem
    if backend == "reference":
        return None
    entry = _providers.get((backend, device_type))
    if entry is None or problem.op not in entry.ops:
        return f"{backend} has no {problem.op} for {device_type}"
    if problem.activation not in entry.activations:
        return f"{backend} does not compute {problem.activation.name} for {device_type}"
    return entry.supports(problem, entry.target(torch.device(device_type)))


def _validate(name: str) -> str:
    if name not in names():
        raise ValueError(f"use_backend: name must be one of {', '.join(names())}, got {name!r}")
    reasons = []
    for (backend, device), entry in _providers.items():
        # The CPU's providers are registered first: asking those for GPUs initialises CUDA.
        for op in entry.ops if backend == name else ():
            reasons.append(missing(op, name, device))
            if reasons[-1] is None:
                return name
    raise RuntimeError(f"use_backend: {name!r} is not available: {reasons[0]}")


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


def choose(problem: Problem | str, device_type: str) -> str:
    """The name of the backend that computes the problem, or an op in general, on `device_type`."""
    return candidates(problem, device_type)[0]


def candidates(problem: Problem | str, device_type: str) -> tuple[str, ...]:
    """The backends that may compute the problem, in order of preference; only the first, if one is
    forced. The last resort is "reference"."""
    name = _forced.get() or _from_environment()
    # The answer of providers for GPUs depends on this switch (see `operands_of`).
    float32 = isinstance(problem, Problem) and problem.dtype == torch.float32
    on_gpu = device_type != "cpu" or name is not None
    tf32 = float32 and on_gpu and convolves_in_tf32()
    key = (problem, device_type, name, tf32)
    found = _candidates.get(key)
    if found is None:
        found = _find(problem, device_type)
        op = problem.op if isinstance(problem, Problem) else problem
        if found[0] not in (name, _order(op, device_type)[0]):
            _warn_if_missing(op, device_type)
        if len(_candidates) >= _MAX_CANDIDATES:
            _candidates.clear()
        _candidates[key] = found
    return found


def _find(problem: Problem | str, device_type: str) -> tuple[str, ...]:
    problem = Problem(problem) if isinstance(problem, str) else problem
    order = _order(problem.op, device_type)
    name = forced()
    if name is not None and missing(problem.op, name, device_type) is None:
        # A problem that it does not support falls back to those after it.
        order = order[order.index(name) :] if name in order else (name,)
        order = (*order, "reference")
        return (next(b for b in order if missing(problem, b, device_type) is None),)
    # oneDNN uses AMX tiles for bfloat16 where the processor has them; the native kernel does not.
    amx = problem.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    if device_type == "cpu" and amx and "vendor" in order:
        order = tuple(dict.fromkeys(("vendor", *order)))
    order = order[: order.index("reference") + 1]
    return tuple([b for b in order if missing(problem, b, device_type) is None])


def _order(op: str, device_type: str) -> tuple[str, ...]:
    return PREFERENCE.get(device_type, {}).get(op, ("reference",))


def _warn_if_missing(op: str, device_type: str) -> None:
    """Warns once if the preferred backend of the op is unavailable."""
    reason = missing(op, _order(op, device_type)[0], device_type)
    if reason is not None:
        # The message does not name the fallback, so that each reason is reported once.
        warn_once(f"fused_resnet: {reason}; falling back to PyTorch's or other kernels")


@functools.cache
def warn_once(message: str) -> None:
    """Warns of each message once per process."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def convolution(problem: Problem, device_type: str) -> Kind | None:
    """The class of the fused convolution that computes the problem; None: the reference."""
    return _providers[candidates(problem, device_type)[0], device_type].convolution()


def compute_dtypes(dtype: torch.dtype, device_type: str) -> tuple[torch.dtype, ...]:
    """The dtypes in which a convolution of `dtype` tensors may compute, in order of preference.

    On the CPU one that no kernel computes in 16 bits is computed in float32, which is more accurate
    and, on processors without instructions for 16 bits, many times as fast as PyTorch's."""
    wider = device_type == "cpu" and dtype in (torch.float16, torch.bfloat16)
    return (dtype, torch.float32) if wider else (dtype,)


def conv_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype | None:
    """The dtype in which most fused convolutions of `dtype` tensors compute: one that every
    provider of it supports. None if there is none."""
    for problem in _common_convolutions(dtype, device_type):
        if choose(problem, device_type) != "reference":
            return problem.dtype
    return None


@functools.cache
def _common_convolutions(dtype: torch.dtype, device_type: str) -> list[Problem]:
    dtypes = compute_dtypes(dtype, device_type)
    return [Problem("conv_bn_relu", compute, (64, 64, 1, 1)) for compute in dtypes]


def convolutions(
    problems: Sequence[Problem], dtype: torch.dtype, device_type: str
) -> list[tuple[Problem, Kind]] | Problem:
    """The problems, of tensors of `dtype`, in the first compute dtype in which each has a fused
    convolution, with those; or the first problem that has none in `dtype`."""
    failed: Problem | None = None
    for compute in compute_dtypes(dtype, device_type):
        found: list[tuple[Problem, Kind]] = []
        for problem in problems:
            wanted = problem._replace(dtype=compute)
            kind = convolution(wanted, device_type)
            if kind is None:
                failed = failed or problem
                break
            found.append((wanted, kind))
        else:
            return found
    return failed or problems[0]


def target(device: torch.device) -> Target:
    """What the kernels for tensors on `device` run on: the forced provider's target, if it has
    kernels for the device, else the device itself."""
    entry = _providers.get((forced() or "", device.type))
    return target_of(device) if entry is None else entry.target(device)


def table(device_type: str) -> list[dict[str, str | None]]:
    """One row per op and backend: whether it is in use on `device_type`, and why it is missing."""
    return [
        {
            "op": op,
            "backend": backend,
            "serves": "yes" if backend == _find(op, device_type)[0] else "no",
            "missing": missing(op, backend, device_type),
        }
        for op in OPS
        for backend in _order(op, device_type)
    ]
