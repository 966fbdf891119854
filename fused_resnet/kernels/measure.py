"""The problems that `tuning.tune` measures, and the timing of one problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .activation import Activation
from .cuda.convolution import GpuConv
from .problem import Gemm, Problem
from .registry import Provider
from .training.cuda import gradient_layer


def problems(
    layers: Iterable[Problem], device: torch.device, backends: Sequence[Provider]
) -> list[Problem]:
    """One convolution of every `Gemm` among `layers`, and among their input gradients where a
    training step may compute these by this package's CUDA convolutions (training/cuda.py)."""
    layers = list(layers)
    found: dict[Gemm, Problem] = {layer.gemm(): layer for layer in layers}
    native = [p for p in backends if p.name == "native"]
    for layer in filter(None, map(gradient_layer, layers)):
        narrow = layer.dtype is not None and layer.dtype.itemsize == 2
        if narrow and any(p.supports(layer, p.target(device)) is None for p in native):
            found.setdefault(layer.gemm(), layer)
    return list(found.values())


def measure_on(device: torch.device) -> Callable[[Problem, str, Any], float]:
    """A function that returns the time of a problem on a backend with a configuration, seconds."""
    from triton.testing import do_bench

    def measure(problem: Problem, backend: str, config: Any) -> float:
        x, weight = (
            torch.randn(shape, device=device, dtype=problem.dtype).contiguous(
                memory_format=torch.channels_last
            )
            for shape in (problem.x_shape, problem.weight_shape)
        )
        scale, shift = torch.rand(2, problem.weight_shape[0], device=device)
        conv = GpuConv(problem, weight, scale, shift)
        conv.is_cached = True
        conv.run_by(backend, config, x, None, Activation.RELU)  # packs, compiles
        return do_bench(
            lambda: conv.run_by(backend, config, x, None, Activation.RELU), return_mode="median"
        ) / 1e3  # fmt: skip

    return measure
