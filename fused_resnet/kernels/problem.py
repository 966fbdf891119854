"""A convolution seen as a matrix product: what GPU kernels are chosen by."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """stride, padding and dilation in pixels, over height and width."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def geometry_of(*sizes: Sequence[int]) -> Geometry:
    """From stride, padding and dilation as an op's arguments give them."""
    pairs = [(int(size[0]), int(size[1])) for size in sizes]
    return Geometry(*pairs)


class Problem(NamedTuple):
    """One convolution as a matrix product: M = N * P * Q pixels, K outputs, groups times C * R * S
    products each; stride over the width, which decides what a row of a tile reads; and what the
    operands are."""

    M: int
    K: int
    C: int  # per group
    R: int
    S: int
    groups: int
    stride: int
    operands: str  # "bfloat16", "float16", "tf32" or "float32"


def operands_of(dtype: torch.dtype) -> str:
    """What is multiplied (see `Problem`): TF32 only where PyTorch's own switch allows it."""
    if dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        return "tf32"
    return str(dtype).removeprefix("torch.")


class Layer(NamedTuple):
    """A convolution of a model: x's, the weight's and y's shape, and how they meet."""

    x_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    geometry: Geometry
    groups: int


def problem_of(layer: Layer, dtype: torch.dtype) -> Problem:
    """The matrix product that a layer is, of operands of `dtype`."""
    K, C, R, S = layer.weight_shape
    N, _, P, Q = layer.y_shape
    stride = layer.geometry.stride[1]
    return Problem(N * P * Q, K, C, R, S, layer.groups, stride, operands_of(dtype))


def layers_of(model: str, batch: int, size: int = 224) -> list[Layer]:
    """Every convolution of a model of the family, in order, for `batch` images of size x size."""
    from fused_resnet.models.resnet import get_model

    found: list[Layer] = []

    def see(conv: Any, inputs: Any, output: Tensor) -> None:
        geometry = Geometry(conv.stride, conv.padding, conv.dilation)
        x_shape, y_shape = tuple(inputs[0].shape), tuple(output.shape)
        found.append(Layer(x_shape, tuple(conv.weight.shape), y_shape, geometry, conv.groups))

    with torch.device("meta"), torch.no_grad():
        net = get_model(model).eval()
        for m in net.modules():
            if isinstance(m, torch.nn.Conv2d):
                m.register_forward_hook(see)
        net(torch.empty(batch, 3, size, size))
    return found


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; in an interpreter or emulator, few, so that more than one round of tiles is met."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; in an interpreter or emulator, Hopper's."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def channels_last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    _, C, H, W = shape
    return H * W * C, 1, W * C, C


def channels_last_empty(shape: Sequence[int], x: Tensor) -> Tensor:
    """An uninitialised channels_last tensor of x's dtype on its device."""
    strides = channels_last_strides(shape)
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)


def channels_last(t: Tensor) -> Tensor:
    """t, or a copy of it, in channels_last: with those very strides. PyTorch leaves the strides of
    dimensions of size one as they come, and kernels read them all."""
    t = t.contiguous(memory_format=torch.channels_last)
    strides = channels_last_strides(t.shape)
    return t if t.stride() == strides else t.as_strided(t.shape, strides)
