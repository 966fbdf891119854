"""Makes inference plans, or says why there is none."""

from __future__ import annotations

import torch
from torch import nn

from fused_resnet.fusion import store
from fused_resnet.fusion.description import Description, Names, attributes_of, describe
from fused_resnet.fusion.dtype_rules import compute_dtype, norm_fits, output_dtype, weights_fit
from fused_resnet.fusion.guard import Guard
from fused_resnet.kernels import registry
from fused_resnet.kernels.cache import cacheable
from fused_resnet.kernels.convolution import Kind
from fused_resnet.kernels.problem import Problem, convolution
from fused_resnet.layers.hooks import FSDP
from fused_resnet.layers.norms import uses_batch_statistics
from fused_resnet.layers.released import restore_all

from .plan import Plan


def kernels_for(
    description: Description, dtype: torch.dtype, device: torch.device
) -> list[tuple[Problem, Kind]] | str:
    """What computes each convolution of the description for an x of `dtype` on `device`, or the
    reason why it cannot be folded and packed now."""
    if compute_dtype(dtype, device.type) is None:
        return f"no fused convolution supports {dtype}"
    backend = registry.choose("conv_bn_relu", device.type)
    if backend == "reference":
        missing = registry.missing("conv_bn_relu", "vendor", device.type)
        return missing or "another backend is forced"
    no_blocks = registry.provider(backend, device.type).no_blocks
    if no_blocks is not None:
        return no_blocks
    norm_dtype, problems, fits = output_dtype(dtype, device.type), [], None
    units = zip(description.units, description.geometries, description.folds, strict=True)
    for (conv, norm, _), geometry, fold in units:
        weight = conv.weight
        if norm is not None:
            if uses_batch_statistics(norm):
                return "batch norm uses batch statistics"
            if norm.running_mean is None or norm.running_var is None:
                return "a norm has no running statistics"
            if not norm_fits(norm, norm_dtype):
                return f"a norm's tensors are neither {norm_dtype} nor float32"
        if weight.device != device:
            return f"x is on {device}, a weight on {weight.device}"
        if weight.dtype is not fits and not weights_fit(dtype, weight):
            return f"x is {dtype} and a weight is {weight.dtype}"
        fits = weight.dtype
        problems.append(convolution(weight.shape, None, *geometry, fold.activation))
    kernels = registry.convolutions(problems, norm_dtype, device.type)
    if isinstance(kernels, Problem):
        return f"no fused convolution supports a weight of shape {kernels.weight_shape}"
    return kernels


def plan_for(
    module: nn.Module, names: Names, dtype: torch.dtype, device: torch.device
) -> Plan | str:
    """The inference plan of a block or stem for an x of `dtype` on `device`, cached or made now; or
    the reason why there is none."""
    conv_dtype = compute_dtype(dtype, device.type)
    backend = registry.choose("conv_bn_relu", device.type)
    autocast = torch.is_autocast_enabled(device.type)  # decides which weights stock accepts
    key = ("plan", conv_dtype, autocast, device, backend, attributes_of(module))
    plan = store.lookup(module, key)
    if plan is not None and weights_fit(dtype, plan.weight):
        return plan
    description = describe(module, names)
    if isinstance(description, str):
        return description
    plan = plan_of(description, dtype, device)
    if not isinstance(plan, str) and plan.is_cached:
        store.insert(module, key, plan)
    return plan


def plan_of(description: Description, dtype: torch.dtype, device: torch.device) -> Plan | str:
    """A new inference plan of the description for an x of `dtype` on `device`; or the reason why
    there is none. `is_cached` says whether later calls may use it."""
    restore_all(unit.conv.weight for unit in description.units)
    guard = Guard([description])  # before any value is read
    kernels = kernels_for(description, dtype, device)
    if isinstance(kernels, str):
        return kernels
    if not guard.has_versions:
        return "weights created in inference mode have no version counter"
    plan = Plan(description, guard, kernels, compute_dtype(dtype, device.type))
    # Valid for this call only if FSDP rewrites weights unnoticed, if the packed weights belong to a
    # CUDA graph, or if another thread wrote to the weights meanwhile.
    fsdp = any([FSDP in unit.conv.__dict__ for unit in description.units])
    if not fsdp and cacheable(plan.weight) and plan.holds():
        plan.is_cached = True
        for conv in plan.all_convs:
            conv.is_cached = True
    return plan
