"""A whole network in training: its ends, and its stages in segments that backward recomputes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_resnet.fusion.call import call_reason, wants_grad
from fused_resnet.fusion.members import has_stem, stages, whole

from . import activation_memory
from .stem import stem_and_pool
from .units import counts_once, run_norm


def enter_stages(model: Any, x: Tensor) -> Tensor:
    """What a network's first stage reads, by whichever path takes it."""
    return stem_and_pool(model, x) if has_stem(model) else model.conv1(x)


def head(model: Any, x: Tensor) -> Tensor:
    """The last stage's output (N, C, H, W) -> (N, classes)."""
    if not has_stem(model):
        y = run_norm(model.bn, model.relu, x)
        x = model.relu(model.bn(x)) if y is None else y
    return model.fc(torch.flatten(model.avgpool(x), 1))


def run_in_segments(model: Any, x: Tensor) -> Tensor | None:
    """A network's forward (N, classes) that keeps the inputs of segments of blocks alone, where its
    activation memory is "minimal"; None where it is not, or where running a segment once more would
    count or call something twice: hooks, or norms that PyTorch has to compute."""
    if getattr(model, "activation_memory", "auto") != "minimal":
        return None
    if call_reason(x, model.training) is not None or not wants_grad(model, x):
        return None
    found = whole(model)
    if found is None or not counts_once(found[0], x):
        return None
    if has_stem(model):
        y = activation_memory.run_segment(
            partial(stem_and_pool, model), x, [model.conv1, model.bn1]
        )
    else:
        y = model.conv1(x)
    running = model.running() if hasattr(model, "running") else map(list, stages(model))
    return head(model, activation_memory.run_stages(list(running), y))
