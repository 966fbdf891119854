"""Batch norms: which statistics they use, and the update of running statistics after a step."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from fused_resnet.kernels.training.protocol import Passes

recomputing: ContextVar[bool] = ContextVar("fused_resnet_recomputing", default=False)
"""Whether backward is recomputing a segment: running statistics are then not updated again."""


def is_frozen_bn(m: nn.Module) -> bool:
    """torchvision.ops.FrozenBatchNorm2d, recognised without importing torchvision."""
    return type(m).__name__ == "FrozenBatchNorm2d" and type(m).__module__ == "torchvision.ops.misc"


def uses_batch_statistics(bn: Any) -> bool:
    """Whether bn would use batch statistics now, by the rule of BatchNorm2d.forward."""
    if is_frozen_bn(bn):
        return False
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def track(
    bn: Any, state: Any, count: int, update: Callable[..., None] = Passes.update_running
) -> None:
    """Updates a norm's running statistics after a step, as BatchNorm2d does.

    state: the batch's mean and biased variance over `count` values per channel, in the form that
    `update` requires."""
    if not (bn.training and bn.track_running_stats) or recomputing.get():
        return
    momentum = bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    with torch.no_grad():
        update(bn.running_mean, bn.running_var, state, momentum or 0.0, count)
