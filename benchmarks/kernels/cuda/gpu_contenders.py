"""What gpu_cases.py and gpu_train_cases.py are made of: a case, its contenders, what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.kernels import registry
from fused_resnet.kernels.problem import Layer

EPS = 1e-5
Call = Callable[[], list[Tensor]]


class Absent(RuntimeError):
    """This contender does not take part; the message says why."""


class Ready(NamedTuple):
    call: Call
    how: str = ""  # what was chosen: a tile


class Exact(NamedTuple):
    """A result in float64. terms: for sums that may cancel, the largest sum of magnitudes."""

    name: str
    value: Tensor
    terms: float = 0.0


@dataclass
class Case:
    op: str
    name: str
    times: int  # that the network has it
    moved_bytes: int  # what fused kernels cannot do without
    operations: int
    stock: Call
    exact: Callable[[], list[Exact]]
    makers: dict[str, Callable[[], Ready]] = field(default_factory=dict)
    images: Tensor | None = None  # those whose results are compared; None: all


class Place(NamedTuple):
    """A convolution in a network, what follows its batch norm, and whether it reads another norm's
    ReLU."""

    layer: Layer
    residual: bool
    relu: bool
    inside: bool


def randn(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """channels_last, of `like`'s dtype and device."""
    x = torch.randn(shape, dtype=like.dtype, device=like.device)
    return x.contiguous(memory_format=torch.channels_last)


def kernels(op: str, backend: str, device: torch.device) -> Any:
    """The kernels of "native" (CUDA; emulated where a test has loaded the emulator) or "triton"."""
    if backend == "native" and device.type == "cpu":
        if "emulated" not in registry.names():
            raise Absent("the CUDA kernels need a GPU")
        return registry.kernels("emulated", "cpu")
    reason = registry.missing(op, backend, device.type)
    if reason is not None:
        raise Absent(reason)
    return registry.kernels(backend, device.type)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()  # every case's function has one code: a few more, and it runs eagerly
    return torch.compile(function, dynamic=False, fullgraph=True)


def inference(maker: Callable[[], Ready]) -> Callable[[], Ready]:
    """Made and called without gradients."""

    def made() -> Ready:
        with torch.no_grad():
            ready = maker()
        return Ready(torch.no_grad()(ready.call), ready.how)

    return made


def title(layer: Layer) -> str:
    K, _, R, S = layer.weight_shape
    groups = f", {layer.groups} groups" if layer.groups > 1 else ""
    return f"{layer.x_shape} -> {K}, {R}x{S}/{layer.geometry.stride[0]}{groups}"


def bn_chain(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    y = y if residual is None else y + residual
    return torch.relu(y) if relu else y
