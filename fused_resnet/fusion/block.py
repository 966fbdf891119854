"""Runs a residual block on the inference or the training path."""

from __future__ import annotations

from torch import Tensor, nn

from fused_resnet import layout

from .call import call_reason, wants_grad
from .inference.plan import enter, leave
from .inference.plan_cache import plan_for
from .structure import Names
from .training.units import run_units


def run_block(block: nn.Module, names: Names, x: Tensor) -> Tensor | None:
    """A residual block's output (N, K, P, Q), or None: the caller runs torchvision's path."""
    if call_reason(x, block.training) is not None:
        return None
    if wants_grad(block, x):
        return run_units(block, names, x)
    plan = plan_for(block, names, x.dtype, x.device)
    if isinstance(plan, str):
        return run_units(block, names, x)
    if not plan.shapes(x.shape):
        return None
    return leave(plan.run(enter(x, plan)).x, x.dtype, layout.memory_format(x))
