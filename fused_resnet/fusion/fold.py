"""One scale and shift per channel from two modules: a convolution and the norm behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet.layers.norms import DEFAULT_EPS
from fused_resnet.ops.conv_norm_relu import fold_norm


def scale_and_shift(conv: Any, bn: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale, shift: (K,) of `dtype`, such that bn(conv(x)) = conv(x, weight) * scale + shift.

    by the formula of `fold_norm`.
    """
    eps = getattr(bn, "eps", DEFAULT_EPS)
    return fold_norm(conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var, eps, dtype)
