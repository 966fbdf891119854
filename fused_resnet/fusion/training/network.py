"""A whole network in training: its stem, its head, and its stages in recomputed segments."""

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
    """The input of the first stage: a network's stem and pooling, or its first convolution."""
    return stem_and_pool(model, x) if has_stem(model) else model.conv1(x)


def head(model: Any, x: Tensor) -> Tensor:
    """The last stage's output (N, C, H, W) -> logits (N, classes)."""
    if not has_stem(model):
        y = run_norm(model.bn, model.relu, x)
        x = model.relu(model.bn(x)) if y is None else y
    return model.fc(torch.flatten(model.avgpool(x), 1))


def run_in_segments(model: Any, x: Tensor) -> Tensor | None:
    """A network's forward (N, classes) that saves only the inputs of segments of blocks.

    None where its activation memory is not "minimal", or where recomputing a segment would call
    hooks twice or update the statistics of norms that PyTorch computes twice."""
    if getattr(model, "activation_memory", "auto") != "minimal":
        return None
    if call_reason(x, model.training) is not None or not wants_grad(model, x):
        return None
    members = whole(model)
    if members is None or not counts_once(members[0], x):
        return None
    if has_stem(model):
        y = activation_memory.run_segment(
            partial(stem_and_pool, model), x, [model.conv1, model.bn1]
        )
    else:
        y = model.conv1(x)
    blocks = model.running() if hasattr(model, "running") else map(list, stages(model))
    return head(model, activation_memory.run_stages(list(blocks), y))
