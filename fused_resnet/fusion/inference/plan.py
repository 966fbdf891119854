"""Inference plans: a description's convolutions, packed with folded norms, and how to run them.

The dtype, the kernels and the layout are decided when a plan is made; it is valid while its guard
holds."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from fused_resnet.fusion import pooling
from fused_resnet.fusion.description import Description, Unit
from fused_resnet.fusion.guard import Guard
from fused_resnet.kernels import native, registry
from fused_resnet.kernels.cache import to_keep
from fused_resnet.kernels.convolution import FusedConv, Kind
from fused_resnet.kernels.cpu.convolution import NativeConv
from fused_resnet.kernels.cuda.convolution import GpuConv
from fused_resnet.kernels.problem import Problem
from fused_resnet.layers.norms import DEFAULT_EPS
from fused_resnet.layers.shortcut import SHORTCUTS, padded
from fused_resnet.ops.conv_norm_relu import fold_norm

from . import release


def _pack(unit: Unit, problem: Problem, kind: Kind) -> FusedConv:
    """Packs the unit's convolution with its norm, if it has one, folded into it."""
    conv, norm, _ = unit
    if norm is None:
        K, device = conv.out_channels, conv.weight.device
        scale = torch.ones(K, dtype=torch.float64, device=device)
        shift = scale.new_zeros(K) if conv.bias is None else conv.bias.double()
    else:
        eps = getattr(norm, "eps", DEFAULT_EPS)
        statistics = norm.running_mean, norm.running_var
        vectors = conv.bias, norm.weight, norm.bias
        scale, shift = fold_norm(*vectors, *statistics, eps, torch.float64)
    packed = kind(problem, conv.weight, scale, shift)
    release.offer(conv, packed)
    return packed


class Plan:
    """One description's folded, packed convolutions in one compute dtype, `dtype`: that of most
    convolutions of x, `usual_dtype`, or a wider one.

    is_cached: whether later calls use it. takes_any: whether `run` accepts x of any layout and
    dtype, not only channels_last of `dtype`. pools: whether it includes the stem's pooling."""

    is_cached = False

    def __init__(
        self,
        description: Description,
        guard: Guard,
        kernels: Sequence[tuple[Problem, Kind]],
        usual_dtype: torch.dtype | None,
    ) -> None:
        self.usual_dtype, self.kernels = usual_dtype, kernels
        self.guard, self.holds, self._description = guard, guard.holds, description
        with to_keep():
            folds = description.folds
            convs = [_pack(unit, *kernel) for unit, kernel in zip(folds, kernels, strict=True)]
        self._activations = [unit.activation for unit in folds]
        self.dtype = convs[0].dtype
        self.all_convs = convs
        self._projection = convs[-1] if description.shortcut == "projection" else None
        self._convs = convs[: len(description.main)]
        self.weight = description.units[0].conv.weight
        first = description.norm_first
        self.takes_any = not first and description.shortcut == "none" and convs[0].takes_any
        self._on_gpu = registry.target(self.weight.device).vendor != "cpu"
        on_cpu = native.load() is None and registry.forced() is None
        self.pools = description.pool is not None and (self._on_gpu or on_cpu)
        self._window = pooling.window(description.pool) if self.pools else []
        self._norm = self._norm_operands() if first and native.load() is None else None
        self.one_op = self._block_operands()
        self._shapes: list[Sequence[int]] = []

    def _norm_operands(self) -> tuple[Any, ...] | None:
        """The first norm of a norm_first block, as the CPU's ops take it, and its eps."""
        norm = self._description.units[0].norm
        if norm.running_mean.device.type != "cpu":
            return None
        statistics = torch.stack([norm.running_mean.double(), norm.running_var.double()])
        vectors = (None if t is None else t.detach().float() for t in (norm.weight, norm.bias))
        return (statistics, *vectors, norm.eps)

    def _block_operands(self) -> tuple[list[Any], ...] | None:
        """The lists that the CPU's block_inference op takes of the block: tensors of convolutions
        and of norms, geometry, eps, activations, kind; None if it does not support it."""
        d = self._description
        if (d.pool is not None and not self.pools) or (d.norm_first and self._norm is None):
            return None
        tensors: list[Tensor] = []
        sizes: list[int] = []
        for conv in self.all_convs:
            if not isinstance(conv, NativeConv):
                return None
            tensors += conv.tensors
            sizes += conv.sizes
        norms: list[Tensor] = []
        if self._norm is not None:
            empty = self._norm[0].new_empty(0)
            norms = [empty if t is None else t for t in self._norm[:3]]
        stride = 1 if d.pad is None else d.pad.stride
        window = [v for pair in self._window for v in pair] or [0] * 6
        kind = [len(d.units), SHORTCUTS[d.shortcut], stride, int(d.norm_first), int(d.shared)]
        kind += window
        activations = [d.units[0].activation, *self._activations]
        eps = 0.0 if self._norm is None else self._norm[3]
        return tensors, norms, sizes, [eps], activations, kind

    @property
    def packed(self) -> list[Tensor] | None:
        """What its convolutions keep, where a graph can hold it; else None."""
        d = self._description
        if d.norm_first or (d.pool is not None and not self.pools):
            return None
        if not all(conv.tensors for conv in self.all_convs):
            return None
        return [t for conv in self.all_convs for t in conv.tensors]

    def over(self, tensors: Sequence[Tensor]) -> Plan:
        """A copy that keeps `tensors`, in the order of `packed`."""
        plan, rest = copy.copy(self), list(tensors)
        plan.all_convs = [copy.copy(conv) for conv in self.all_convs]
        for conv in plan.all_convs:
            count = len(conv.tensors)
            conv.tensors, rest = rest[:count], rest[count:]
        plan._convs = plan.all_convs[: len(self._convs)]
        if self._projection is not None:
            plan._projection = plan.all_convs[-1]
        if self.one_op is not None:
            plan.one_op = (list(tensors), *self.one_op[1:])
            plan.__dict__.pop("_alone", None)
        return plan

    def shapes(self, shape: Sequence[int]) -> list[Sequence[int]]:
        """The shapes of x, of every convolution's output on the main path and of the pooling's.
        Empty if x does not fit: stock then raises the error."""
        cached = self._shapes  # read once: another thread may replace it for another shape
        if not cached or cached[0] != shape:
            cached = self._shapes = self._find_shapes(shape)
        return cached

    def _find_shapes(self, shape: Sequence[int]) -> list[Sequence[int]]:
        found = self._description.output_shapes(shape)
        if not found:
            return []
        shapes = [shape, *found[: len(self._convs)]]
        if self.pools:
            pooled = pooling.pool_shape(self._description.pool, shapes[-1])
            return [] if pooled is None else [*shapes, pooled]
        return shapes

    def run(self, x: Tensor, owned: bool, added: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W), which may be overwritten if `owned` -> (N, K, P, Q), channels_last of
        `dtype`. added: what a chain without a shortcut adds before its last activation, as the
        output."""
        if self.one_op is not None and added is None:
            return self._alone.run(x, owned)
        d = self._description
        if self.pools:
            return self._run_pooled(x)
        source = x
        if d.norm_first:
            x = self._normed(x)
            if d.shared:
                source, owned = x, True
        *convs, last = zip(self._convs, self._activations, strict=False)
        for conv, activation in convs:
            x = conv.run(x, None, activation)
        residual: Tensor | None = source
        if self._projection is not None:
            residual, owned = self._projection.run(source, None, self._activations[-1]), True
        elif d.pad is not None:
            residual, owned = padded(source, d.pad.out_channels, d.pad.stride), True
        elif d.shortcut == "none":
            residual, owned = added, False
        # The only convolution of a block reads what would be overwritten.
        return last[0].run(x, residual, last[1], overwrite=owned and residual is not x)

    @functools.cached_property
    def _alone(self) -> Blocks:
        return Blocks([self])

    def _run_pooled(self, x: Tensor) -> Tensor:
        """A stem with its pooling, as one kernel if there is one."""
        (conv,) = self._convs
        if isinstance(conv, GpuConv) and self._window == [[3, 3], [2, 2], [1, 1]] and conv.pools(x):
            return conv.run_pooled(x)
        pool = torch.max_pool2d if self._on_gpu else torch.ops.fused_resnet_native.max_pool2d
        kernel, stride, padding = self._window
        return pool(conv.run(x, None, self._activations[0]), kernel, stride, padding)

    def _normed(self, x: Tensor) -> Tensor:
        """activation(norm(x)) with the running statistics."""
        activation = self._description.units[0].activation
        if self._norm is not None:
            none = (None, None, None, None, 0.0)
            return torch.ops.fused_resnet_native.bn_apply(x, *self._norm, *none, activation)
        bn = self._description.units[0].norm
        with torch.no_grad():
            y = batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
            return activation(y)


class Blocks:
    """Consecutive plans that the CPU computes by one op."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.plans, self.dtype, self.takes_any = plans, plans[0].dtype, plans[0].takes_any
        lists = zip(*[plan.one_op for plan in plans if plan.one_op is not None], strict=True)
        convs, norms, *rest = (list(chain.from_iterable(parts)) for parts in lists)
        self._operands: list[list[Any]] = [convs + norms, *rest]

    def run(self, x: Tensor, owned: bool) -> Tensor:
        """As `Plan.run`, of one after the other."""
        if self.takes_any:
            x = x.to(self.dtype)
        return torch.ops.fused_resnet_native.block_inference.default(x, *self._operands, owned)
