"""The cached plans of blocks.

A `Plan` belongs to a block and a compute dtype and is used while its `Guard` holds. Plans are
cached beside the modules, not in them: state_dict, deepcopy and pickle do not see them."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fused_resnet.fusion.fit import compute_dtype, norm_fits, output_dtype, weights_fit
from fused_resnet.fusion.structure import Guard, Names, Parts, take_apart
from fused_resnet.kernels import registry
from fused_resnet.kernels.cache import keepable
from fused_resnet.kernels.dispatch import conv_kind
from fused_resnet.layers.hooks import is_fsdps
from fused_resnet.layers.norms import uses_batch_statistics
from fused_resnet.layers.planned import on_mode_switch

from .plan import Plan, PreactPlan


def reason_against(parts: Parts, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why these parts cannot be folded and packed for an x of `dtype` on `device` now, or None."""
    inner = compute_dtype(dtype, device.type)
    if inner is None:
        return f"no fused convolution serves {dtype}"
    backend = registry.choose("conv_bn_relu", device.type)
    if backend == "reference":
        missing = registry.missing("conv_bn_relu", "vendor", device.type)
        return missing or "another backend is forced"
    if backend == "triton" and device.type == "cpu":
        return "Triton's interpreter is for its kernels alone"
    for conv, bn in parts.pairs:
        if bn is not None and uses_batch_statistics(bn):
            return "batch norm uses batch statistics"
        if bn is not None and (bn.running_mean is None or bn.running_var is None):
            return "running statistics are absent"
        if conv.weight.device != device:
            return f"x is on {device}, a weight on {conv.weight.device}"
        if not weights_fit(dtype, conv.weight):
            return f"x is {dtype} and a weight is {conv.weight.dtype}"
        outer = output_dtype(dtype, device.type)
        if bn is not None and not norm_fits(bn, outer):
            return f"a norm's tensors are of another dtype than {outer}"
        shape = conv.weight.shape
        if conv_kind(shape, inner, conv.dilation, conv.groups, device.type) is None:
            return f"no fused convolution takes a weight of shape {tuple(shape)}"
    return None


# block -> (compute dtype, backend) -> plan
_plans: WeakKeyDictionary[nn.Module, dict[Any, Plan]] = WeakKeyDictionary()


_generation = 0


def forget(model: nn.Module) -> None:
    """Drops what was precomputed for every block of `model`; the next call makes it anew."""
    global _generation
    _generation += 1
    for m in model.modules():
        _plans.pop(m, None)


def generation() -> int:
    """Grows whenever a plan anywhere was dropped, so that who holds plans knows to ask again."""
    return _generation


def plan_for(
    block: nn.Module, names: Names, dtype: torch.dtype, device: torch.device
) -> Plan | str:
    """The block's plan for inference on an x of `dtype` on `device`, made now if need be; or why
    not."""
    inner = compute_dtype(dtype, device.type)
    key = (inner, device, registry.choose("conv_bn_relu", device.type))
    plans = _plans.get(block, {})
    plan = plans.get(key)
    if plan is not None and weights_fit(dtype, plan.weight):
        if plan.guard.holds():
            return plan
        _plans.pop(block, None)  # a stale copy is of no use to anybody
    parts = take_apart(block, names)
    if isinstance(parts, str):
        return parts
    reason = reason_against(parts, dtype, device)
    if reason is not None or inner is None:
        return reason or f"no fused convolution serves {dtype}"
    guard = Guard(parts)
    if not guard.watchable:
        return "weights made in inference mode carry no version counter to watch"
    if names.norm_first:
        shared: Any = block.activation_shared
        plan = PreactPlan(parts, guard, inner, shared)
    else:
        plan = Plan(parts, guard, inner)
    if not keepable(plan.weight) or any(is_fsdps(conv) for conv, _ in parts.pairs):
        # good for this call alone
        return plan
    for conv in plan.all_convs:
        conv.lasting = True
    # Another dtype's plan stays while it is good too: autocast on, autocast off.
    others = {k: p for k, p in plans.items() if k != key and p.guard.holds()}
    _plans[block] = {**others, key: plan}
    return plan


on_mode_switch(forget)
