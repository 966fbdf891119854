"""Runs a block unit by unit, differentiably, where it cannot be one node of autograd's graph.

Units with a frozen norm run `conv_bn_relu`, units with batch statistics a convolution and
`bn_add_relu`; units that neither supports run stock's operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import ReLU

from fused_resnet import ops
from fused_resnet.dtypes import accumulate_dtype
from fused_resnet.fusion.call import call_reason, wants_grad
from fused_resnet.fusion.description import Description, Names
from fused_resnet.fusion.dtype_rules import norm_fits, output_dtype, serves, weights_fit
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.cache import owned_by
from fused_resnet.kernels.problem import Geometry, output_shape
from fused_resnet.layers.hooks import patched
from fused_resnet.layers.norms import falls_back, is_batch_norm, track, uses_batch_statistics
from fused_resnet.layers.sync_batch_norm import group_of

from .prepare import PreparedFixed, Step, step_for, trains_whole
from .spec import laid_out


def counts_once(description: Description, x: Tensor) -> bool:
    """Whether recomputing a segment updates no running statistics twice: `track`, which skips
    recomputation, updates those of every norm that uses batch statistics."""
    dtype = output_dtype(x.dtype, x.device.type)
    if not serves(True, x):
        return False
    groups = [group_of(bn) for bn in description.norms]
    # A synchronised norm updates by `track` only in a block that trains as one node.
    whole = (
        all(map(uses_batch_statistics, description.norms))
        and all(conv.bias is None for conv, *_ in description.units)
        and all(group is groups[0] for group in groups)
        and (groups[0] is None or x.device.type == "cpu")
    )
    return all(
        not uses_batch_statistics(bn)
        or (
            (whole or is_batch_norm(bn))
            and bn.eps > 0
            and bn.num_features in (conv.in_channels, conv.out_channels)
            and norm_fits(bn, dtype)
        )
        for conv, bn, _ in description.units
        if bn is not None
    )


def reason_against_step(
    description: Description, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why a training step for an x of that dtype is not fused, or would update running statistics
    other than by `track`, whatever x's size; None if neither is so."""
    conv, x = description.units[0].conv, torch.empty(0, dtype=dtype, device=device)
    if conv.weight.device != device:
        return f"x is on {device}, a weight is not"
    if any(group_of(norm) is not None for norm in description.norms):
        return "its norms are synchronised"
    shape = (2, conv.in_channels, 224, 224)
    if trains_whole(description, shape, output_dtype(dtype, device.type), dtype):
        return None
    if description.norm_first or description.survival != 1:
        return "some of its norms use running statistics"
    if len(description.norms) < len(description.units) or not counts_once(description, x):
        return "no kernel computes its norms with these settings and dtypes"
    return None


def norm_step(bn: Any, x: Tensor, residual: Tensor | None) -> Tensor | None:
    """relu(bn(x) + residual) by one op; None where not supported, or the norm is frozen."""
    if patched(bn) is not None or not is_batch_norm(bn) or not uses_batch_statistics(bn):
        return None
    fits = x.dim() == 4 and serves(True, x) and _bn_fits(bn, x, residual)
    return _train_bn(bn, x, residual, True) if fits else None


def run_norm(bn: Any, relu: Any, x: Tensor) -> Tensor | None:
    """relu(bn(x)) of two modules by one op; None where not supported, or the norm is frozen."""
    y = None
    if call_reason(x) is None and type(relu) is ReLU and patched(relu) is None:
        y = norm_step(bn, x, None)
    if y is None:
        falls_back()
    return y


def run_projection(block: nn.Module, names: Names, x: Tensor) -> Tensor | None:
    """relu(bn(conv(x))) of a projection shortcut without the main path, in a block whose norms come
    last; None: use PyTorch's operations."""
    step: Step | str = "no gradients are wanted"
    if call_reason(x) is None and wants_grad(block, x):
        step = step_for(block, names, x)
    if isinstance(step, str):
        falls_back()
        return None
    return run_unit(step, -1, x, None, step.description.main[-1].activation)


def run_step(step: Step, x: Tensor, added: Tensor | None = None) -> Tensor | None:
    """A block or stem as one node of autograd's graph or unit by unit; None: use torchvision's
    path. added: to the output of one without a shortcut, before its activation."""
    prepared = step.prepared(x, added)
    if prepared is None:
        return run_units(step, x, added)
    if added is None:
        return prepared.run(x)
    assert isinstance(prepared, PreparedFixed)
    return prepared.run(x, added)


def run_units(step: Step, x: Tensor, added: Tensor | None = None) -> Tensor | None:
    """A block or stem unit by unit, differentiably; None where norms come first or are absent, or
    where stochastic depth divides the branch."""
    description = step.description
    if description.norm_first or description.survival != 1:
        return None
    if len(description.norms) < len(description.units):
        return None
    units, y, last = description.units, x, len(description.main) - 1
    for i in range(last):
        y = run_unit(step, i, y, None, units[i].activation)
    residual: Tensor | None = x
    if description.shortcut == "projection":
        residual = run_unit(step, -1, x, None, units[-1].activation)
    elif description.pad is not None:
        residual = description.pad(x)
    elif description.shortcut == "none":
        residual = added
    y = run_unit(step, last, y, residual, units[last].activation)
    return y if description.pool is None else description.pool(y)


class _Weight(torch.autograd.Function):
    """A weight (K, C, R, S) whose gradient has its layout, whatever the layout of activations."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        found: Tensor = laid_out([None, grad], ctx.saved_tensors)[1]
        return found


def convolve(conv: Any, input: Tensor) -> Tensor:
    """conv(input), with the gradient of its weight in the weight's layout, as stock's is where
    input and weight are contiguous."""
    if patched(conv) is not None or type(conv.weight) is not nn.Parameter:
        return conv(input)
    return conv._conv_forward(input, _Weight.apply(conv.weight), conv.bias)


def run_unit(
    step: Step, i: int, x: Tensor, residual: Tensor | None, activation: Activation
) -> Tensor:
    """activation(bn(conv(x)) + residual) of unit i, differentiably. x: (N, C, H, W), residual:
    (N, K, P, Q)."""
    conv, bn, _ = step.description.units[i]
    geometry = step.description.geometries[i]
    relu = activation == Activation.RELU  # the ops compute no other
    if uses_batch_statistics(bn):
        y = convolve(conv, x)
        if serves(True, y) and _bn_fits(bn, y, residual):
            y = _train_bn(bn, y, residual, relu)
            return y if relu else activation(y)
        falls_back()
        y = bn(y)
    elif serves(False, x) and _conv_fits(conv, bn, x, residual, geometry):
        scale, shift = step.folded(accumulate_dtype(x.dtype))[i]
        assert scale is not None and shift is not None  # of a norm
        with owned_by(step.packed):
            y = ops.conv_bn_relu(x, conv.weight, scale, shift, residual, relu, *geometry)
        return y if relu else activation(y)
    else:
        y = bn(convolve(conv, x))
    if residual is not None:
        y = y + residual if residual.shape != y.shape else y.add_(residual)
    return torch.relu_(y) if relu else activation(y)


def _bn_fits(bn: Any, y: Tensor, residual: Tensor | None) -> bool:
    """Whether `bn_add_relu` supports the operands; if not, stock computes or raises."""
    if not is_batch_norm(bn) or y.shape[1] != bn.num_features or not bn.eps > 0:
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


def _conv_fits(conv: Any, bn: Any, x: Tensor, residual: Tensor | None, geometry: Geometry) -> bool:
    """Whether `conv_bn_relu` supports the operands; if not, stock computes or raises."""
    if bn.running_mean is None or bn.running_var is None:
        return False
    dtype = output_dtype(x.dtype, x.device.type)
    if not weights_fit(x.dtype, conv.weight) or not norm_fits(bn, dtype):
        return False
    out = output_shape(x.shape, conv.weight.shape, *geometry)
    return out is not None and (
        residual is None or (tuple(residual.shape) == out and residual.dtype == dtype)
    )
