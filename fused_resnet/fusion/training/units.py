"""Runs a block unit by unit, differentiably, where it cannot be one node of autograd's graph.

Units with a frozen norm run `conv_bn_relu`, units with batch statistics a convolution and
`bn_add_relu`; units that neither supports run stock's operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet import layout, ops
from fused_resnet.dtypes import accumulate_dtype
from fused_resnet.fusion.call import call_reason, wants_grad
from fused_resnet.fusion.dtype_rules import norm_fits, output_dtype, serves, weights_fit
from fused_resnet.fusion.fold import cached_scale_and_shift
from fused_resnet.fusion.structure import Names, Parts, parse_block
from fused_resnet.kernels.problem import output_shape
from fused_resnet.layers.hooks import patched
from fused_resnet.layers.norms import track, uses_batch_statistics
from fused_resnet.layers.sync_batch_norm import group_of

from . import prepare


def counts_once(parts: Parts, x: Tensor) -> bool:
    """Whether recomputing a segment updates no running statistics twice: `track`, which skips
    recomputation, updates those of every norm that uses batch statistics."""
    dtype = output_dtype(x.dtype, x.device.type)
    if not serves(True, x):
        return False
    groups = [group_of(bn) for bn in parts.norms]
    # A synchronised norm updates by `track` only in a block that trains as one node.
    whole = (
        all(map(uses_batch_statistics, parts.norms))
        and all(conv.bias is None for conv, _ in parts.pairs)
        and all(group is groups[0] for group in groups)
        and (groups[0] is None or x.device.type == "cpu")
    )
    return all(
        not uses_batch_statistics(bn)
        or (
            (whole or type(bn) is nn.BatchNorm2d)
            and bn.eps > 0
            and bn.num_features in (conv.in_channels, conv.out_channels)
            and norm_fits(bn, dtype)
        )
        for conv, bn in parts.pairs
        if bn is not None
    )


def run_norm(bn: Any, relu: Any, x: Tensor) -> Tensor | None:
    """relu(bn(x)) of two modules by one op; None where not supported, or the norm is frozen."""
    if call_reason(x) is not None or type(bn) is not nn.BatchNorm2d or type(relu) is not nn.ReLU:
        return None
    if patched(bn) is not None or patched(relu) is not None or not uses_batch_statistics(bn):
        return None
    return _train_bn(bn, x, None, True) if serves(True, x) and _bn_fits(bn, x, None) else None


def run_projection(block: nn.Module, names: Names, x: Tensor) -> Tensor | None:
    """relu(bn(conv(x))) of a projection shortcut without the main path, in a block whose norms come
    last; None: use PyTorch's operations."""
    if call_reason(x) is not None or not wants_grad(block, x):
        return None
    parts = parse_block(block, names)
    if isinstance(parts, str) or not units_pay(parts, x):
        return None
    return run_unit(*parts.pairs[-1], x, None, True)


def run_units(block: nn.Module, names: Names, x: Tensor) -> Tensor | None:
    """The block as one node or unit by unit, differentiably; None: use torchvision's forward."""
    prepared = prepare.cached(block, x)
    if prepared is not None:
        return prepared.run(x).contiguous(memory_format=layout.memory_format(x))
    parts = parse_block(block, names)
    if isinstance(parts, str) or not units_pay(parts, x):
        return None
    prepared = prepare.prepare_block(block, names, parts, x)
    if prepared is not None:
        return prepared.run(x).contiguous(memory_format=layout.memory_format(x))
    if names.norm_first:
        return None
    y = x
    for conv, bn in parts.main[:-1]:
        y = run_unit(conv, bn, y, None, True)
    residual: Tensor | None = x
    if parts.shortcut == "projection":
        residual = run_unit(*parts.pairs[-1], x, None, False)
    elif parts.pad is not None:
        residual = parts.pad(x)
    elif parts.shortcut == "none":
        residual = None
    return run_unit(*parts.main[-1], y, residual, True)


def units_pay(parts: Parts, x: Tensor) -> bool:
    """Whether some unit of the block has a kernel faster than stock's operations."""
    if any(conv.weight.device != x.device for conv, _ in parts.pairs):
        return False
    return any(serves(uses_batch_statistics(bn), x) for bn in parts.norms)


def run_unit(conv: Any, bn: Any, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """relu(bn(conv(x)) + residual), differentiably. x: (N, C, H, W), residual: (N, K, P, Q)."""
    if uses_batch_statistics(bn):
        y = conv(x)
        if serves(True, y) and _bn_fits(bn, y, residual):
            return _train_bn(bn, y, residual, relu)
        y = bn(y)
    elif serves(False, x) and _conv_fits(conv, bn, x, residual):
        scale, shift = cached_scale_and_shift(conv, bn, accumulate_dtype(x.dtype))
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        return ops.conv_bn_relu(x, conv.weight, scale, shift, residual, relu, *geometry)
    else:
        y = bn(conv(x))
    if residual is not None:
        y += residual
    return torch.relu_(y) if relu else y


def _bn_fits(bn: Any, y: Tensor, residual: Tensor | None) -> bool:
    """Whether `bn_add_relu` supports the operands; if not, stock computes or raises."""
    if type(bn) is not nn.BatchNorm2d or y.shape[1] != bn.num_features or not bn.eps > 0:
        return False
    if y.shape[0] * y.shape[2] * y.shape[3] < 2:
        return False
    if residual is not None and (residual.shape != y.shape or residual.dtype != y.dtype):
        return False
    return norm_fits(bn, y.dtype)


def _train_bn(bn: Any, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """relu(bn(x) + residual) with batch statistics; updates running ones as BatchNorm2d does."""
    y, *state = ops.bn_add_relu(x, bn.weight, bn.bias, residual, bn.eps, relu)
    track(bn, state, x.numel() // x.shape[1])
    return y


def _conv_fits(conv: Any, bn: Any, x: Tensor, residual: Tensor | None) -> bool:
    """Whether `conv_bn_relu` supports the operands; if not, stock computes or raises."""
    if bn.running_mean is None or bn.running_var is None:
        return False
    dtype = output_dtype(x.dtype, x.device.type)
    if not weights_fit(x.dtype, conv.weight) or not norm_fits(bn, dtype):
        return False
    out = output_shape(
        x.shape, conv.weight.shape, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    return out is not None and (
        residual is None or (tuple(residual.shape) == out and residual.dtype == dtype)
    )
