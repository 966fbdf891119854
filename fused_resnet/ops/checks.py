"""What the ops check of their arguments. Errors name the op, the argument, what was expected and
what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def describe(t: Tensor | None) -> str:
    """t's dtype, shape and device, for the end of an error message."""
    return "None" if t is None else f"{str(t.dtype)[6:]} of shape {tuple(t.shape)} on {t.device}"


def require(condition: bool, op: str, what: str, error: type[Exception] = RuntimeError) -> None:
    if not condition:
        raise error(f"{op}: {what}")


def check_x(op: str, x: Tensor) -> None:
    require(
        x.dim() == 4,
        op,
        f"x must be 4-D (N, C, H, W), got {x.dim()}-D of shape {tuple(x.shape)}",
        ValueError,
    )
    require(
        x.dtype in _FLOATS,
        op,
        f"x must be float32, float16, bfloat16 or float64, got {str(x.dtype)[6:]}; convert it "
        "first, for images with x.float().div(255) and the model's normalisation",
    )


def check_same(op: str, name: str, t: Tensor | None, x: Tensor, shape: Sequence[Any]) -> None:
    """t: None, or a tensor of x's dtype and device and of the given shape."""
    if t is None:
        return
    dtype = str(x.dtype)[6:]
    require(
        tuple(t.shape) == tuple(shape) and t.dtype == x.dtype and t.device == x.device,
        op,
        f"{name} must be {dtype} of shape {tuple(shape)} on {x.device}, got {describe(t)}",
    )


def check_channel(op: str, name: str, t: Tensor | None, x: Tensor, count: Any) -> None:
    """t: None, or a floating (count,) tensor on x's device."""
    if t is None:
        return
    require(
        tuple(t.shape) == (count,) and t.is_floating_point() and t.device == x.device,
        op,
        f"{name} must be floating point of shape ({count},) on {x.device}, got {describe(t)}",
    )


def pair(op: str, name: str, v: int | Sequence[int]) -> list[int]:
    """3 -> [3, 3]; (3, 5) -> [3, 5]"""
    both = [v, v] if isinstance(v, (int, torch.SymInt)) else list(v)
    require(len(both) == 2, op, f"{name} must be one or two integers, got {v!r}", ValueError)
    return both


def conv_shape(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> list[int]:  # fmt: skip
    """The output's shape (N, K, P, Q); raises where the arguments do not fit together."""
    op = "conv_bn_relu"
    check_x(op, x)
    require(
        weight.dim() == 4,
        op,
        f"weight must be 4-D (K, C/groups, R, S), got shape {tuple(weight.shape)}",
    )
    require(
        weight.dtype == x.dtype and weight.device == x.device,
        op,
        f"weight must be {str(x.dtype)[6:]} on {x.device} as x is, got {describe(weight)}",
    )
    K, C_per_group, R, S = weight.shape
    N, C, H, W = x.shape
    require(
        groups > 0 and C_per_group * groups == C and K % groups == 0,
        op,
        f"weight of shape {tuple(weight.shape)} with groups={groups} takes "
        f"{C_per_group * groups} input channels, but x has {C} (shape {tuple(x.shape)})",
    )
    check_channel(op, "scale", scale, x, K)
    check_channel(op, "shift", shift, x, K)
    for name, values, least in (
        ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1),
    ):  # fmt: skip
        require(min(values) >= least, op, f"{name} must be at least {least}, got {tuple(values)}")
    sizes = []
    for axis, size, kernel, s, p, d in zip(
        "HW", (H, W), (R, S), stride, padding, dilation, strict=True
    ):
        extent = d * (kernel - 1) + 1
        require(
            size + 2 * p >= extent and size > 0,
            op,
            f"{axis} of x must be positive and, padded, at least the kernel's extent: got "
            f"{size} + 2*{p} for an extent of {extent}",
        )
        sizes.append((size + 2 * p - extent) // s + 1)
    shape = [N, K, *sizes]
    check_same(op, "residual", residual, x, shape)
    return shape
