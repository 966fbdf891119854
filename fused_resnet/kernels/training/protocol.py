"""What a training step of a block is made of, pass by pass: convolutions and norms with their
gradients. Two makers: `Native`, this package's C++ on the CPU, and `Portable`, the registered ops
and PyTorch's convolutions, on any device.

All activations are (N, C, H, W), dense; statistics are the maker's own kind of state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet.kernels import backends, native
from fused_resnet.layers import sync_batch_norm
from fused_resnet.ops.reference import accumulate_dtype


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


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


class Portable:
    """By the registered ops (CUDA, Triton or the reference) and PyTorch's convolutions."""

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
        y, mean, var = torch.ops.fused_resnet.bn_add_relu(
            x, norm.weight, norm.bias, residual, norm.eps, relu
        )
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
        return torch.ops.fused_resnet.bn_add_relu(x, None, None, None, 1.0, False)[1:]

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
        op = torch.ops.fused_resnet.bn_add_relu_backward
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
        """running = running * (1 - momentum) + now * momentum, in place; the variance unbiased over
        `count` values."""
        for running, now in ((mean, state[0]), (var, state[1] * (count / (count - 1)))):
            if running is not None:
                running.copy_(running.to(now.dtype) * (1 - momentum) + now * momentum)


def gradient_padding(weight: Tensor, g: Geometry) -> list[int] | None:
    """Padding of dy in the convolution of stride 1, by weights with their taps reversed, that is
    the gradient of g's by its input: dilation * (taps - 1) - padding, (2,). None where there is no
    such convolution: g has strides, or pads beyond its taps."""
    taps = zip(g.dilation, weight.shape[2:], g.padding, strict=True)
    padding = [d * (k - 1) - p for d, k, p in taps]
    return padding if g.stride == (1, 1) and min(padding) >= 0 else None


class Native(Portable):
    """By this package's C++ on the CPU: outputs in memory that comes back from step to step."""

    pools = True

    def __init__(self) -> None:
        self._ops = torch.ops.fused_resnet_native
        names: Any = native.build_info()["conv_dtypes"]
        self._dtypes = [getattr(torch, name) for name in names]

    def _serves(self, weight: Tensor, dtype: torch.dtype, g: Geometry) -> bool:
        K, C, R, S = weight.shape
        return dtype in self._dtypes and g.groups == 1 and not (K % 16 or C % 16) and R * S <= 9

    def _convolve(
        self, x: Tensor, weight: Tensor, transposed: bool, residual: Tensor | None,
        stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    ) -> Tensor:  # fmt: skip
        """In the residual's memory where it is transposed."""
        weight = _channels_last(weight.detach().float())
        overwrite = transposed and residual is not None
        return self._ops.convolution(
            x, weight, transposed, residual, overwrite, stride, padding, dilation
        )

    def convolution(
        self, x: Tensor, weight: Tensor, g: Geometry, residual: Tensor | None = None
    ) -> Tensor:
        if not self._serves(weight, x.dtype, g):
            return _channels_last(super().convolution(x, weight, g, residual))
        return self._convolve(x, weight, False, residual, g.stride, g.padding, g.dilation)

    def convolve(
        self, x: Tensor, weight: Tensor, g: Geometry
    ) -> tuple[Tensor, tuple[Any, ...] | None]:
        if not self._serves(weight, x.dtype, g):
            return super().convolve(x, weight, g)
        weight = _channels_last(weight.detach().float())
        y, stats = self._ops.convolution_and_statistics(x, weight, g.stride, g.padding, g.dilation)
        return y, (stats,)

    def input_gradient(
        self, dy: Tensor, x: Tensor, weight: Tensor, g: Geometry, added: Tensor | None = None
    ) -> Tensor:
        padding = gradient_padding(weight, g)
        serves = self._serves(weight, dy.dtype, g)
        if serves and padding is not None:
            return self._convolve(dy, weight, True, added, [1, 1], padding, g.dilation)
        if serves and g.dilation == (1, 1):
            weight = _channels_last(weight.detach().float())
            H, W = x.shape[2:]
            return self._ops.strided_input_gradient(dy, weight, H, W, added, g.stride, g.padding)
        return _channels_last(super().input_gradient(dy, x, weight, g, added))

    def relu_gradient(
        self, dy: Tensor, y: Tensor, weight: Tensor, g: Geometry, normed: Normed
    ) -> tuple[Tensor, Any]:
        unit = gradient_padding(weight, g) is not None or g.dilation == (1, 1)
        if not (unit and self._serves(weight, dy.dtype, g)):
            return super().relu_gradient(dy, y, weight, g, normed)
        x, norm, (stats, *_) = normed
        return self._ops.input_gradient_and_sums(
            dy, _channels_last(weight.detach().float()), g.stride, g.padding, g.dilation,
            x, stats, vector(norm.weight, x), vector(norm.bias, x), norm.eps,
        )  # fmt: skip

    def norm_gradients_by(self, made: Any, dy: Tensor, y: Tensor, normed: Normed) -> NormGradients:
        if made is None:
            return super().norm_gradients_by(made, dy, y, normed)
        everywhere = self._everywhere(made, normed.norm)
        return self._gradients(made, everywhere, 1, normed, dy, None, own=True)

    def weight_gradient(self, dy: Tensor, x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
        K, C, R, S = weight.shape
        narrow = C < 16 and S * C >= 7 and R <= 16 and K % 16 == 0 and g.dilation == (1, 1)
        if narrow and g.groups == 1 and dy.dtype in self._dtypes:
            sums = self._ops.narrow_weight_gradient(dy, x, R, S, g.stride, g.padding)
            return sums.view(R, S, C, K).permute(3, 2, 0, 1).to(weight.dtype)
        if not self._serves(weight, dy.dtype, g):
            return super().weight_gradient(dy, x, weight, g)
        return self._ops.convolution_weight_gradient(
            dy, x, R, S, g.stride, g.padding, g.dilation
        ).to(weight.dtype)

    def statistics(
        self, x: Tensor, group: Any = None, made: tuple[Any, ...] | None = None
    ) -> tuple[Any, ...]:
        stats = self._ops.bn_statistics(x) if made is None else made[0]
        if group is None:
            return (stats,)
        return sync_batch_norm.merge(stats, x.numel() // x.shape[1], group)

    def count(self, normed: Normed) -> int:
        return super().count(normed) if len(normed.state) == 1 else int(normed.state[1])

    def normalise(
        self, x: Tensor, norm: Norm, residual: Tensor | Normed | None, relu: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        state = self.statistics(x, norm.group)
        return self.apply(Normed(x, norm, state), residual, relu), state

    def apply(self, normed: Normed, residual: Tensor | Normed | None, relu: bool) -> Tensor:
        x, norm, (stats, *_) = normed
        other: tuple[Any, ...] = (residual, None, None, None, 0.0)
        if isinstance(residual, Normed):
            r, n, s = residual
            other = (r, s[0], vector(n.weight, x), vector(n.bias, x), n.eps)
        return self._ops.bn_apply(
            x, stats, vector(norm.weight, x), vector(norm.bias, x), norm.eps, *other, relu
        )

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
        masked = masked or other is not None
        x, norm, (stats, *_) = normed
        # What a norm and a ReLU alone made of x is computed again rather than read, in dtypes whose
        # rounding turns no positive number that occurs into zero.
        own = alone and y is not None and not masked
        own = own and x.dtype in (torch.float32, torch.bfloat16)
        y = None if own else y
        x2, stats2 = (None, None) if other is None else (other.x, other.state[0])
        sums, g = self._ops.bn_reduce(
            dy, y, x, stats, vector(norm.weight, x), vector(norm.bias, x), norm.eps, own,
            x2, stats2, masked and y is not None,
        )  # fmt: skip
        if y is not None and masked:
            dy, y = g, None
        everywhere, second = self._everywhere(sums, norm), None
        if other is not None:
            second = self._gradients(sums, everywhere, 2, other, dy, y, own)
        first = self._gradients(sums, everywhere, 1, normed, dy, y, own)
        return first, second, dy if masked else None

    def _everywhere(self, sums: Tensor, norm: Norm) -> Tensor:
        """Of all processes that the norm is over."""
        return sums if norm.group is None else sync_batch_norm.reduce(sums, norm.group)

    def _gradients(
        self, sums: Tensor, everywhere: Tensor, row: int, of: Normed, dy: Tensor,
        y: Tensor | None, own: bool,
    ) -> NormGradients:  # fmt: skip
        """By bn_reduce's sums (3, C), of which `row` is this norm's. own: y is relu(of)."""
        x, norm, (stats, *_) = of
        dx = self._ops.bn_gradient(
            dy, y, x, stats, everywhere, row, float(self.count(of)), vector(norm.weight, x),
            vector(norm.bias, x), norm.eps, own,
        )  # fmt: skip
        dweight, dbias = self._ops.bn_parameter_gradients(
            sums, row, stats, norm.eps, x.dtype == torch.float64
        )
        return NormGradients(dx, dweight, dbias)

    def pool(self, normed: Normed, window: list[int]) -> tuple[Tensor, Tensor]:
        """relu(norm(x)) and max pooling -> y (N, C, P, Q) and the taps that won, uint8."""
        x, norm, (stats, *_) = normed
        return self._ops.bn_pool(
            x, stats, vector(norm.weight, x), vector(norm.bias, x), norm.eps, window
        )

    def pool_gradient(
        self, dy: Tensor, y: Tensor, index: Tensor, x: Tensor, window: list[int]
    ) -> Tensor:
        """dy (N, C, P, Q) -> the gradient of norm(x), (N, C, H, W); x lends its shape."""
        return self._ops.bn_pool_gradient(dy, y, index, x, window)

    def update_running(
        self, mean: Tensor | None, var: Tensor | None, state: Any, momentum: float, count: int
    ) -> None:
        if not (_plain(mean) and _plain(var)):
            wide = any(t is not None and t.dtype == torch.float64 for t in (mean, var))
            now = state[0] if wide else state[0].float()
            super().update_running(mean, var, now, momentum, count)
            return
        update_running_together([mean], [var], [], [state[0]], [momentum], [float(count)])


def _plain(t: Tensor | None) -> bool:
    return t is not None and t.dtype == torch.float32 and t.is_contiguous()


def update_running_together(
    means: Any, variances: Any, counters: list[Tensor], stats: Sequence[Tensor],
    momenta: list[float], counts: list[float],
) -> None:  # fmt: skip
    """Norm by norm, with what counts its batches, on the CPU; `_plain` tensors."""
    counted = counters or [stats[0].new_empty(0, dtype=torch.int64)] * len(means)
    torch.ops.fused_resnet_native.bn_update_running(
        means, variances, counted, stats, momenta, counts
    )
    torch.autograd.graph.increment_version([*means, *variances, *counters])


PORTABLE = Portable()
_native: list[Native] = []


def kernels_for(device_type: str, backend: str) -> Portable:
    """The maker for tensors on such a device, where `backend` computes bn_add_relu."""
    if backends.gpu_kernels(device_type) and backend in ("native", "emulated"):
        from .cuda import CUDA

        return CUDA
    if device_type != "cpu" or backend != "native":
        return PORTABLE
    if not _native:
        _native.append(Native())
    return _native[0]
