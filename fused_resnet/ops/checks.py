"""Argument checks of the ops. Errors name the op, the argument, the expected and actual values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def describe(t: Tensor | None) -> str:
    """t's dtype, shape and device, for the end of an error message."""
    return "None" if t is None else f"{str(t.dtype)[6:]} of shape {tuple(t.shape)} on {t.device}"


def require(condition: bool, op: str, message: str, error: type[Exception] = RuntimeError) -> None:
    if not condition:
        raise error(f"{op}: {message}")


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
    """Requires t to be None, or a tensor of x's dtype and device with the given shape."""
    if t is None:
        return
    dtype = str(x.dtype)[6:]
    require(
        tuple(t.shape) == tuple(shape) and t.dtype == x.dtype and t.device == x.device,
        op,
        f"{name} must be {dtype} of shape {tuple(shape)} on {x.device}, got {describe(t)}",
    )


def check_channel(op: str, name: str, t: Tensor | None, x: Tensor, count: Any) -> None:
    """Requires t to be None, or a floating (count,) tensor on x's device."""
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
