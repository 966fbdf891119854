"""Runs max pooling, and a stem with its pooling, on the activations between fused blocks."""

from __future__ import annotations

from typing import Any

import torch

from fused_resnet.fusion.pooling import pool_shape, window
from fused_resnet.kernels import registry
from fused_resnet.kernels.cuda.convolution import GpuConv

from .plan import Flow, Plan


def max_pool(pool: Any, flow: Flow) -> Flow | None:
    """Runs `pool`; None where the kernel does not support it."""
    if pool_shape(pool, flow.x.shape) is None:
        return None
    kernel, stride, padding = window(pool)
    gpu = registry.target(flow.x.device).vendor != "cpu"
    run = torch.max_pool2d if gpu else torch.ops.fused_resnet_native.max_pool2d
    return Flow(run(flow.x, kernel, stride, padding), True)


def run_stem(plan: Plan, pool: Any, flow: Flow) -> Flow | None:
    """Runs the stem and its pooling, as one kernel if there is one; None if either cannot run."""
    (conv,) = plan.convs
    plain = window(pool) == [[3, 3], [2, 2], [1, 1]] and pool_shape(
        pool, plan.shapes(flow.x.shape)[-1]
    )
    if plain and isinstance(conv, GpuConv) and conv.pools(flow.x):
        return Flow(conv.run_pooled(flow.x), True)
    return max_pool(pool, plan.run(flow))
