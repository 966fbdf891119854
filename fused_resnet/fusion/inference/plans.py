"""A block made ready for inference: packed convolutions, each with BN, residual and ReLU inside.

A `Plan` belongs to a block and a compute dtype and is used while its `Guard` holds. Plans live
beside the modules, not in them: state_dict, deepcopy and pickle do not see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from fused_resnet.fusion.structure import (
    Guard,
    Names,
    Parts,
    is_fsdps,
    take_apart,
    uses_batch_statistics,
)
from fused_resnet.kernels import backends, native
from fused_resnet.kernels.convolution import BOUND_LIMIT, FusedConv, keepable, max_abs
from fused_resnet.kernels.cpu.convolution import NativeConv
from fused_resnet.layers.shortcut import SHORTCUTS, padded


def scale_and_shift(conv: Any, bn: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale, shift: (K,) of `dtype`, with y = conv(x, weight) * scale + shift for conv, then bn.

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


def _pack(conv: Any, bn: Any, dtype: torch.dtype) -> FusedConv:
    """conv, then bn, or nothing where bn is None."""
    shape, device = conv.weight.shape, conv.weight.device.type
    kind = backends.conv_kind(shape, dtype, conv.dilation, conv.groups, device)
    assert kind is not None  # reason_against has asked
    with torch.no_grad():
        if bn is None:
            scale = torch.ones(shape[0], dtype=torch.float64, device=conv.weight.device)
            shift = scale.new_zeros(shape[0]) if conv.bias is None else conv.bias.double()
        else:
            scale, shift = scale_and_shift(conv, bn, torch.float64)
        return kind(
            conv.weight, scale, shift, dtype, conv.stride, conv.padding, conv.dilation, conv.groups
        )


class Flow(NamedTuple):
    """An activation on its way through fused blocks.

    x: (N, C, H, W) channels_last in the compute dtype (any layout and dtype for a plan that takes
    any). bound: an upper bound for |x|, or None where none is known. owned: nobody else can see x,
    so a block may write into it.
    """

    x: Tensor
    bound: float | None
    owned: bool


class Plan:
    """One block's folded, packed convolutions in one compute dtype."""

    def __init__(self, parts: Parts, guard: Guard, dtype: torch.dtype) -> None:
        self.guard = guard
        self.dtype = dtype
        convs = [_pack(conv, bn, dtype) for conv, bn in self._folds(parts)]
        self.downsample = convs.pop() if parts.downsample else None
        self.pad = parts.pad
        self.convs = convs
        self.shortcut = parts.shortcut
        self.all_convs = [*convs, self.downsample] if self.downsample else convs
        self._needs_bound = any(conv.needs_bound for conv in self.all_convs)
        self.takes_any = self.shortcut == "none" and convs[0].takes_any
        self.weight = parts.pairs[0][0].weight
        self._shapes: list[Sequence[int]] = []
        self._one_op = self._operands()

    def _folds(self, parts: Parts) -> list[tuple[Any, Any]]:
        """Each convolution and the norm that follows it, or None."""
        return parts.pairs

    def _operands(self) -> tuple[Any, ...] | None:
        """The convolutions as the CPU's op for whole blocks takes them, None where it cannot."""
        if self.shortcut == "none" and len(self.convs) == 1:  # a stem: no block
            return None
        if not all(isinstance(conv, NativeConv) for conv in self.all_convs):
            return None
        found = [conv.operands() for conv in self.all_convs if isinstance(conv, NativeConv)]
        tensors: list[Tensor] = []
        geometry: list[int] = []
        for operands in found:
            if operands is None:
                return None
            tensors += operands[0]
            geometry += operands[1]
        stride = 1 if self.pad is None else self.pad.stride
        return tensors, geometry, SHORTCUTS[self.shortcut], stride

    def shapes(self, shape: Sequence[int]) -> list[Sequence[int]]:
        """The activations that an x of this shape becomes: x, then every convolution's output, the
        block's last. Empty where it does not go through: then it is stock that raises."""
        kept = self._shapes  # read once: another thread may come with another size
        if not kept or kept[0] != shape:
            kept = self._shapes = self._find_shapes(shape)
        return kept

    def _find_shapes(self, shape: Sequence[int]) -> list[Sequence[int]]:
        shapes = [shape]
        for conv in self.convs:
            out = conv.output_shape(shapes[-1])
            if out is None:
                return []
            shapes.append(out)
        branch: Sequence[int] | None = tuple(shape)
        if self.downsample is not None:
            branch = self.downsample.output_shape(shape)
        elif self.pad is not None:
            branch = self.pad.output_shape(shape)
        if self.shortcut != "none" and branch != shapes[-1]:
            return []
        return shapes

    def bound(self, x_bound: float | None) -> float | None:
        """A bound for every number the block computes, or None where there is none, or no need
        of one (convolution.py)."""
        if x_bound is None or not self._needs_bound:
            return None
        bound = x_bound
        for conv in self.convs:
            bound = conv.bound(bound)
            if not bound <= BOUND_LIMIT:  # written so that NaN fails
                return None
        if self.shortcut != "none":
            bound += x_bound if self.downsample is None else self.downsample.bound(x_bound)
        return bound if bound <= BOUND_LIMIT else None

    def run(self, flow: Flow) -> Flow | None:
        """The block's output, or None where a bound is needed and none rules out a NaN."""
        bound = self.bound(flow.bound)
        if bound is None and self._needs_bound:
            bound = self.bound(max_abs(flow.x))
            if bound is None:
                return None
        return Flow(self._run(flow.x, flow.owned), bound, True)

    def _run(self, x: Tensor, owned: bool) -> Tensor:
        """x: (N, C, H, W), which may be written to where it is owned."""
        if self._one_op is not None:
            op = torch.ops.fused_resnet_native.block_inference.default
            return op(x, None, None, None, 0.0, *self._one_op, False, owned)
        y = x
        for conv in self.convs[:-1]:
            y = conv.run(y, None, True)
        residual, owned = self._residual(x, owned)
        return self.convs[-1].run(y, residual, True, overwrite=owned)

    def _residual(self, x: Tensor, owned: bool) -> tuple[Tensor | None, bool]:
        """What the shortcut makes of x, and whether it may be written to."""
        if self.downsample is not None:
            return self.downsample.run(x, None, False), True
        if self.pad is not None:
            return padded(x, self.pad.out_channels, self.pad.stride), True
        return (None, False) if self.shortcut == "none" else (x, owned)


class PreactPlan(Plan):
    """A block whose norms come first: all but the first are folded into the convolution before."""

    def __init__(self, parts: Parts, guard: Guard, dtype: torch.dtype, shared: bool) -> None:
        super().__init__(parts, guard, dtype)
        self.takes_any = False
        self._shared = shared  # whether the shortcut starts from the first ReLU
        self._norm = bn = parts.pairs[0][1]
        mean, var = bn.running_mean.double(), bn.running_var.double()
        weight, bias = (None if t is None else t.detach() for t in (bn.weight, bn.bias))
        gain = torch.rsqrt(var + bn.eps) * (1 if weight is None else weight.double())
        shift = (0 if bias is None else bias.double()) - mean * gain
        self._gain, self._shift = max_abs(gain) * (1 + 2**-7), max_abs(shift)
        self._native: tuple[Any, ...] | None = None
        if mean.device.type == "cpu" and native.load() is None:
            vectors = (None if t is None else t.float() for t in (weight, bias))
            self._native = (torch.stack([mean, var]), *vectors, bn.eps)

    def _folds(self, parts: Parts) -> list[tuple[Any, Any]]:
        norms = [bn for _, bn in parts.main[1:]] + [None, None]
        return [(conv, bn) for (conv, _), bn in zip(parts.pairs, norms, strict=False)]

    def bound(self, x_bound: float | None) -> float | None:
        if x_bound is None or not self._needs_bound:
            return None
        normed = x_bound * self._gain + self._shift
        bound = super().bound(normed)
        # The shortcut may start from x itself.
        return None if bound is None or not bound + x_bound <= BOUND_LIMIT else bound + x_bound

    def _run(self, x: Tensor, owned: bool) -> Tensor:
        if self._one_op is not None and self._native is not None:
            op = torch.ops.fused_resnet_native.block_inference.default
            return op(x, *self._native, *self._one_op, self._shared, owned)
        h = y = self._normed(x)
        for conv in self.convs[:-1]:
            y = conv.run(y, None, True)
        residual, owned = self._residual(*((h, True) if self._shared else (x, owned)))
        return self.convs[-1].run(y, residual, False, overwrite=owned)

    def _normed(self, x: Tensor) -> Tensor:
        """relu(norm(x)) by the running statistics."""
        if self._native is not None:
            none = (None, None, None, None, 0.0)
            return torch.ops.fused_resnet_native.bn_apply(x, *self._native, *none, True)
        bn = self._norm
        with torch.no_grad():
            y = batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
            return torch.relu_(y)


def output_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype in which stock's convolution of such a tensor of `dtype` would answer now."""
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return dtype


def weights_fit(dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether stock's convolution would take an x of `dtype` with this weight now."""
    if torch.is_autocast_enabled(weight.device.type):
        return (dtype == torch.float64) == (weight.dtype == torch.float64)
    return dtype == weight.dtype


def norm_fits(bn: Any, dtype: torch.dtype) -> bool:
    """Whether stock's batch norm would take an input of `dtype` with this norm's tensors."""
    tensors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return all(t is None or t.dtype in (dtype, torch.float32) for t in tensors)


def reason_against(parts: Parts, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why these parts cannot be folded and packed for an x of `dtype` on `device` now, or None."""
    inner = compute_dtype(dtype, device.type)
    if inner is None:
        return f"no fused convolution serves {dtype}"
    backend = backends.choose("conv_bn_relu", device.type)
    if backend == "reference":
        missing = backends.missing("conv_bn_relu", "vendor", device.type)
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
        if backends.conv_kind(shape, inner, conv.dilation, conv.groups, device.type) is None:
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


def compute_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype | None:
    """What convolutions of such tensors of `dtype` are computed in now; None: not served."""
    return backends.conv_dtype(output_dtype(dtype, device_type), device_type)


def plan_for(
    block: nn.Module, names: Names, dtype: torch.dtype, device: torch.device
) -> Plan | str:
    """The block's plan for inference on an x of `dtype` on `device`, made now if need be; or why
    not."""
    inner = compute_dtype(dtype, device.type)
    key = (inner, device, backends.choose("conv_bn_relu", device.type))
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
