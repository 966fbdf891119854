"""Which layer's activations first were no finite numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_INPUT = "the input"


def first_non_finite(model: nn.Module, x: Tensor) -> str | None:
    """The name of the first module, in the order of a forward of `x`, whose output holds a NaN or
    an infinity; "the input" where x does; None where all is finite. Buffers are left as they were.

    The forward runs in any case: a model of many processes needs all of them.
    """
    found: list[str] = [] if x.isfinite().all() else [_INPUT]

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return look

    buffers = [b.clone() for b in model.buffers()]
    leaves = [(n, m) for n, m in model.named_modules() if not any(m.children())]
    handles = [m.register_forward_hook(watch(n)) for n, m in leaves]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for b, before in zip(model.buffers(), buffers, strict=True):
                b.copy_(before)
    return found[0] if found else None


def first_of(model: nn.Module, found: list[str | None]) -> str | None:
    """Of what `first_non_finite` told several processes, the one where it began."""
    order = [_INPUT, *(name for name, _ in model.named_modules())]
    return min((name for name in found if name is not None), key=order.index, default=None)
