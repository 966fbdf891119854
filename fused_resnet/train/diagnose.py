"""Find the layer whose activations are the first to be non-finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.layers.hooks import keeping_buffers, watching

_INPUT = "the input"


def first_non_finite(model: nn.Module, x: Tensor) -> str | None:
    """The name of the first module, in the order of the forward of `x`, whose output contains a NaN
    or an infinity; "the input" if x does; None if everything is finite. Buffers are restored.

    The forward always runs: a model on several processes needs all of them.
    """
    names: list[str] = [] if x.isfinite().all() else [_INPUT]

    def see(name: str, output: Any) -> None:
        if not names and isinstance(output, Tensor) and not output.isfinite().all():
            names.append(name)

    leaves = [(n, m) for n, m in model.named_modules() if not any(m.children())]
    with torch.no_grad(), keeping_buffers(model), watching(leaves, see):
        model(x)
    return names[0] if names else None


def first_of(model: nn.Module, names: list[str | None]) -> str | None:
    """The first, in module order, of the results of `first_non_finite` on several processes."""
    order = [_INPUT, *(name for name, _ in model.named_modules())]
    return min((name for name in names if name is not None), key=order.index, default=None)
