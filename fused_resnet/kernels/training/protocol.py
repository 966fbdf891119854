"""The passes of a block's training step: convolutions, norms and their gradients.

`Passes` defines what each pass computes, by PyTorch's convolutions and the norm ops of a subclass.
Implementations: `native`, this package's C++ on the CPU; `cuda`, its CUDA kernels; `empty`, empty
batches; and the registered ops on any device (fused_resnet/ops/portable.py).

All activations are dense (N, C, H, W). A norm's statistics are a tuple ("state") whose contents
depend on the implementation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet.dtypes import accumulate_dtype
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.problem import Geometry


class Norm(NamedTuple):
    """The parameters of a batch norm: weight, bias (C,) or None, in any floating dtype. group: the
    process group that the statistics are over; None for this process only."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    group: Any = None

    def operands(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, float]:
        """Weight, bias and eps as kernels take them with x."""
        return vector(self.weight, x), vector(self.bias, x), self.eps


class Normed(NamedTuple):
    """norm(x): x (N, C, H, W), the norm, and the statistics that it normalises by."""

    x: Tensor
    norm: Norm
    state: tuple[Tensor, ...]


class NormGradients(NamedTuple):
    """dx of the norm's input, and the norm's dweight and dbias (C,)."""

    dx: Tensor
    dweight: Tensor
    dbias: Tensor


def vector(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A norm's parameter (C,) in the dtype in which x is accumulated."""
    return None if t is None else t.detach().to(accumulate_dtype(x.dtype)).contiguous()


def convolution_gradients(dy: Tensor, x: Tensor, weight: Tensor, g: Any, mask: list[bool]) -> Any:
    """PyTorch's dx, dweight and dbias, None where `mask` is False. g: a `Geometry` or the like."""
    stride, padding, dilation, groups = g
    return torch.ops.aten.convolution_backward(
        dy, x, weight.to(x.dtype), None, stride, padding, dilation, False, [0, 0], groups, mask
    )


class Passes:
    """Convolutions by PyTorch; norms by `bn_add_relu` and `bn_add_relu_backward` of a subclass."""

    def bn_add_relu(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
        eps: float, activation: Activation,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The op of this name: y, mean, var."""
        raise NotImplementedError

    def bn_add_relu_backward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The op of this name: dx, dweight, dbias, dresidual."""
        raise NotImplementedError

    pools = False  # whether `pool` and `pool_gradient` are implemented

    def pool(self, normed: Normed, window: list[int]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def pool_gradient(
        self, dy: Tensor, y: Tensor, index: Tensor, x: Tensor, window: list[int]
    ) -> Tensor:
        raise NotImplementedError

    def convolution(
        self, x: Tensor, weight: Tensor, g: Geometry, residual: Tensor | None = None
    ) -> Tensor:
        """x (N, C, H, W), weight (K, C/groups, R, S) -> conv(x, weight) + residual (N, K, P, Q)."""
        y = torch.ops.aten.convolution(
            x, weight.to(x.dtype), None, g.stride, g.padding, g.dilation, False, [0, 0], g.groups
        )
        return y if residual is None else y.add_(residual)

    def convolve(
        self, x: Tensor, weight: Tensor, g: Geometry
    ) -> tuple[Tensor, tuple[Any, ...] | None]:
        """`convolution`, and the fused statistics of its output for the norm that follows; None
        where the kernel does not compute them."""
        return self.convolution(x, weight, g), None

    def convolve_normed(
        self, normed: Normed, weight: Tensor, g: Geometry
    ) -> tuple[Tensor, tuple[Any, ...] | None] | None:
        """`convolve` of relu(norm(x)) without writing relu(norm(x)), bitwise equal to `apply` and
        `convolve`; None where no kernel supports it."""
        return None

    def input_gradient(
        self, dy: Tensor, x: Tensor, weight: Tensor, g: Geometry, added: Tensor | None = None
    ) -> Tensor:
        """dy (N, K, P, Q) -> dx (N, C, H, W) of the convolution, plus `added`. Only x's shape is
        used. `added` may be overwritten and returned."""
        dx = convolution_gradients(dy, x, weight, g, [True, False, False])[0]
        return dx if added is None else dx.add_(added)

    def weight_gradient(self, dy: Tensor, x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
        """dy (N, K, P, Q), x (N, C, H, W) -> dweight, of weight's shape and dtype."""
        mask = [False, True, False]
        return convolution_gradients(dy, x, weight, g, mask)[1].to(weight.dtype)

    def normalise(
        self, x: Tensor, norm: Norm, residual: Tensor | Normed | None, activation: Activation
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """activation(norm(x) + residual) by x's own statistics, and these; a `Normed` residual is
        normalised by its state."""
        if isinstance(residual, Normed):
            residual = self.apply(residual, None, Activation.NONE)
        y, mean, var = self.bn_add_relu(x, norm.weight, norm.bias, residual, norm.eps, activation)
        return y, (mean, var)

    def normalise_with(
        self, fused: tuple[Any, ...] | None, x: Tensor, norm: Norm,
        residual: Tensor | Normed | None, activation: Activation,
    ) -> tuple[Tensor, tuple[Any, ...]]:  # fmt: skip
        """`normalise` by the fused statistics of x's convolution; None: computes them from x."""
        if fused is None:
            return self.normalise(x, norm, residual, activation)
        state = self.statistics(x, norm.group, fused)
        return self.apply(Normed(x, norm, state), residual, activation), state

    def statistics(
        self, x: Tensor, group: Any = None, fused: tuple[Any, ...] | None = None
    ) -> tuple[Any, ...]:
        """The state by which `normalise` normalises x, over the process group if there is one.
        fused: the statistics that `convolve` returned with x, or None."""
        if fused is not None:
            return fused
        return self.bn_add_relu(x, None, None, None, 1.0, Activation.NONE)[1:]

    def count(self, normed: Normed) -> int:
        """The number of values per channel in the statistics of `normed`."""
        return normed.x.numel() // normed.x.shape[1]

    def apply(
        self, normed: Normed, residual: Tensor | Normed | None, activation: Activation
    ) -> Tensor:
        """activation(norm(x) + residual) by the state of `normed`, bitwise equal to `normalise`."""
        return self.normalise(normed.x, normed.norm, residual, activation)[0]

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
        """Gradients of y = relu(norm(x) + other + residual): of `normed`, of `other`, and, if
        `masked` or if there is `other`, g = dy * !(y <= 0), the gradient of the residual.

        y: None without a ReLU. has_residual: whether anything was added, `other` or a residual."""
        op = self.bn_add_relu_backward
        masked = masked or other is not None
        x, norm, (mean, var, *_) = normed
        relu = y is not None
        dx, dweight, dbias, g = op(
            dy, x, y, norm.weight, mean, var, norm.eps, relu, True, masked and relu
        )
        first = NormGradients(dx, dweight, dbias)
        g = g if relu else dy
        if other is None:
            return first, None, g if masked else None
        x, norm, (mean, var, *_) = other
        second = op(g, x, None, norm.weight, mean, var, norm.eps, False, True, False)
        return first, NormGradients(*second[:3]), g

    def relu_gradient(
        self, dy: Tensor, y: Tensor, weight: Tensor, g: Geometry, normed: Normed
    ) -> tuple[Tensor, Any]:
        """`input_gradient` of a convolution whose input is y = relu(normed), (N, C, H, W), and the
        sums for `norm_gradients_from_sums`; None where the kernel does not compute them. With sums,
        the gradient may be masked already: only `norm_gradients_from_sums` takes it."""
        return self.input_gradient(dy, y, weight, g), None

    def norm_gradients_from_sums(
        self, sums: Any, dy: Tensor, y: Tensor, normed: Normed
    ) -> NormGradients:
        """`norm_gradients` of y = relu(normed), from the sums that `relu_gradient` returned with
        dy; None: computes them."""
        return self.norm_gradients(dy, y, normed, has_residual=False)[0]

    @staticmethod
    def update_running(
        mean: Tensor | None, var: Tensor | None, state: Any, momentum: float, count: int
    ) -> None:
        """running = running * (1 - momentum) + now * momentum, in place; the variance is unbiased
        over `count` values. mean, var: the running ones, (C,) or None; state: the batch's mean and
        biased variance, (C,) each."""
        for running, now in ((mean, state[0]), (var, state[1] * (count / (count - 1)))):
            if running is not None:
                running.copy_(running.to(now.dtype) * (1 - momentum) + now * momentum)
