"""Runs the inference of a whole network, fused as far as possible."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import call_reason, wants_grad
from .inference.network import network_for
from .inference.walk import Walk
from .members import has_stem, stages
from .structure import STEM
from .training.network import head


def run_resnet(model: Any, x: Tensor) -> Tensor | None:
    """A network's logits (N, classes), fused as far as possible, or None: the caller runs
    torchvision's path.

    x: (N, C, H, W) of any layout. If the stem has no plan this returns None, and each block
    decides for itself when torchvision's path calls it.
    """
    if model.training or call_reason(x) is not None or wants_grad(model, x):
        return None
    network = network_for(model, x.dtype, x.device)
    pooled = None if network is None else network.run(model, x)
    if pooled is not None:
        return model.fc(torch.flatten(pooled, 1))
    walk = Walk(x)
    pool = model._modules.get("maxpool")
    if not has_stem(model):
        walk.call(model.conv1)
    elif not walk.fused(model, STEM):
        return None
    elif pool is not None and not walk.max_pool(pool):
        walk.call(pool)
    for stage in stages(model):
        walk.stage(stage)
    return head(model, walk.leave())
