"""What stock PyTorch would do with dtypes now: what it answers in, and what it accepts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet.kernels import registry
from fused_resnet.kernels.dispatch import conv_dtype


def output_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype in which stock's convolution of such a tensor of `dtype` would answer now."""
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return dtype


def compute_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype | None:
    """What convolutions of such tensors of `dtype` are computed in now; None: not served."""
    return conv_dtype(output_dtype(dtype, device_type), device_type)


def weights_fit(dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether stock's convolution would take an x of `dtype` with this weight now."""
    if torch.is_autocast_enabled(weight.device.type):
        return (dtype == torch.float64) == (weight.dtype == torch.float64)
    return dtype == weight.dtype


def norm_fits(bn: Any, dtype: torch.dtype) -> bool:
    """Whether stock's batch norm would take an input of `dtype` with this norm's tensors."""
    tensors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return all(t is None or t.dtype in (dtype, torch.float32) for t in tensors)


def serves(batch_statistics: bool, x: Tensor) -> bool:
    """Whether kernels of ours serve a unit whose input is x."""
    device = x.device.type
    op = "bn_add_relu" if batch_statistics else "conv_bn_relu"
    backend = registry.choose(op, device)
    if backend == "reference" or (backend == "triton" and device == "cpu"):
        return False
    dtype = output_dtype(x.dtype, device)
    return batch_statistics or conv_dtype(dtype, device) is not None
