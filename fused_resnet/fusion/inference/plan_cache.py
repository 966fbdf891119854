"""The cache of inference plans.

A `Plan` belongs to a block and a compute dtype and is valid while its `Guard` holds. Plans are
cached outside the modules, so that state_dict, deepcopy and pickle do not see them."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fused_resnet.fusion.dtype_rules import compute_dtype, norm_fits, output_dtype, weights_fit
from fused_resnet.fusion.structure import Guard, Names, Parts, parse_block
from fused_resnet.kernels import registry
from fused_resnet.kernels.cache import cacheable
from fused_resnet.kernels.problem import convolution
from fused_resnet.layers.hooks import is_fsdps
from fused_resnet.layers.norms import uses_batch_statistics
from fused_resnet.layers.planned import on_mode_switch

from .plan import Plan, PreactPlan


def reason_against(parts: Parts, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why these parts cannot be folded and packed for an x of `dtype` on `device` now, or None."""
    conv_dtype = compute_dtype(dtype, device.type)
    if conv_dtype is None:
        return f"no fused convolution supports {dtype}"
    backend = registry.choose("conv_bn_relu", device.type)
    if backend == "reference":
        missing = registry.missing("conv_bn_relu", "vendor", device.type)
        return missing or "another backend is forced"
    no_blocks = registry.provider(backend, device.type).no_blocks
    if no_blocks is not None:
        return no_blocks
    for conv, bn in parts.pairs:
        if bn is not None and uses_batch_statistics(bn):
            return "batch norm uses batch statistics"
        if bn is not None and (bn.running_mean is None or bn.running_var is None):
            return "a norm has no running statistics"
        if conv.weight.device != device:
            return f"x is on {device}, a weight on {conv.weight.device}"
        if not weights_fit(dtype, conv.weight):
            return f"x is {dtype} and a weight is {conv.weight.dtype}"
        norm_dtype = output_dtype(dtype, device.type)
        if bn is not None and not norm_fits(bn, norm_dtype):
            return f"a norm's tensors are neither {norm_dtype} nor float32"
        shape = conv.weight.shape
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        problem = convolution(shape, conv_dtype, *geometry)
        if registry.convolution(problem, device.type) is None:
            return f"no fused convolution supports a weight of shape {tuple(shape)}"
    return None


# block -> (compute dtype, device, backend) -> plan
_plans: WeakKeyDictionary[nn.Module, dict[Any, Plan]] = WeakKeyDictionary()
_generation = 0


def forget(model: nn.Module) -> None:
    """Drops the cached plans of every block of `model`; the next call rebuilds them."""
    global _generation
    _generation += 1
    for m in model.modules():
        _plans.pop(m, None)


def generation() -> int:
    """A counter of `forget` calls: cached plans held elsewhere are stale once it changes."""
    return _generation


def plan_for(
    block: nn.Module, names: Names, dtype: torch.dtype, device: torch.device
) -> Plan | str:
    """The block's inference plan for an x of `dtype` on `device`, cached or built now; or the
    reason why there is none."""
    conv_dtype = compute_dtype(dtype, device.type)
    key = (conv_dtype, device, registry.choose("conv_bn_relu", device.type))
    plans = _plans.get(block, {})
    plan = plans.get(key)
    if plan is not None and weights_fit(dtype, plan.weight):
        if plan.guard.holds():
            return plan
        _plans.pop(block, None)  # stale: must not stay cached if no new plan follows
    parts = parse_block(block, names)
    if isinstance(parts, str):
        return parts
    reason = reason_against(parts, dtype, device)
    if reason is not None or conv_dtype is None:
        return reason or f"no fused convolution supports {dtype}"
    guard = Guard(parts)
    if not guard.has_versions:
        return "weights created in inference mode have no version counter"
    if names.norm_first:
        shared: Any = block.activation_shared
        plan = PreactPlan(parts, guard, conv_dtype, shared)
    else:
        plan = Plan(parts, guard, conv_dtype)
    if not cacheable(plan.weight) or any(is_fsdps(conv) for conv, _ in parts.pairs):
        return plan  # valid for this call only
    for conv in plan.all_convs:
        conv.is_cached = True
    # Valid plans of other dtypes stay: autocast may be switched on and off from call to call.
    others = {k: p for k, p in plans.items() if k != key and p.guard.holds()}
    _plans[block] = {**others, key: plan}
    return plan


on_mode_switch(forget)
