"""Shared by gpu_cases.py and gpu_train_cases.py: benchmark cases and their contenders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.kernels import registry
from fused_resnet.kernels.problem import Problem

EPS = 1e-5
Call = Callable[[], list[Tensor]]


class Absent(RuntimeError):
    """The contender is unavailable; the message says why."""


class Prepared(NamedTuple):
    """A contender, ready to be timed."""

    call: Call
    how: str = ""  # the chosen configuration, e.g. a tile


class Exact(NamedTuple):
    """A float64 result. terms: for sums with cancellation, the largest sum of magnitudes."""

    name: str
    value: Tensor
    terms: float = 0.0


@dataclass
class Case:
    op: str
    name: str
    times: int  # occurrences in the network
    moved_bytes: int  # minimum memory traffic of fused kernels
    operations: int
    stock: Call
    exact: Callable[[], list[Exact]]
    contenders: dict[str, Callable[[], Prepared]] = field(default_factory=dict)
    images: Tensor | None = None  # indices of the compared images; None: all


class Place(NamedTuple):
    """A convolution in a network. residual, relu: what follows its batch norm; inside: its input is
    the ReLU output of another norm in the block."""

    layer: Problem
    residual: bool
    relu: bool
    inside: bool


def randn(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Random channels_last tensor with the dtype and device of `like`."""
    x = torch.randn(shape, dtype=like.dtype, device=like.device)
    return x.contiguous(memory_format=torch.channels_last)


def kernels(op: str, backend: str, device: torch.device) -> Any:
    """The kernels of "native" (CUDA, or the emulator if a test has loaded it) or "triton"."""
    if backend == "native" and device.type == "cpu":
        if "emulated" not in registry.names():
            raise Absent("the CUDA kernels require a GPU")
        return registry.kernels("emulated", "cpu")
    reason = registry.missing(op, backend, device.type)
    if reason is not None:
        raise Absent(reason)
    return registry.kernels(backend, device.type)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()  # all cases compile the same code object: avoid the recompile limit
    return torch.compile(function, dynamic=False, fullgraph=True)


def inference(prepare: Callable[[], Prepared]) -> Callable[[], Prepared]:
    """Prepare and call without gradients."""

    def without_grad() -> Prepared:
        with torch.no_grad():
            prepared = prepare()
        return Prepared(torch.no_grad()(prepared.call), prepared.how)

    return without_grad


def title(layer: Problem) -> str:
    K, _, R, S = layer.weight_shape
    g = layer.geometry
    groups = f", {g.groups} groups" if g.groups > 1 else ""
    return f"{layer.x_shape} -> {K}, {R}x{S}/{g.stride[0]}{groups}"


def bn_chain(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    y = y if residual is None else y + residual
    return torch.relu(y) if relu else y
