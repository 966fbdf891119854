"""The fused convolution on a GPU. Weights are packed once; `tuning` chooses the backend and tile
for each input size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_resnet.kernels import registry, tuning
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.cache import cacheable, note
from fused_resnet.kernels.convolution import FusedConv, Unsupported
from fused_resnet.kernels.problem import Problem
from fused_resnet.kernels.target import multiprocessors
from fused_resnet.layout import channels_last, channels_last_empty

from . import implicit_gemm


class GpuConv(FusedConv):
    """One convolution with folded batch normalisation, for GPU kernels.

    weight: (K, C / groups, R, S) in `dtype`, channels_last; the parameter itself if it already has
    that dtype and layout. scale, shift: (K,) float32.
    """

    takes_any = True

    def __init__(self, problem: Problem, weight: Tensor, scale: Tensor, shift: Tensor) -> None:
        super().__init__(problem, weight, scale, shift)
        self.weight = channels_last(weight.detach().to(self.dtype))
        # Kernels read pairs of values, but a row of the caller's tensor may be unaligned.
        self.scale = implicit_gemm.aligned(scale.detach().float().contiguous())
        self.shift = implicit_gemm.aligned(shift.detach().float().contiguous())
        self._cached: dict[str, Tensor] = {}
        self._failed: set[str] = set()  # backends that turned out not to support this problem
        # The stem's kernel converts x itself.
        self.stem = implicit_gemm.is_stem(problem.gemm()) and (
            self.geometry == ((2, 2), (3, 3), (1, 1), 1)
        )

    def cached(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A tensor derived from the weights, computed once if the convolution itself is cached."""
        derived = self._cached.get(name)
        if derived is None:
            derived = compute()
            if self.is_cached and cacheable(derived):
                self._cached[name] = derived
        return derived

    def choice(self, x: Tensor, activation: Activation) -> tuning.Choice:
        """The backend and configuration for this x."""
        return tuning.choice_for(Problem(*self.problem[:4], x.shape, activation), x.device)

    def pools(self, x: Tensor) -> bool:
        """Whether this is a stem whose kernel also computes the max pooling that follows."""
        stem = implicit_gemm.CudaConfig(implicit_gemm.STEM)
        return self.stem and self.choice(x, Activation.RELU).config == stem

    def run_pooled(self, x: Tensor) -> Tensor:
        """x (N, 3, H, W) of any layout -> relu, then 3x3 max pooling of stride 2 and padding 1."""
        note(self)
        return implicit_gemm.run_stem(self, x, True)

    def run(
        self, x: Tensor, residual: Tensor | None, activation: Activation, overwrite: bool = False
    ) -> Tensor:
        note(self)
        choice = self.choice(x, activation)
        operands = x, residual, activation, overwrite
        if choice.backend not in self._failed:
            try:
                return self.run_by(choice.backend, choice.config, *operands)
            except Unsupported as reason:
                registry.warn_once(f"fused_resnet: {reason}; falling back to the reference")
                self._failed.add(choice.backend)
        return self.run_by("reference", None, *operands)

    def run_by(
        self,
        backend: str,
        config: Any,
        x: Tensor,
        residual: Tensor | None,
        activation: Activation,
        overwrite: bool = False,
    ) -> Tensor:
        """`run` with the given backend and configuration; raises `Unsupported`."""
        if backend == "native":
            stem = config.tile == implicit_gemm.STEM
            if stem and self.stem and residual is None and activation == Activation.RELU:
                return implicit_gemm.run_stem(self, x, False)
            problem = Problem(*self.problem[:4], x.shape)
            target = implicit_gemm.target(x.device)
            config = implicit_gemm.fitting(config, problem, target, multiprocessors(x.device))
        x = channels_last(x.to(self.dtype))
        if backend == "reference":  # more pixels than the kernels can index, no engine of cuDNN
            operands = (self.weight, self.scale, self.shift, residual, activation)
            reference = registry.kernels(backend, x.device.type)
            return channels_last(reference.conv_bn_relu(x, *operands, *self.geometry))
        y = residual if overwrite and residual is not None else None
        if y is None:
            out = self.output_shape(x.shape)
            assert out is not None, x.shape
            y = channels_last_empty(out, x)
        if residual is not None and residual.stride() != y.stride():
            residual = torch.empty_like(y).copy_(residual)
        backend_y = registry.gpu_convolution(backend).run_conv(
            self, x, residual, activation, y, config
        )
        return y if backend_y is None else backend_y
