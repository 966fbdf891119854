"""A training step's convolutions by this package's CUDA kernels, which take the statistics of the
norm behind them on the way: z is not read once more for those.

    z = conv(x, weight),   mean[k], var[k] = over pixels of z[., k] as it is stored

And in backward their input gradients, where the input was a norm's behind a ReLU: the ReLU's mask
and the sums of the norm's gradient, which are not read once more either.

    dx = conv's gradient,   g = dx * !(relu(norm(z)) <= 0),   sum g, sum g * (z - mean)

Such a gradient is a convolution again (`turned`), of stride 1, with a `Problem` of its own.

Who computes a convolution is decided by `tuning`, from what `fused-resnet tune` has measured: these
kernels serve where native was the fastest, by the tile that was. What nobody has measured is
cuDNN's, with `bn_add_relu` behind it, as everywhere else, unless the native backend is forced.

Where the next convolution is 1x1 and one of these kernels computes it too, and the activation
between is not kept for backward ("low" and below, activation_memory.py), the norm and the ReLU are
applied as it reads z, and the activation is never written:

    z' = conv(a, weight),   a = relu(norm(z))

An activation is written and read by nobody then, 4 bytes an element of 6, but normalised once for
every tile of outputs. By prediction (csrc/cuda/convolution/prologue.cuh) that pays for up to about
512 outputs, the first two stages of a bottleneck network; nobody has measured it. What would change
with a measurement (`gpu_ops_prologue` of benchmarks/gpu_day.sh): for which convolutions
`convolve_normed` serves, and whether "auto", a model's default, is "low" here too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_resnet.kernels import registry, tuning
from fused_resnet.kernels.cuda import implicit_gemm
from fused_resnet.kernels.cuda.implicit_gemm import CudaConfig, aligned
from fused_resnet.kernels.problem import Layer, Problem, geometry_of, operands_of, output_shape
from fused_resnet.kernels.target import capability, multiprocessors
from fused_resnet.layout import channels_last_empty, channels_last_strides, dense, like

from .protocol import Geometry, Norm, Normed, NormGradients, Passes, gradient_padding, vector


class Cuda(Passes):
    """State of a norm: mean and variance (C,), and what the mean's rounding took off; that is None
    where the statistics came with no convolution."""

    def bn_add_relu(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
        eps: float, relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        x = dense(x)
        residual = None if residual is None else like(residual, x)
        norm = vector(weight, x), vector(bias, x)
        return implicit_gemm.ops().bn_add_relu(x, *norm, residual, eps, relu)

    def bn_add_relu_backward(
        self, dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = dense(x)
        y = None if y is None else like(y, x)
        op = implicit_gemm.ops().bn_add_relu_backward
        return op(like(dy, x), x, y, vector(weight, x), *rest)

    def _config(self, x: Tensor, weight: Tensor, g: Geometry) -> Any:
        """The tile and splits by which the kernel computes it for this x, or None: cuDNN does."""
        out = output_shape(x.shape, weight.shape, *g)
        if out is None or x.stride() != channels_last_strides(x.shape):
            return None
        K, C, R, S = weight.shape
        if C * x.element_size() % 16 or not registry.gpu_kernels(x.device.type):
            return None
        pixels = out[0] * out[2] * out[3]
        problem = Problem(pixels, K, C, R, S, g.groups, g.stride[1], operands_of(x.dtype))
        found = tuning.choice(problem, x.device, registry.gpu_conv_backends())
        forced = registry.forced() is not None
        if found is None or found.backend != "native":
            return None
        if not forced and math.isinf(found.time_s):
            return None
        reached = implicit_gemm.reaches(problem, geometry_of(*g[:3]))
        device = capability(x.device), multiprocessors(x.device)
        config = implicit_gemm.fitting(found.config, problem, *device, reached)
        # The stem's kernel takes no statistics; a tile in its stead, nobody has measured.
        return config if forced or config == found.config else None

    def convolve(
        self, x: Tensor, weight: Tensor, g: Geometry
    ) -> tuple[Tensor, tuple[Any, ...] | None]:
        config = self._config(x, weight, g)
        if config is None:
            return super().convolution(x, weight, g), None
        return self.convolve_by(config, x, weight, g)

    def convolve_by(
        self, config: CudaConfig, x: Tensor, weight: Tensor, g: Geometry
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`convolve` by a tile, and splits. x: channels_last."""
        out = output_shape(x.shape, weight.shape, *g)
        assert out is not None
        z = channels_last_empty(out, x)
        rows = weight.detach().to(x.dtype).permute(0, 2, 3, 1).contiguous()  # (K, R, S, C)
        statistics, pixels = implicit_gemm.ops().convolution_statistics(
            aligned(x), aligned(rows), z, g.stride, g.padding, g.dilation,
            g.groups, config.tile, config.splits,
        )  # fmt: skip
        return z, self._merged(statistics, z, pixels)

    def convolve_normed(
        self, normed: Normed, weight: Tensor, g: Geometry
    ) -> tuple[Tensor, tuple[Any, ...] | None] | None:
        x, _, state = normed
        pointwise = (*weight.shape[2:], *g) == (1, 1, (1, 1), (0, 0), (1, 1), 1)
        # Statistics that came with no convolution lack the rest, which `apply` knows from x.
        if not pointwise or state[2] is None or x.dtype not in (torch.float16, torch.bfloat16):
            return None
        config = self._config(x, weight, g)
        if config is None or not implicit_gemm.normalises(config):
            return None
        return self.convolve_normed_by(config, normed, weight)

    def convolve_normed_by(
        self, config: CudaConfig, normed: Normed, weight: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`convolve_normed` by a tile. normed: channels_last; weight (K, C, 1, 1)."""
        x, norm, (mean, var, rest) = normed
        z = channels_last_empty((x.shape[0], weight.shape[0], *x.shape[2:]), x)
        rows = weight.detach().to(x.dtype).permute(0, 2, 3, 1).contiguous()  # (K, 1, 1, C)
        statistics, pixels = implicit_gemm.ops().normalised_convolution_statistics(
            aligned(x), mean, var, rest, vector(norm.weight, x), vector(norm.bias, x),
            norm.eps, aligned(rows), z, config.tile,
        )  # fmt: skip
        return z, self._merged(statistics, z, pixels)

    def _merged(self, statistics: Tensor, z: Tensor, pixels: int) -> tuple[Tensor, ...]:
        count = z.numel() // z.shape[1]
        return tuple(implicit_gemm.ops().bn_merge_statistics(statistics, count, pixels))

    def convolution(
        self, x: Tensor, weight: Tensor, g: Geometry, residual: Tensor | None = None
    ) -> Tensor:
        """By whoever computed it before: in backward some are computed again, to the last bit."""
        if residual is not None:
            return super().convolution(x, weight, g, residual)
        return self.convolve(x, weight, g)[0]

    def normalise(
        self, x: Tensor, norm: Norm, residual: Tensor | Normed | None, relu: bool
    ) -> tuple[Tensor, tuple[Any, ...]]:
        y, state = super().normalise(x, norm, residual, relu)
        return y, (*state, None)

    def statistics(
        self, x: Tensor, group: Any = None, made: tuple[Any, ...] | None = None
    ) -> tuple[Any, ...]:
        return made or (*super().statistics(x, group), None)

    def apply(self, normed: Normed, residual: Tensor | Normed | None, relu: bool) -> Tensor:
        x, norm, (mean, var, rest) = normed
        if rest is None:
            return super().apply(normed, residual, relu)
        if isinstance(residual, Normed):
            residual = self.apply(residual, None, relu=False)
        return implicit_gemm.ops().bn_normalise(
            x, mean, var, rest, vector(norm.weight, x), vector(norm.bias, x), residual, norm.eps,
            relu,
        )  # fmt: skip

    def norm_gradients(
        self,
        dy: Tensor,
        y: Tensor | None,
        normed: Normed,
        other: Normed | None = None,
        *,
        alone: bool,
        masked: bool = False,
    ) -> Any:
        normed = normed._replace(state=normed.state[:2])
        if other is not None:
            other = other._replace(state=other.state[:2])
        return super().norm_gradients(dy, y, normed, other, alone=alone, masked=masked)

    def relu_gradient(
        self, dy: Tensor, y: Tensor, weight: Tensor, g: Geometry, normed: Normed
    ) -> tuple[Tensor, Any]:
        config = self._gradient_config(dy, weight, g, normed)
        if config is None:
            return super().relu_gradient(dy, y, weight, g, normed)
        return self.relu_gradient_by(config, dy, weight, g, normed)

    def _gradient_config(self, dy: Tensor, weight: Tensor, g: Geometry, normed: Normed) -> Any:
        """`_config` of the input gradient, with the mask and sums of `normed`; None: cuDNN's, and
        their own pass. Without the mean's rest the mask could not be made again to the last bit."""
        padding = gradient_padding(weight, g)
        if padding is None or normed.state[2] is None or dy.element_size() != 2:
            return None
        return self._config(dy, turned(weight, g.groups), _turned(g, padding))

    def relu_gradient_by(
        self,
        config: CudaConfig,
        dy: Tensor,
        weight: Tensor,
        g: Geometry,
        normed: Normed,
    ) -> tuple[Tensor, Tensor]:
        """`relu_gradient` by a tile, and splits. dy, normed.x: channels_last."""
        padding = gradient_padding(weight, g)
        assert padding is not None
        x, norm, (mean, var, rest) = normed
        rows = turned_rows(weight, g.groups, dy.dtype)
        dx = channels_last_empty(x.shape, dy)
        sums = implicit_gemm.ops().convolution_gradient_sums(
            aligned(dy), rows, dx, aligned(x), mean, var, rest,
            vector(norm.weight, x), vector(norm.bias, x), norm.eps, padding, g.dilation, g.groups,
            config.tile, config.splits,
        )  # fmt: skip
        return dx, sums

    def norm_gradients_by(self, made: Any, dy: Tensor, y: Tensor, normed: Normed) -> NormGradients:
        if made is None:
            return super().norm_gradients_by(made, dy, y, normed)
        x, norm, (mean, var, _) = normed
        found = implicit_gemm.ops().bn_gradient_by_sums(
            dy, x, made, vector(norm.weight, x), mean, var, norm.eps
        )
        return NormGradients(*found)


def turned(weight: Tensor, groups: int) -> Tensor:
    """weight (K, C / groups, R, S) of a convolution of stride 1 -> (C, K / groups, R, S) of the one
    that is its input gradient, but for the taps, which are in reverse there."""
    if groups == 1:
        return weight.transpose(0, 1)
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def turned_rows(weight: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """The same with its taps in reverse, (C, R, S, K / groups), as the kernels read it."""
    found = turned(weight.detach(), groups)
    if weight[0, 0].numel() > 1:
        found = found.flip((2, 3))
    C, K, R, S = found.shape
    rows = torch.empty((C, R, S, K), dtype=dtype, device=weight.device)
    return rows.copy_(found.permute(0, 2, 3, 1))


def _turned(g: Geometry, padding: list[int]) -> Geometry:
    return Geometry((1, 1), (padding[0], padding[1]), g.dilation, g.groups)


def gradient_layer(layer: Layer) -> Layer | None:
    """The convolution that is a layer's input gradient, None where there is no such one."""
    weight = torch.empty(layer.weight_shape, device="meta")
    g = Geometry(*layer.geometry, layer.groups)
    padding = gradient_padding(weight, g)
    if padding is None:
        return None
    shape = tuple(turned(weight, layer.groups).shape)
    geometry = geometry_of(*_turned(g, padding)[:3])
    return Layer(layer.y_shape, shape, layer.x_shape, geometry, layer.groups)


CUDA = Cuda()
