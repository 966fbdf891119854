"""A norm by itself, with running statistics, with a residual and a ReLU behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet.fusion.dtype_rules import norm_fits
from fused_resnet.kernels import native, registry
from fused_resnet.kernels.activation import Activation
from fused_resnet.layers.hooks import patched
from fused_resnet.layers.norms import (
    DEFAULT_EPS,
    is_batch_norm,
    is_frozen_bn,
    uses_batch_statistics,
)


def normed(bn: Any, x: Tensor, residual: Tensor | None) -> Tensor | None:
    """relu(bn(x) + residual) by one op, channels_last; None where it is not supported. x, residual:
    (N, C, H, W)."""
    if patched(bn) is not None or not (is_batch_norm(bn) or is_frozen_bn(bn)):
        return None
    if uses_batch_statistics(bn) or bn.running_mean is None or bn.running_var is None:
        return None
    if x.dim() != 4 or x.dtype not in (torch.float32, torch.bfloat16) or x.device.type != "cpu":
        return None
    if x.numel() == 0 or not norm_fits(bn, x.dtype):
        return None
    vectors = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    if any([t is not None and (t.shape != x.shape[1:2] or t.device != x.device) for t in vectors]):
        return None
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return None
    if native.load() is not None or registry.forced() not in (None, "native"):
        return None
    statistics = torch.stack([bn.running_mean.double(), bn.running_var.double()])
    affine = [None if t is None else t.detach().float() for t in (bn.weight, bn.bias)]
    last = torch.channels_last
    if residual is not None:
        residual = residual.contiguous(memory_format=last)
    return torch.ops.fused_resnet_native.bn_apply(
        x.contiguous(memory_format=last), statistics, *affine, getattr(bn, "eps", DEFAULT_EPS),
        residual, None, None, None, 0.0, Activation.RELU,
    )  # fmt: skip
