"""Helpers of all ops: the torch.library namespace, registration, and the choice of kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_resnet.kernels import registry

LIBRARY = torch.library.Library("fused_resnet", "DEF")


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    grad: Callable[..., Any] | None = None,
) -> None:
    """Defines an op and registers its implementation, fake implementation and derivative."""
    name = schema.split("(")[0]
    qualified = f"fused_resnet::{name}"
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if grad is not None:
        torch.library.register_autograd(qualified, grad, setup_context=save, lib=LIBRARY)


def kernels_for(op: str, x: Tensor) -> Any:
    """The kernels in use for `op` on x's device, named after the ops; None: the reference."""
    device = x.device.type
    backend = registry.choose(op, device)
    return None if backend == "reference" else registry.kernels(backend, device)


def in_transform() -> bool:
    """Whether a torch.func transform (vmap, grad, jvp) or forward-mode AD is active. They trace
    only PyTorch's own operations, of which the reference is composed."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def by_formula(dy: Tensor) -> bool:
    """Whether a backward is computed by differentiable operations: for create_graph=True, or for a
    batch of vectors dy at once."""
    functorch = torch._C._functorch
    batched = functorch.is_batchedtensor(dy) or functorch.is_legacy_batchedtensor(dy)
    return torch.is_grad_enabled() or batched


def differentiable_gradients(
    formula: Callable[..., Tensor], operands: Sequence[Any], needs: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    """Gradients for dy of y = formula(*operands), None where not needed; differentiable ones where
    gradients are enabled. formula consists of PyTorch's differentiable operations, which also take
    a dy of a batch of vectors (`torch.autograd.grad` with is_grads_batched).

    They are partial derivatives, with respect to aliases of the operands: gradients with respect to
    the operands themselves would include those through other operands computed from them."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [t.view_as(t) if need else t for t, need in zip(operands, needs, strict=True)]
        inputs = [t for t, need in zip(aliases, needs, strict=True) if need]
        if not inputs:
            return [None] * len(needs)
        y = formula(*aliases)
        grads = iter(torch.autograd.grad(y, inputs, dy, create_graph=differentiable))
    return [next(grads) if need else None for need in needs]


def per_channel(v: Tensor) -> Tensor:
    """(C,) -> (C, 1, 1), broadcastable to (N, C, H, W)."""
    return v[:, None, None]
