"""The passes of a training step by this package's C++ kernels on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_resnet.kernels import native
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.problem import Geometry

from . import collectives
from .protocol import Norm, Normed, NormGradients, Passes


def in_layout(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """t.contiguous(memory_format=...) of t (N, C, H, W). An activation is copied from the other
    dense layout in 0.2 to 0.5 of the time, few channels no faster."""
    if t.is_contiguous(memory_format=memory_format):
        return t
    last = memory_format == torch.channels_last
    other = torch.contiguous_format if last else torch.channels_last
    functorch: Any = torch._C._functorch
    plain = (
        type(t) in (Tensor, torch.nn.Parameter)
        and (t.device.type, t.dtype) == ("cpu", torch.float32)
        and not (t.requires_grad and torch.is_grad_enabled())
        and functorch.maybe_current_level() is None
        and not functorch.is_legacy_batchedtensor(t)
        and native.load() is None
    )
    tiles = t.dim() == 4 and t.numel() > 0 and min(t.shape[1], t.shape[2] * t.shape[3]) >= 16
    if not plain or not tiles or not t.is_contiguous(memory_format=other):
        return t.contiguous(memory_format=memory_format)
    return torch.ops.fused_resnet_native.relayout(t, last)


def channels_last(t: Tensor) -> Tensor:
    return in_layout(t, torch.channels_last)


def operand(weight: Tensor) -> Tensor:
    """weight (K, C / groups, R, S) as the kernels read it: float32, contiguous or channels_last."""
    weight = weight.detach().float()
    return weight if weight.is_contiguous() else channels_last(weight)


def sizes(g: Geometry) -> list[int]:
    """Stride, padding, dilation and groups as the ops take them."""
    return [*g.stride, *g.padding, *g.dilation, g.groups]


def has_input_gradient(weight: Tensor, g: Geometry) -> bool:
    """Whether a C++ kernel computes the input gradient of such a convolution."""
    return passes().supports(weight, torch.float32, g, "input_gradient")


class Native(Passes):
    """C++ kernels on the CPU; outputs are in pooled memory that is reused from step to step."""

    pools = True
    # Of `convolution_and_epilogue`: those whose gradient follows from their output.
    activations = (Activation.NONE, Activation.RELU)
    _ops = torch.ops.fused_resnet_native

    def supports(
        self, weight: Tensor, dtype: torch.dtype, g: Geometry, work: str = "convolution"
    ) -> bool:
        """Whether a C++ kernel computes this pass: see `native.training_reason`."""
        return native.training_reason(work, weight.shape, dtype, sizes(g)) is None

    def convolution(
        self, x: Tensor, weight: Tensor, g: Geometry, residual: Tensor | None = None
    ) -> Tensor:
        if not self.supports(weight, x.dtype, g):
            return channels_last(super().convolution(x, weight, g, residual))
        return self._ops.convolution(x, operand(weight), residual, sizes(g))

    def convolution_and_epilogue(
        self, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, g: Geometry,
        residual: Tensor | None, activation: Activation,
    ) -> Tensor:  # fmt: skip
        """activation(conv(x, weight) * scale + shift + residual), where `supports` is True. scale,
        shift: (K,) float32 or None."""
        return self._ops.convolution_and_epilogue(
            x, operand(weight), scale, shift, residual, activation, sizes(g)
        )

    def epilogue_gradient(
        self, dy: Tensor, y: Tensor | None, scale: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """The gradients dz of the convolution and, valid if `keep`, g of the residual, of
        `convolution_and_epilogue`; either may be dy. y: its output, None without a ReLU."""
        if scale is None:
            g = dy if y is None else self._ops.add_relu_backward(dy, y)
            return g, g
        dz, *kept = self._ops.epilogue_gradient(dy, y, scale, keep and y is not None)
        return dz, kept[0] if kept else dy

    def convolve(
        self, x: Tensor, weight: Tensor, g: Geometry
    ) -> tuple[Tensor, tuple[Any, ...] | None]:
        if not self.supports(weight, x.dtype, g):
            return super().convolve(x, weight, g)
        y, stats = self._ops.convolution_and_statistics(x, operand(weight), sizes(g))
        return y, (stats,)

    def input_gradient(
        self, dy: Tensor, x: Tensor, weight: Tensor, g: Geometry, added: Tensor | None = None
    ) -> Tensor:
        if not self.supports(weight, dy.dtype, g, "input_gradient"):
            return channels_last(super().input_gradient(dy, x, weight, g, added))
        return self._ops.input_gradient(dy, operand(weight), *x.shape[2:], added, sizes(g))

    def relu_gradient(
        self, dy: Tensor, y: Tensor, weight: Tensor, g: Geometry, normed: Normed
    ) -> tuple[Tensor, Any]:
        if not self.supports(weight, dy.dtype, g, "input_gradient"):
            return super().relu_gradient(dy, y, weight, g, normed)
        x, norm, (stats, *_) = normed
        return self._ops.input_gradient_and_sums(
            dy, operand(weight), sizes(g), x, stats, *norm.operands(x)
        )

    def weight_gradient(self, dy: Tensor, x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
        if not self.supports(weight, dy.dtype, g, "weight_gradient"):
            return super().weight_gradient(dy, x, weight, g)
        taps, contiguous = weight.shape[2:], weight.is_contiguous()
        return self._ops.weight_gradient(dy, x, *taps, sizes(g), contiguous).to(weight.dtype)

    def norm_gradients_from_sums(
        self, sums: Any, dy: Tensor, y: Tensor, normed: Normed
    ) -> NormGradients:
        if sums is None:
            return super().norm_gradients_from_sums(sums, dy, y, normed)
        total = self._all_reduced(sums, normed.norm)
        return self._gradients(sums, total, 1, normed, dy, None, recompute_mask=True)

    def statistics(
        self, x: Tensor, group: Any = None, fused: tuple[Any, ...] | None = None
    ) -> tuple[Any, ...]:
        stats = self._ops.bn_statistics(x) if fused is None else fused[0]
        if group is None:
            return (stats,)
        return collectives.merge(stats, x.numel() // x.shape[1], group)

    def count(self, normed: Normed) -> int:
        return super().count(normed) if len(normed.state) == 1 else int(normed.state[1])

    def normalise(
        self, x: Tensor, norm: Norm, residual: Tensor | Normed | None, activation: Activation
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        state = self.statistics(x, norm.group)
        return self.apply(Normed(x, norm, state), residual, activation), state

    def apply(
        self, normed: Normed, residual: Tensor | Normed | None, activation: Activation
    ) -> Tensor:
        x, norm, (stats, *_) = normed
        other: tuple[Any, ...] = (residual, None, None, None, 0.0)
        if isinstance(residual, Normed):
            r, n, s = residual
            other = (r, s[0], *n.operands(x))
        return self._ops.bn_apply(x, stats, *norm.operands(x), *other, activation)

    def norm_gradients(
        self,
        dy: Tensor,
        y: Tensor | None,
        normed: Normed,
        other: Normed | None = None,
        *,
        has_residual: bool,
        masked: bool = False,
    ) -> tuple[NormGradients, NormGradients | None, Tensor | None]:
        masked = masked or other is not None
        x, norm, (stats, *_) = normed
        # y = relu(norm(x)) without a residual is recomputed from x rather than read.
        recompute_mask = not has_residual and y is not None and not masked
        y = None if recompute_mask else y
        x2, stats2 = (None, None) if other is None else (other.x, other.state[0])
        sums, g = self._ops.bn_reduce(
            dy, y, x, stats, *norm.operands(x), recompute_mask, x2, stats2, masked and y is not None
        )
        if y is not None and masked:
            dy, y = g, None
        total, second = self._all_reduced(sums, norm), None
        if other is not None:
            second = self._gradients(sums, total, 2, other, dy, y, recompute_mask)
        first = self._gradients(sums, total, 1, normed, dy, y, recompute_mask)
        return first, second, dy if masked else None

    def _all_reduced(self, sums: Tensor, norm: Norm) -> Tensor:
        """The sums over all processes of the norm's group."""
        return sums if norm.group is None else collectives.reduce(sums, norm.group)

    def _gradients(
        self, sums: Tensor, total: Tensor, row: int, of: Normed, dy: Tensor,
        y: Tensor | None, recompute_mask: bool,
    ) -> NormGradients:  # fmt: skip
        """From bn_reduce's sums (3, C) of this process and their total over all; `row` is this
        norm's. recompute_mask: y = relu(of) is recomputed, not read."""
        x, norm, (stats, *_) = of
        dx = self._ops.bn_gradient(
            dy, y, x, stats, total, row, float(self.count(of)), *norm.operands(x), recompute_mask
        )
        dweight, dbias = self._ops.bn_parameter_gradients(
            sums, row, stats, norm.eps, x.dtype == torch.float64
        )
        return NormGradients(dx, dweight, dbias)

    def pool(self, normed: Normed, window: list[int]) -> tuple[Tensor, Tensor]:
        """maxpool(relu(norm(x))) -> y (N, C, P, Q) and the tap of each maximum, uint8."""
        x, norm, (stats, *_) = normed
        return self._ops.bn_pool(x, stats, *norm.operands(x), window)

    def pool_gradient(
        self, dy: Tensor, y: Tensor, index: Tensor, x: Tensor, window: list[int]
    ) -> Tensor:
        """dy (N, C, P, Q) -> the gradient of norm(x), (N, C, H, W). Only x's shape is used."""
        return self._ops.bn_pool_gradient(dy, y, index, x, window)

    @staticmethod
    def update_running(
        mean: Tensor | None, var: Tensor | None, state: Any, momentum: float, count: int
    ) -> None:
        if not (plain(mean) and plain(var)):
            float64 = any(t is not None and t.dtype == torch.float64 for t in (mean, var))
            stats = state[0] if float64 else state[0].float()
            Passes.update_running(mean, var, stats, momentum, count)
            return
        update_running_together([mean], [var], [], [state[0]], [momentum], [float(count)])


passes = functools.cache(Native)


def plain(t: Tensor | None) -> bool:
    """Whether the C++ ops read and write t directly: contiguous float32."""
    return t is not None and t.dtype == torch.float32 and t.is_contiguous()


def update_running_together(
    means: Any, variances: Any, counters: list[Tensor], stats: Sequence[Tensor],
    momenta: list[float], counts: list[float],
) -> None:  # fmt: skip
    """Updates the running statistics of several norms on the CPU in one op, in place.

    means, variances: `plain` (C,) per norm; counters: their num_batches_tracked, or empty to leave
    those; stats: mean and biased variance (2, C) float64 over `counts` values per channel."""
    counters_or_empty = counters or [stats[0].new_empty(0, dtype=torch.int64)] * len(means)
    torch.ops.fused_resnet_native.bn_update_running(
        means, variances, counters_or_empty, stats, momenta, counts
    )
    torch.autograd.graph.increment_version([*means, *variances, *counters])
