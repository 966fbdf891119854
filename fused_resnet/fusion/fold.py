"""Folds a convolution's bias and the following norm into one scale and shift per channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet.layers.norms import DEFAULT_EPS


def scale_and_shift(conv: Any, bn: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale, shift: (K,) of `dtype`, such that bn(conv(x)) = conv(x, weight) * scale + shift.

    scale = weight / sqrt(running_var + eps),   shift = bias + (conv.bias - running_mean) * scale
    """
    scale = torch.rsqrt(bn.running_var.to(dtype) + getattr(bn, "eps", DEFAULT_EPS))
    if bn.weight is not None:
        scale = scale * bn.weight.to(dtype)
    mean = bn.running_mean.to(dtype)
    shift = (mean.neg() if conv.bias is None else conv.bias.to(dtype) - mean) * scale
    if bn.bias is not None:
        shift = shift + bn.bias.to(dtype)
    return scale, shift
