"""The passes of a training step by this package's CUDA kernels.

The convolution's epilogue computes the statistics of the norm that follows, so no pass reads z for
them:

    z = conv(x, weight),   mean[k], var[k] = over pixels of z[., k] as it is stored

In backward, where the convolution's input was relu(norm(z)), the input gradient's epilogue applies
the ReLU's mask and computes the sums of the norm's gradient, so no pass reads dx for them:

    dx = conv's gradient,   g = dx * !(relu(norm(z)) <= 0),   sum g, sum g * (z - mean)

This gradient is itself a convolution of stride 1 (`turned`), with its own `Gemm`.

`tuning` selects the provider of each convolution from the measurements of `fused-resnet tune`.
These kernels are used where native was fastest, with the tile that was. Convolutions without a
measurement use cuDNN followed by `bn_add_relu`, unless the native backend is forced.

Where the next convolution is 1x1 and also computed by one of these kernels, and the activation
between is not saved for backward ("low" and below, activation_memory.py), the norm and the ReLU are
applied in the prologue as z is read, and the activation is never written:

    z' = conv(a, weight),   a = relu(norm(z))

This saves writing and reading the activation, 4 of 6 bytes per element, but normalises z once per
tile of outputs. By prediction (csrc/cuda/convolution/prologue.cuh) that pays for up to about 512
outputs, the first two stages of a bottleneck network. It has not been measured. A measurement
(`gpu_ops_prologue` of benchmarks/gpu_day.sh) would decide for which convolutions `convolve_normed`
is used, and whether "auto", a model's default, is "low" here too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_resnet.kernels import registry, tuning
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.cuda import implicit_gemm
from fused_resnet.kernels.cuda.implicit_gemm import CudaConfig, aligned
from fused_resnet.kernels.problem import Geometry, Problem, output_shape
from fused_resnet.kernels.target import multiprocessors
from fused_resnet.layout import channels_last_empty, channels_last_strides, dense, like

from .protocol import Norm, Normed, NormGradients, Passes, vector


class Cuda(Passes):
    """State of a norm: mean, variance and the mean's rounding error (`rest`), (C,) each; `rest` is
    None unless the statistics are fused ones, from a convolution."""

    def bn_add_relu(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
        eps: float, activation: Activation,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        x = dense(x)
        residual = None if residual is None else like(residual, x)
        norm = vector(weight, x), vector(bias, x)
        return implicit_gemm.ops(x).bn_add_relu(x, *norm, residual, eps, activation)

    def bn_add_relu_backward(
        self, dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = dense(x)
        y = None if y is None else like(y, x)
        op = implicit_gemm.ops(x).bn_add_relu_backward
        return op(like(dy, x), x, y, vector(weight, x), *rest)

    def _config(self, x: Tensor, weight: Tensor, g: Geometry) -> Any:
        """The tile and splits with which a kernel computes the convolution; None: use cuDNN."""
        out = output_shape(x.shape, weight.shape, *g)
        if out is None or x.stride() != channels_last_strides(x.shape):
            return None
        on_gpu = registry.target(x.device).vendor != "cpu"
        if weight.shape[1] * x.element_size() % 16 or not on_gpu:
            return None
        problem = Problem("conv_bn_relu", x.dtype, weight.shape, g, x.shape)
        choice = tuning.choice_for(problem, x.device)
        forced = registry.forced() is not None
        if choice.backend != "native" or (not forced and math.isinf(choice.time_s)):
            return None
        target = implicit_gemm.target(x.device)
        config = implicit_gemm.fitting(choice.config, problem, target, multiprocessors(x.device))
        # The stem's kernel computes no statistics, and the tile that replaces it was not measured.
        return config if forced or config == choice.config else None

    def convolve(
        self, x: Tensor, weight: Tensor, g: Geometry
    ) -> tuple[Tensor, tuple[Any, ...] | None]:
        config = self._config(x, weight, g)
        if config is None:
            return super().convolution(x, weight, g), None
        return self.convolve_with_config(config, x, weight, g)

    def convolve_with_config(
        self, config: CudaConfig, x: Tensor, weight: Tensor, g: Geometry
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`convolve` with a tile and splits. x: channels_last."""
        out = output_shape(x.shape, weight.shape, *g)
        assert out is not None
        z = channels_last_empty(out, x)
        rows = weight.detach().to(x.dtype).permute(0, 2, 3, 1).contiguous()  # (K, R, S, C)
        statistics, pixels = implicit_gemm.ops(x).convolution_statistics(
            aligned(x), aligned(rows), z, g.stride, g.padding, g.dilation,
            g.groups, config.tile, config.splits,
        )  # fmt: skip
        return z, self._merged(statistics, z, pixels)

    def convolve_normed(
        self, normed: Normed, weight: Tensor, g: Geometry
    ) -> tuple[Tensor, tuple[Any, ...] | None] | None:
        x, _, state = normed
        pointwise = (*weight.shape[2:], *g) == (1, 1, (1, 1), (0, 0), (1, 1), 1)
        # Statistics that are not fused have no `rest`; `apply` recomputes it from x.
        if not pointwise or state[2] is None or x.dtype not in (torch.float16, torch.bfloat16):
            return None
        config = self._config(x, weight, g)
        if config is None or not implicit_gemm.normalises(config):
            return None
        return self.convolve_normed_with_config(config, normed, weight)

    def convolve_normed_with_config(
        self, config: CudaConfig, normed: Normed, weight: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`convolve_normed` with a tile. normed: channels_last; weight (K, C, 1, 1)."""
        x, norm, (mean, var, rest) = normed
        z = channels_last_empty((x.shape[0], weight.shape[0], *x.shape[2:]), x)
        rows = weight.detach().to(x.dtype).permute(0, 2, 3, 1).contiguous()  # (K, 1, 1, C)
        statistics, pixels = implicit_gemm.ops(x).normalised_convolution_statistics(
            aligned(x), mean, var, rest, *norm.operands(x), aligned(rows), z, config.tile
        )
        return z, self._merged(statistics, z, pixels)

    def _merged(self, statistics: Tensor, z: Tensor, pixels: int) -> tuple[Tensor, ...]:
        count = z.numel() // z.shape[1]
        return tuple(implicit_gemm.ops(z).bn_merge_statistics(statistics, count, pixels))

    def convolution(
        self, x: Tensor, weight: Tensor, g: Geometry, residual: Tensor | None = None
    ) -> Tensor:
        """By the same kernel as `convolve`: backward recomputes some outputs, bitwise equal."""
        if residual is not None:
            return super().convolution(x, weight, g, residual)
        return self.convolve(x, weight, g)[0]

    def normalise(
        self, x: Tensor, norm: Norm, residual: Tensor | Normed | None, activation: Activation
    ) -> tuple[Tensor, tuple[Any, ...]]:
        y, state = super().normalise(x, norm, residual, activation)
        return y, (*state, None)

    def statistics(
        self, x: Tensor, group: Any = None, fused: tuple[Any, ...] | None = None
    ) -> tuple[Any, ...]:
        return fused or (*super().statistics(x, group), None)

    def apply(
        self, normed: Normed, residual: Tensor | Normed | None, activation: Activation
    ) -> Tensor:
        x, norm, (mean, var, rest) = normed
        if rest is None:
            return super().apply(normed, residual, activation)
        if isinstance(residual, Normed):
            residual = self.apply(residual, None, Activation.NONE)
        return implicit_gemm.ops(x).bn_normalise(
            x, mean, var, rest, vector(norm.weight, x), vector(norm.bias, x), residual, norm.eps,
            activation,
        )  # fmt: skip

    def relu_gradient(
        self, dy: Tensor, y: Tensor, weight: Tensor, g: Geometry, normed: Normed
    ) -> tuple[Tensor, Any]:
        config = self._gradient_config(dy, weight, g, normed)
        if config is None:
            return super().relu_gradient(dy, y, weight, g, normed)
        return self.relu_gradient_with_config(config, dy, weight, g, normed)

    def _gradient_config(self, dy: Tensor, weight: Tensor, g: Geometry, normed: Normed) -> Any:
        """`_config` of the input gradient with the mask and sums of `normed`; None: use cuDNN and a
        separate pass. Without `rest` the recomputed mask would not be bitwise equal."""
        geometry = turned_geometry(weight, g)
        if geometry is None or normed.state[2] is None or dy.element_size() != 2:
            return None
        return self._config(dy, turned(weight, g.groups), geometry)

    def relu_gradient_with_config(
        self,
        config: CudaConfig,
        dy: Tensor,
        weight: Tensor,
        g: Geometry,
        normed: Normed,
    ) -> tuple[Tensor, Tensor]:
        """`relu_gradient` with a tile and splits. dy, normed.x: channels_last."""
        geometry = turned_geometry(weight, g)
        assert geometry is not None
        x, norm, (mean, var, rest) = normed
        rows = turned_rows(weight, g.groups, dy.dtype)
        dx = channels_last_empty(x.shape, dy)
        sums = implicit_gemm.ops(x).convolution_gradient_sums(
            aligned(dy), rows, dx, aligned(x), mean, var, rest, *norm.operands(x), *geometry[1:],
            config.tile, config.splits,
        )  # fmt: skip
        return dx, sums

    def norm_gradients_from_sums(
        self, sums: Any, dy: Tensor, y: Tensor, normed: Normed
    ) -> NormGradients:
        if sums is None:
            return super().norm_gradients_from_sums(sums, dy, y, normed)
        x, norm, (mean, var, _) = normed
        gradients = implicit_gemm.ops(x).bn_gradient_by_sums(
            dy, x, sums, vector(norm.weight, x), mean, var, norm.eps
        )
        return NormGradients(*gradients)


def turned(weight: Tensor, groups: int) -> Tensor:
    """weight (K, C / groups, R, S) of a convolution of stride 1 -> the weight (C, K / groups, R, S)
    of the convolution that is its input gradient, except that its taps are not yet reversed."""
    if groups == 1:
        return weight.transpose(0, 1)
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def turned_rows(weight: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """`turned` with its taps reversed, (C, R, S, K / groups), as the kernels read it."""
    exchanged = turned(weight.detach(), groups)
    if weight[0, 0].numel() > 1:
        exchanged = exchanged.flip((2, 3))
    C, K, R, S = exchanged.shape
    rows = torch.empty((C, R, S, K), dtype=dtype, device=weight.device)
    return rows.copy_(exchanged.permute(0, 2, 3, 1))


def turned_geometry(weight: Tensor, g: Geometry) -> Geometry | None:
    """The geometry of the convolution by the weight `turned` that is the input gradient of g's
    convolution: padding is dilation * (taps - 1) - padding. None where there is no such
    convolution: g's stride is not 1, or its padding exceeds that of its taps."""
    taps = zip(g.dilation, weight.shape[2:], g.padding, strict=True)
    top, left = (d * (k - 1) - p for d, k, p in taps)
    return g._replace(padding=(top, left)) if g.stride == (1, 1) and min(top, left) >= 0 else None


def gradient_layer(layer: Problem) -> Problem | None:
    """The convolution that is a layer's input gradient; None if it is not a convolution."""
    weight, g = torch.empty(layer.weight_shape, device="meta"), layer.geometry
    geometry = turned_geometry(weight, g)
    if geometry is None:
        return None
    shape = tuple(turned(weight, g.groups).shape)
    return layer._replace(weight_shape=shape, geometry=geometry, x_shape=layer.y_shape)


CUDA = Cuda()
