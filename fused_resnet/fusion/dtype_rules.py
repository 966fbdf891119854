"""The dtypes that stock PyTorch would return and accept, given autocast's current state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet.kernels import registry


def output_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype that stock's convolution of a tensor of `dtype` would return now."""
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return dtype


def compute_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype | None:
    """The dtype in which a convolution of a tensor of `dtype` runs now; None: not supported."""
    return registry.conv_dtype(output_dtype(dtype, device_type), device_type)


def weights_fit(dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether stock's convolution would accept an x of `dtype` with this weight now."""
    if torch.is_autocast_enabled(weight.device.type):
        return (dtype == torch.float64) == (weight.dtype == torch.float64)
    return dtype == weight.dtype


def norm_fits(bn: Any, dtype: torch.dtype) -> bool:
    """Whether stock's batch norm would accept an input of `dtype` with the tensors of `bn`, all of
    its channels and on one device; a mean without a variance it would not."""
    weight, bias, mean, var = bn.weight, bn.bias, bn.running_mean, bn.running_var
    if (mean is None) != (var is None):
        return False
    first, C = None, getattr(bn, "num_features", None)
    for t in (weight, bias, mean, var):
        if t is None:
            continue
        first = t if first is None else first
        if t.dtype != dtype and t.dtype != torch.float32:
            return False
        if t.device != first.device or t.shape != (first.shape if C is None else (C,)):
            return False
    return True


def serves(batch_statistics: bool, x: Tensor) -> bool:
    """Whether this package's kernels support a unit (convolution and norm) with input x."""
    device = x.device.type
    op = "bn_add_relu" if batch_statistics else "conv_bn_relu"
    backend = registry.choose(op, device)
    if backend == "reference" or registry.provider(backend, device).no_blocks is not None:
        return False
    return batch_statistics or compute_dtype(x.dtype, device) is not None
