"""Global average pooling on the CPU, and a network's head as one op: it, flattening and a linear
layer.

It reads the layer's own weight at every call: nothing is packed, so nothing can be stale. Its
threads are those of the convolutions before it, and it takes their layout, so that after the last
convolution nothing is converted and no other threads are woken."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.kernels import native, registry
from fused_resnet.layers import originals
from fused_resnet.layers.hooks import patched

_DTYPES = (torch.bfloat16, torch.float16)


def is_global_pool(module: Any) -> bool:
    """Whether the module is global average pooling."""
    return type(module) is nn.AdaptiveAvgPool2d and is_one_pixel(module.output_size)


def is_one_pixel(size: Any) -> bool:
    """Whether the output size of a pooling is 1 x 1."""
    return size in (1, (1, 1), [1, 1])


def run_head(pool: Any, linear: Any, x: Tensor) -> Tensor | None:
    """linear(flatten(pool(x), 1)) without gradients, for x (N, C, H, W): y (N, K) of x's dtype.
    None where that takes more than the op: other modules, hooks, another device or dtype."""
    if not is_global_pool(pool) or x.dim() != 4 or not is_read(linear, x, x.shape[1]):
        return None
    if patched(pool) or not x.numel() or not _is_native():
        return None
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.fused_resnet_native.mean_linear(x, linear.weight, linear.bias)


def run_mean(x: Any) -> Tensor | None:
    """The mean over the pixels of x (N, C, H, W), channels_last, of 16 bits, without gradients:
    (N, C), of x's dtype. PyTorch first copies x to float32, which takes 1.8 to 3.3 times as long,
    and more where the copy is of memory that is new; in float32 it is as fast. None where that
    takes more than the op."""
    if type(x) is not Tensor or x.device.type != "cpu" or x.dim() != 4 or not x.numel():
        return None
    if x.dtype not in _DTYPES or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    if torch.is_autocast_enabled("cpu") or (torch.is_grad_enabled() and x.requires_grad):
        return None
    if originals.HEAD.replaced() is not None or not _is_native():
        return None
    return torch.ops.fused_resnet_native.mean_pixels(x).to(x.dtype)


def is_read(linear: Any, x: Tensor, channels: int) -> bool:
    """Whether an op may compute the layer for x on the CPU, of `channels` channels, by reading its
    parameters: it is an unpatched nn.Linear, and neither autograd nor autocast has a part in it."""
    if type(linear) is not nn.Linear or x.device.type != "cpu" or patched(linear):
        return False
    weight, bias = linear.weight, linear.bias
    if not _is_plain(weight, x, (channels,)):
        return False
    if bias is not None and not (_is_plain(bias, x, ()) and len(bias) == len(weight)):
        return False
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.get_autocast_dtype("cpu"):
        return False
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        return False
    return originals.HEAD.replaced() is None


def _is_plain(t: Tensor, x: Tensor, row: tuple[int, ...]) -> bool:
    """Whether the parameter `t`, of any number of rows of this shape, is plain memory of x's
    dtype."""
    return (
        type(t) in (nn.Parameter, Tensor)
        and t.layout is torch.strided
        and t.device == x.device
        and t.dtype == x.dtype
        and t.shape[1:] == row
        and t.dim() == 1 + len(row)
        and t.is_contiguous()
        and not t.is_neg()
    )


def _is_native() -> bool:
    return native.load() is None and registry.forced() is None
