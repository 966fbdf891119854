"""Folds a convolution's bias and the following norm into one scale and shift per channel."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fused_resnet.kernels import cache
from fused_resnet.layers.hooks import is_fsdps


def scale_and_shift(conv: Any, bn: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale, shift: (K,) of `dtype`, such that bn(conv(x)) = conv(x, weight) * scale + shift.

    scale = weight / sqrt(running_var + eps),   shift = bias + (conv.bias - running_mean) * scale
    """
    scale = torch.rsqrt(bn.running_var.to(dtype) + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.to(dtype)
    mean = bn.running_mean.to(dtype)
    shift = (mean.neg() if conv.bias is None else conv.bias.to(dtype) - mean) * scale
    if bn.bias is not None:
        shift = shift + bn.bias.to(dtype)
    return scale, shift


# bn -> ((eps, dtype), stamp of the tensors, scale, shift). Cached because a convolution is packed
# per scale and shift: new tensors in each call would mean packing in each call.
_folded: WeakKeyDictionary[nn.Module, tuple[Any, Any, Tensor, Tensor]] = WeakKeyDictionary()


def cached_scale_and_shift(conv: Any, bn: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`scale_and_shift`, cached per norm while its tensors stay unchanged; not cached when they
    require a gradient."""
    tensors = [conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return scale_and_shift(conv, bn, dtype)
    now = cache.stamp(tensors)
    cached = _folded.get(bn)
    if cached is not None and cached[0] == (bn.eps, dtype) and cache.same_stamp(cached[1], now):
        return cached[2], cached[3]
    with torch.no_grad():
        scale, shift = scale_and_shift(conv, bn, dtype)
    if cache.cacheable(scale) and not is_fsdps(bn):
        _folded[bn] = ((bn.eps, dtype), now, scale, shift)
    return scale, shift
