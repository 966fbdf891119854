"""Where numbers first stopped being finite: a step run once more, with hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..resnet import BasicBlock, Bottleneck


class NonFinite(RuntimeError):
    """The loss or a gradient is NaN or infinite; the message says in which step and where."""


def first_module(
    model: nn.Module, run: Callable[[], object], modules: list[tuple[str, nn.Module]]
) -> str | None:
    """The name of the first of `modules`, in the order in which `run` calls them, whose output is
    not finite; None where all are. Buffers of `model` are left as they were."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return look

    handles = [m.register_forward_hook(watch(n)) for n, m in modules]
    try:
        with kept_buffers(model), torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def locate(
    model: nn.Module, x: Tensor, run: Callable[[Tensor], object], *, inside: bool
) -> str | None:
    """What in a forward of x (N, C, H, W) is first not finite: "the input", "the weight of ..." or
    "the output of ...", None where all is finite.

    run: the forward, with autocast and everything. First hooks on whole blocks, which stay fused,
    as in the step that failed; then, where `inside`, on the layers, which then run by themselves.
    """
    if not x.isfinite().all():
        return "the input"
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if not bool(
            (value.full_tensor() if hasattr(value, "full_tensor") else value).isfinite().all()
        ):
            return f"the weight {name}, before the step,"
    blocks = [(n, m) for n, m in model.named_modules() if isinstance(m, (BasicBlock, Bottleneck))]
    outside = [(n, m) for n, m in model.named_children() if n in ("maxpool", "avgpool", "fc")]
    found = first_module(model, lambda: run(x), blocks + outside)
    if inside:
        leaves = [(n, m) for n, m in model.named_modules() if not any(m.children())]
        found = first_module(model, lambda: run(x), leaves) or found
    return None if found is None else f"the output of {found}"


def first_gradient(model: nn.Module) -> str | None:
    """The parameter whose gradient is not finite and came first in backward, or None."""
    for name, parameter in reversed(list(model.named_parameters())):
        grad = parameter.grad
        if grad is not None:
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            if not bool(grad.isfinite().all()):
                return name
    return None


@contextlib.contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Running statistics are afterwards what they were."""
    before = [b.clone() for b in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for b, value in zip(model.buffers(), before, strict=True):
                b.copy_(value)
