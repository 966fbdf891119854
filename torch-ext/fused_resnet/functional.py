"""The ops as functions, for inference: no gradients. What no kernel serves, PyTorch computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._ops import ops

RELU = 1
DTYPES = (torch.float32, torch.bfloat16)


def _served(x: Tensor, residual: Tensor | None) -> bool:
    same = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    on_cpu = x.device.type == "cpu" and (residual is None or residual.device.type == "cpu")
    return on_cpu and same and x.dim() == 4 and x.numel() > 0 and x.dtype in DTYPES


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """relu(x + residual), of tensors (N, C, H, W)."""
    if not _served(x, residual):
        return torch.relu(x + residual)
    last = torch.channels_last
    return ops.add_relu(x.contiguous(memory_format=last), residual.contiguous(memory_format=last))


def norm_add_relu(x: Tensor, norm: nn.Module, residual: Tensor | None = None) -> Tensor:
    """relu(norm(x) + residual) in one pass, where norm is a BatchNorm2d with running statistics."""
    running = type(norm) is nn.BatchNorm2d and not norm.training and norm.running_mean is not None
    if not (running and _served(x, residual)) or norm.running_mean.shape[0] != x.shape[1]:
        y = norm(x)
        return torch.relu(y if residual is None else y + residual)
    statistics = torch.stack([norm.running_mean.double(), norm.running_var.double()])
    vectors = [None if t is None else t.detach().float() for t in (norm.weight, norm.bias)]
    last = torch.channels_last
    if residual is not None:
        residual = residual.contiguous(memory_format=last)
    return ops.bn_apply(
        x.contiguous(memory_format=last), statistics, *vectors, norm.eps,
        residual, None, None, None, 0.0, RELU,
    )  # fmt: skip
