"""The fused convolution on a GPU. Weights are packed once; `tuning` chooses the backend and tile
for each input size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_resnet.kernels import registry, tuning
from fused_resnet.kernels.cache import cacheable, note
from fused_resnet.kernels.convolution import FusedConv
from fused_resnet.kernels.problem import Problem, geometry_of, operands_of
from fused_resnet.kernels.target import capability, multiprocessors
from fused_resnet.layout import channels_last, channels_last_empty

from . import implicit_gemm


class GpuConv(FusedConv):
    """One convolution with folded batch normalisation, for GPU kernels.

    weight: (K, C / groups, R, S) in `dtype`, channels_last; the parameter itself if it already has
    that dtype and layout. scale, shift: (K,) float32.
    """

    takes_any = True

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        dtype: torch.dtype,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        super().__init__(weight.shape, dtype, stride, padding, dilation, groups)
        self.geometry = geometry_of(stride, padding, dilation)
        self.weight = channels_last(weight.detach().to(dtype))
        # Kernels read pairs of values, but a row of the caller's tensor may be unaligned.
        self.scale = implicit_gemm.aligned(scale.detach().float().contiguous())
        self.shift = implicit_gemm.aligned(shift.detach().float().contiguous())
        self._cached: dict[str, Tensor] = {}
        # The stem's kernel converts x itself.
        self.stem = (
            self.geometry == ((2, 2), (3, 3), (1, 1)) and implicit_gemm.is_stem(self._problem(1))
        )  # fmt: skip
        self._reached = implicit_gemm.reaches(self._problem(1), self.geometry)

    def cached(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A tensor derived from the weights, computed once if the convolution itself is cached."""
        derived = self._cached.get(name)
        if derived is None:
            derived = compute()
            if self.is_cached and cacheable(derived):
                self._cached[name] = derived
        return derived

    def problem(self, shape: Sequence[int]) -> Problem:
        """The matrix product for an x of this shape (N, C, H, W)."""
        out = self.output_shape(shape)
        assert out is not None, shape
        return self._problem(out[0] * out[2] * out[3])

    def _problem(self, pixels: int) -> Problem:
        K, C, R, S = self.weight_shape
        stride, operands = self.stride[1], operands_of(self.dtype)
        return Problem(pixels, K, C, R, S, self.groups, stride, operands)

    def choice(self, x: Tensor, relu: bool) -> tuning.Choice | None:
        """The backend and configuration for this x by `tuning.choice`; None: the reference."""
        allowed = registry.gpu_conv_backends()
        if not relu:  # cuDNN's fused convolutions always apply a ReLU
            allowed = tuple(b for b in allowed if b != "vendor")
        return tuning.choice(self.problem(x.shape), x.device, allowed)

    def pools(self, x: Tensor) -> bool:
        """Whether this is a stem whose kernel also computes the max pooling that follows."""
        choice = self.choice(x, True) if self.stem else None
        return choice is not None and choice.config == implicit_gemm.CudaConfig(implicit_gemm.STEM)

    def run_pooled(self, x: Tensor) -> Tensor:
        """x (N, 3, H, W) of any layout -> relu, then 3x3 max pooling of stride 2 and padding 1."""
        note(self)
        return implicit_gemm.run_stem(self, x, True)

    def run(
        self, x: Tensor, residual: Tensor | None, relu: bool, overwrite: bool = False
    ) -> Tensor:
        note(self)
        choice = self.choice(x, relu)
        if choice is None:
            geometry = (*self.geometry, self.groups)
            x = x.to(self.dtype)
            reference = registry.kernels("reference", x.device.type)
            operands = (self.weight, self.scale, self.shift, residual, relu)
            return channels_last(reference.conv_bn_relu(x, *operands, *geometry))
        return self.run_by(choice.backend, choice.config, x, residual, relu, overwrite)

    def run_by(
        self,
        backend: str,
        config: Any,
        x: Tensor,
        residual: Tensor | None,
        relu: bool,
        overwrite: bool = False,
    ) -> Tensor:
        """`run` with the given backend and configuration."""
        if backend == "native":
            stem = config.tile == implicit_gemm.STEM
            if stem and self.stem and residual is None and relu:
                return implicit_gemm.run_stem(self, x, False)
            device = capability(x.device), multiprocessors(x.device)
            config = implicit_gemm.fitting(config, self.problem(x.shape), *device, self._reached)
        x = channels_last(x.to(self.dtype))
        y = residual if overwrite and residual is not None else None
        if y is None:
            out = self.output_shape(x.shape)
            assert out is not None, x.shape
            y = channels_last_empty(out, x)
        if residual is not None and residual.stride() != y.stride():
            residual = torch.empty_like(y).copy_(residual)
        backend_y = registry.gpu_convolution(backend).run_conv(self, x, residual, relu, y, config)
        return y if backend_y is None else backend_y
