"""The one question that a module's forward asks: a fused result, or None.

Then the module runs torchvision's path. The decision is made per call, from

    the call     call.py: tracing, transforms, forced backend, device, kind of tensor
    the modules  description.py: exact types, no hooks, nothing patched
    the tensors  inference/make.py, training/prepare.py: kept in store.py while a guard holds
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet import layout
from fused_resnet.layers.norms import falls_back

from . import compiled
from .call import asked
from .description import Names
from .inference import network as inference
from .inference.chain import run_plan
from .inference.make import plan_for
from .network import NetworkNames
from .training import network as training
from .training.prepare import step_for
from .training.units import run_step


def run_block(block: nn.Module, names: Names, x: Tensor) -> Tensor | None:
    """A residual block's output (N, K, P, Q), or None: the caller runs torchvision's path."""
    if torch.compiler.is_compiling():
        return compiled.run(block, names, x)
    y = _block(block, names, x)
    if y is None:
        falls_back()
    return None if y is None else layout.normed(y, layout.memory_format(x))


def _block(block: nn.Module, names: Names, x: Tensor) -> Tensor | None:
    reason, differentiable = asked(block, x)
    if reason is not None:
        return None
    if not differentiable:
        plan = plan_for(block, names, x.dtype, x.device)
        if not isinstance(plan, str):
            return run_plan(plan, x)
    step = step_for(block, names, x)
    return None if isinstance(step, str) else run_step(step, x)


def run_network(model: Any, names: NetworkNames, x: Tensor) -> Tensor | None:
    """A network's logits (N, classes), fused as far as possible, or None: the caller runs
    torchvision's path. x: (N, C, H, W) of any layout."""
    if torch.compiler.is_compiling():
        return compiled.run(model, names, x)
    reason, differentiable = asked(model, x)
    if reason is not None:
        return None
    if model.training or differentiable:
        return training.run_network(model, names, x)
    return inference.run_network(model, names, x)
