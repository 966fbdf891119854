"""The specification: one eager function per op, for any device and any floating dtype.

Every backend is held to these functions. They are written with differentiable PyTorch operations,
so that autograd through them defines every backward, and the second derivatives too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(v: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, 1), to be broadcast over (N, C, H, W)."""
    return v.view(1, -1, 1, 1)


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """y = max(x + residual, 0), with max(NaN, 0) = NaN.

    x, residual: (N, C, H, W) of one floating dtype; the sum is rounded once.
    Source: He et al. 2015, "Deep Residual Learning for Image Recognition", equation 1.
    """
    acc = accumulate_dtype(x.dtype)
    return (x.to(acc) + residual.to(acc)).relu().to(x.dtype)


def add_relu_backward(dy: Tensor, y: Tensor) -> Tensor:
    """dx = dresidual = dy where y > 0 or y is NaN, else 0 (torch's threshold_backward).

    dy, y: (N, C, H, W) of one floating dtype.
    """
    return torch.where(y <= 0, torch.zeros((), dtype=dy.dtype, device=dy.device), dy)


def bn_add_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Training batch normalisation, then the residual, then ReLU.

    mean[c] = sum x[:, c] / M,   var[c] = sum (x[:, c] - mean[c])^2 / M,   M = N*H*W
    y = relu((x - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c] + residual)

    x, residual: (N, C, H, W) of one floating dtype; weight, bias: (C,), None means 1 and 0.
    Returns y (N, C, H, W) in x's dtype, and mean and the *biased* variance, both (C,), in float32
    (float64 for float64 x). The variance and not 1/sqrt(var + eps) is returned because running_var
    is made from it, and invstd^-2 - eps cancels where var is much smaller than eps.
    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithm 1.
    """
    acc = accumulate_dtype(x.dtype)
    xa = x.to(acc)
    if x.numel() == 0:
        zeros = torch.zeros(x.shape[1], dtype=acc, device=x.device)
        return x.clone(), zeros, zeros.clone()
    mean = xa.mean((0, 2, 3))
    centred = xa - per_channel(mean)
    var = centred.square().mean((0, 2, 3))
    y = centred * per_channel(torch.rsqrt(var + eps))
    if weight is not None:
        y = y * per_channel(weight.to(acc))
    if bias is not None:
        y = y + per_channel(bias.to(acc))
    if residual is not None:
        y = y + residual.to(acc)
    if relu:
        y = y.relu()
    return y.to(x.dtype), mean, var


def bn_add_relu_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
    need_dx: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `bn_add_relu`, through mean and var as well.

    g = dy * (y > 0) if relu else dy,   xhat = (x - mean[c]) * invstd[c],   M = N*H*W
    dbias[c] = sum g,   dweight[c] = sum g * xhat,   dresidual = g
    dx = weight[c] * invstd[c] * (g - dbias[c] / M - xhat * dweight[c] / M)

    dy, x, y: (N, C, H, W); weight: (C,) or None (ones); mean, var: (C,) as the forward gave them.
    Returns dx, dweight, dbias, dresidual; what was not asked for is an empty tensor.
    Source: Ioffe and Szegedy 2015, section 3.
    """
    acc = accumulate_dtype(x.dtype)
    empty = x.new_empty(0)
    g = (add_relu_backward(dy, y) if relu and y is not None else dy).to(acc)
    if x.numel() == 0:
        zeros = torch.zeros(x.shape[1], dtype=acc, device=x.device)
        dx, dresidual = torch.zeros_like(x), torch.zeros_like(x)
        return (
            dx if need_dx else empty,
            zeros,
            zeros.clone(),
            dresidual if need_dresidual else empty.clone(),
        )
    invstd = torch.rsqrt(var.to(acc) + eps)
    xhat = (x.to(acc) - per_channel(mean.to(acc))) * per_channel(invstd)
    dbias = g.sum((0, 2, 3))
    dweight = (g * xhat).sum((0, 2, 3))
    dx = empty
    if need_dx:
        count = x.numel() // x.shape[1]
        gain = invstd if weight is None else invstd * weight.to(acc)
        dx = per_channel(gain) * (
            g - per_channel(dbias / count) - xhat * per_channel(dweight / count)
        )
        dx = dx.to(x.dtype)
    dresidual = g.to(dy.dtype) if need_dresidual else empty.clone()
    return dx, dweight, dbias, dresidual


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolution, inference batch normalisation as one multiply-add, residual, ReLU.

    y = relu(conv(x, weight) * scale[k] + shift[k] + residual),
    scale = bn.weight / sqrt(running_var + eps),   shift = bn.bias - running_mean * scale

    x: (N, C, H, W); weight: (K, C/groups, R, S); scale, shift: (K,) float32, float64 for float64
    x; residual: (N, K, P, Q) of x's dtype, or None. Returns (N, K, P, Q) in x's dtype; sums are
    kept in float32 and the result is rounded once.
    Source: Ioffe and Szegedy 2015, section 3.1 (inference), folded as in Jacob et al. 2018, 3.2.
    """
    acc = accumulate_dtype(x.dtype)
    y = F.conv2d(
        x.to(acc), weight.to(acc), None, tuple(stride), tuple(padding), tuple(dilation), groups
    )
    y = y * per_channel(scale.to(acc)) + per_channel(shift.to(acc))
    if residual is not None:
        y = y + residual.to(acc)
    if relu:
        y = y.relu()
    return y.to(x.dtype)
