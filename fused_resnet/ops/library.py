"""What the ops share: the torch.library namespace, registration, and the provider's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_resnet.dtypes import accumulate_dtype
from fused_resnet.kernels import registry

LIBRARY = torch.library.Library("fused_resnet", "DEF")


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    grad: Callable[..., Any] | None = None,
) -> None:
    """Defines an op; registers its implementation for all devices, its fake and its derivative."""
    name = schema.split("(")[0]
    qualified = f"fused_resnet::{name}"
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if grad is not None:
        torch.library.register_autograd(qualified, grad, setup_context=save, lib=LIBRARY)


def kernels_for(op: str, x: Tensor) -> Any:
    """The kernels that serve `op` for x now, under the ops' names; None: the reference."""
    device = x.device.type
    backend = registry.choose(op, device)
    return None if backend == "reference" else registry.kernels(backend, device)


def in_transform() -> bool:
    """Inside torch.func's transforms (vmap, grad, jvp) or forward-mode AD, which trace through
    PyTorch's own operations only: the reference is composed of those."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def vector(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A (C,) parameter in the dtype that x accumulates in, contiguous."""
    return None if t is None else t.to(accumulate_dtype(x.dtype)).contiguous()


def per_channel(v: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, 1), to be broadcast over (N, C, H, W)."""
    return v.view(1, -1, 1, 1)
