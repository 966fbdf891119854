"""Inference plans of blocks: packed convolutions with folded batch norm, residual and ReLU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from fused_resnet.fusion.dtype_rules import output_dtype
from fused_resnet.fusion.fold import scale_and_shift
from fused_resnet.fusion.structure import Guard, Parts
from fused_resnet.kernels import native
from fused_resnet.kernels.convolution import BOUND_LIMIT, FusedConv, max_abs
from fused_resnet.kernels.cpu.convolution import NativeConv
from fused_resnet.kernels.dispatch import conv_kind
from fused_resnet.layers.shortcut import SHORTCUTS, padded


def _pack(conv: Any, bn: Any, dtype: torch.dtype) -> FusedConv:
    """Packs conv with bn folded into it, or conv alone where bn is None."""
    shape, device = conv.weight.shape, conv.weight.device.type
    kind = conv_kind(shape, dtype, conv.dilation, conv.groups, device)
    assert kind is not None  # checked by reason_against
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
    """An activation between fused blocks.

    x: (N, C, H, W) channels_last in the compute dtype (any layout and dtype for a plan with
    takes_any). bound: an upper bound for |x|, or None if unknown. owned: x has no other user, so a
    block may overwrite it.
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
        """Each convolution with the norm to fold into it, or None."""
        return parts.pairs

    def _operands(self) -> tuple[Any, ...] | None:
        """The arguments of the CPU's block_inference op; None if it does not support the block."""
        tensors: list[Tensor] = []
        geometry: list[int] = []
        for conv in self.all_convs:
            if self.takes_any or not isinstance(conv, NativeConv):
                return None
            tensors += conv.tensors
            geometry += conv.geometry
        stride = 1 if self.pad is None else self.pad.stride
        return tensors, geometry, SHORTCUTS[self.shortcut], stride

    def shapes(self, shape: Sequence[int]) -> list[Sequence[int]]:
        """The shapes of x and of every convolution's output on the main path. Empty if x does not
        fit the block: stock then raises the error."""
        cached = self._shapes  # read once: another thread may replace it for another shape
        if not cached or cached[0] != shape:
            cached = self._shapes = self._find_shapes(shape)
        return cached

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
        """A bound for every value the block computes; None if there is none or none is needed
        (see kernels/convolution.py)."""
        if x_bound is None or not self._needs_bound:
            return None
        bound = x_bound
        for conv in self.convs:
            bound = conv.bound(bound)
            if not bound <= BOUND_LIMIT:  # not >, so that NaN fails
                return None
        if self.shortcut != "none":
            bound += x_bound if self.downsample is None else self.downsample.bound(x_bound)
        return bound if bound <= BOUND_LIMIT else None

    def run(self, flow: Flow) -> Flow | None:
        """The block's output; None if NaN must be ruled out by a bound and none does."""
        bound = self.bound(flow.bound)
        if bound is None and self._needs_bound:
            bound = self.bound(max_abs(flow.x))
            if bound is None:
                return None
        return Flow(self._run(flow.x, flow.owned), bound, True)

    def _run(self, x: Tensor, owned: bool) -> Tensor:
        """x: (N, C, H, W); overwritten if owned."""
        if self._one_op is not None:
            op = torch.ops.fused_resnet_native.block_inference.default
            return op(x, None, None, None, 0.0, *self._one_op, False, owned)
        y = x
        for conv in self.convs[:-1]:
            y = conv.run(y, None, True)
        residual, owned = self._residual(x, owned)
        return self.convs[-1].run(y, residual, True, overwrite=owned)

    def _residual(self, x: Tensor, owned: bool) -> tuple[Tensor | None, bool]:
        """The shortcut's output for x, and whether it may be overwritten."""
        if self.downsample is not None:
            return self.downsample.run(x, None, False), True
        if self.pad is not None:
            return padded(x, self.pad.out_channels, self.pad.stride), True
        return (None, False) if self.shortcut == "none" else (x, owned)


class PreactPlan(Plan):
    """The plan of a norm_first block: each norm but the first is folded into the convolution
    before it."""

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
        """relu(norm(x)) with the running statistics."""
        if self._native is not None:
            none = (None, None, None, None, 0.0)
            return torch.ops.fused_resnet_native.bn_apply(x, *self._native, *none, True)
        bn = self._norm
        with torch.no_grad():
            y = batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
            return torch.relu_(y)


def enter(x: Tensor, plan: Plan) -> Flow:
    """Converts x (N, C, H, W) of any layout and dtype for `plan`; only a copy is owned."""
    if plan.takes_any:
        return Flow(x, None, False)
    converted = x.to(plan.dtype).contiguous(memory_format=torch.channels_last)
    return Flow(converted, None, converted.data_ptr() != x.data_ptr())


def leave(y: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """Converts a fused block's output to stock's dtype and layout for an x of `dtype` and
    `memory_format`."""
    stock_dtype = output_dtype(dtype, y.device.type)
    return y.to(stock_dtype).contiguous(memory_format=memory_format)
