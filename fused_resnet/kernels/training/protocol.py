"""A training step of a block, pass by pass: convolutions and norms with their gradients.

`Passes` states what each pass computes, by PyTorch's convolutions and the norm ops of a subclass.
Implementations: `native`, this package's C++ on the CPU; `cuda`, its CUDA kernels; `empty`, batches
without images; and the registered ops on any device (fused_resnet/ops/portable.py).

All activations are (N, C, H, W), dense; statistics are the implementation's own kind of state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet.dtypes import accumulate_dtype


class Geometry(NamedTuple):
    """A convolution's stride, padding and dilation in pixels, (height, width), and its groups."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class Norm(NamedTuple):
    """Batch normalisation's parameters: weight, bias (C,) or None, in any floating dtype. group:
    the processes whose values it normalises by, None for this one alone."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    group: Any = None


class Normed(NamedTuple):
    """x (N, C, H, W) as `norm` normalises it by the statistics in `state`."""

    x: Tensor
    norm: Norm
    state: tuple[Tensor, ...]


class NormGradients(NamedTuple):
    """dx of the normalised tensor, dweight and dbias (C,) of its norm."""

    dx: Tensor
    dweight: Tensor
    dbias: Tensor


def vector(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A norm's parameter (C,) in the dtype that x's sums are kept in."""
    return None if t is None else t.detach().to(accumulate_dtype(x.dtype)).contiguous()


def update_running(
    mean: Tensor | None, var: Tensor | None, state: Any, momentum: float, count: int
) -> None:
    """running = running * (1 - momentum) + now * momentum, in place; the variance unbiased over
    `count` values. mean, var: (C,) or None; state: the batch's mean and biased variance (C,)."""
    for running, now in ((mean, state[0]), (var, state[1] * (count / (count - 1)))):
        if running is not None:
            running.copy_(running.to(now.dtype) * (1 - momentum) + now * momentum)


class Passes:
    """Convolutions by PyTorch; norms by `bn_add_relu` and `bn_add_relu_backward` of a subclass."""

    def bn_add_relu(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
        eps: float, relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """As the op of that name: y, mean, var."""
        raise NotImplementedError

    def bn_add_relu_backward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As the op of that name: dx, dweight, dbias, dresidual."""
        raise NotImplementedError

    pools = False  # whether a stem's norm and ReLU are pooled in one pass

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
        """`convolution`, and the statistics of it that a norm normalises by, where they come with
        it."""
        return self.convolution(x, weight, g), None

    def convolve_normed(
        self, normed: Normed, weight: Tensor, g: Geometry
    ) -> tuple[Tensor, tuple[Any, ...] | None] | None:
        """`convolve` of relu(norm(x)), which is not written, with the bits that `apply` and
        `convolve` have; None where no kernel does that."""
        return None

    def _gradient(self, dy: Tensor, x: Tensor, weight: Tensor, g: Geometry, mask: Any) -> Any:
        return torch.ops.aten.convolution_backward(
            dy, x, weight.to(x.dtype), None, g.stride, g.padding, g.dilation, False, [0, 0],
            g.groups, mask,
        )  # fmt: skip

    def input_gradient(
        self, dy: Tensor, x: Tensor, weight: Tensor, g: Geometry, added: Tensor | None = None
    ) -> Tensor:
        """dy (N, K, P, Q) -> dx (N, C, H, W) of the convolution, plus `added`; x lends its shape.

        `added` may be written to and returned."""
        dx = self._gradient(dy, x, weight, g, [True, False, False])[0]
        return dx if added is None else dx.add_(added)

    def weight_gradient(self, dy: Tensor, x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
        """dy (N, K, P, Q), x (N, C, H, W) -> dweight, of weight's shape and dtype."""
        return self._gradient(dy, x, weight, g, [False, True, False])[1].to(weight.dtype)

    def normalise(
        self, x: Tensor, norm: Norm, residual: Tensor | Normed | None, relu: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """relu(norm(x) + residual) by x's own statistics, and those; a `Normed` is normalised."""
        if isinstance(residual, Normed):
            residual = self.apply(residual, None, relu=False)
        y, mean, var = self.bn_add_relu(x, norm.weight, norm.bias, residual, norm.eps, relu)
        return y, (mean, var)

    def normalise_by(
        self, made: tuple[Any, ...] | None, x: Tensor, norm: Norm,
        residual: Tensor | Normed | None, relu: bool,
    ) -> tuple[Tensor, tuple[Any, ...]]:  # fmt: skip
        """`normalise` by the statistics that came with x's convolution, or None: by x's own."""
        if made is None:
            return self.normalise(x, norm, residual, relu)
        state = self.statistics(x, norm.group, made)
        return self.apply(Normed(x, norm, state), residual, relu), state

    def statistics(
        self, x: Tensor, group: Any = None, made: tuple[Any, ...] | None = None
    ) -> tuple[Any, ...]:
        """What `normalise` would normalise x by; over a process group where that is given. `made`:
        what came with x's convolution."""
        if made is not None:
            return made
        return self.bn_add_relu(x, None, None, None, 1.0, False)[1:]

    def count(self, normed: Normed) -> int:
        """The values per channel that `normed` is normalised by."""
        return normed.x.numel() // normed.x.shape[1]

    def apply(self, normed: Normed, residual: Tensor | Normed | None, relu: bool) -> Tensor:
        """`normalise` once more, to the last bit the same."""
        return self.normalise(normed.x, normed.norm, residual, relu)[0]

    def norm_gradients(
        self,
        dy: Tensor,
        y: Tensor | None,
        normed: Normed,
        other: Normed | None = None,
        *,
        alone: bool,
        masked: bool = False,
    ) -> tuple[NormGradients, NormGradients | None, Tensor | None]:
        """Gradients of relu(norm(x) + other), y being the ReLU's output, None without one: of
        `normed`, of `other`, and g = dy where y lets it through, where `masked` asks for that.
        `alone`: nothing was added, neither `other` nor what has g for its gradient."""
        op = self.bn_add_relu_backward
        masked = masked or other is not None
        x, norm, (mean, var) = normed
        relu = y is not None
        dx, dweight, dbias, g = op(
            dy, x, y, norm.weight, mean, var, norm.eps, relu, True, masked and relu
        )
        first = NormGradients(dx, dweight, dbias)
        g = g if relu else dy
        if other is None:
            return first, None, g if masked else None
        x, norm, (mean, var) = other
        rest = op(g, x, None, norm.weight, mean, var, norm.eps, False, True, False)
        return first, NormGradients(*rest[:3]), g

    def relu_gradient(
        self, dy: Tensor, y: Tensor, weight: Tensor, g: Geometry, normed: Normed
    ) -> tuple[Tensor, Any]:
        """`input_gradient` where the convolution's input is y = relu(normed), (N, C, H, W), and the
        sums that the norm's gradients are made of, where they come with it: then it is masked."""
        return self.input_gradient(dy, y, weight, g), None

    def norm_gradients_by(self, made: Any, dy: Tensor, y: Tensor, normed: Normed) -> NormGradients:
        """`norm_gradients` of y = relu(normed), by the sums that came with dy, or None: by its
        own."""
        return self.norm_gradients(dy, y, normed, alone=True)[0]

    def update_running(
        self, mean: Tensor | None, var: Tensor | None, state: Any, momentum: float, count: int
    ) -> None:
        update_running(mean, var, state, momentum, count)


def gradient_padding(weight: Tensor, g: Geometry) -> list[int] | None:
    """Padding of dy in the convolution of stride 1, by weights with their taps reversed, that is
    the gradient of g's by its input: dilation * (taps - 1) - padding, (2,). None where there is no
    such convolution: g has strides, or pads beyond its taps."""
    taps = zip(g.dilation, weight.shape[2:], g.padding, strict=True)
    padding = [d * (k - 1) - p for d, k, p in taps]
    return padding if g.stride == (1, 1) and min(padding) >= 0 else None
