"""The problems that `tuning.tune` measures, and the timing of one problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .cuda.convolution import GpuConv
from .problem import Layer, Problem, problem_of
from .registry import gpu_convolution
from .target import capability
from .training.cuda import gradient_layer


def problems(
    layers: Iterable[Layer], device: torch.device, backends: Sequence[str], dtype: torch.dtype
) -> dict[Problem, Layer]:
    """The problems of `layers`, and of their input gradients where a training step may compute
    these by this package's CUDA convolutions (training/cuda.py); with one layer of each problem."""
    layers = list(layers)
    layer_of = {problem_of(layer, dtype): layer for layer in layers}
    if "native" in backends and dtype.itemsize == 2:
        for layer in filter(None, map(gradient_layer, layers)):
            problem = problem_of(layer, dtype)
            if gpu_convolution("native").covers(problem, capability(device)):
                layer_of.setdefault(problem, layer)
    return layer_of


def measure_on(
    layers: dict[Problem, Layer], device: torch.device, dtype: torch.dtype
) -> Callable[[Problem, str, Any], float]:
    """A function that returns the time of a problem on a backend with a configuration, seconds."""
    from triton.testing import do_bench

    def measure(problem: Problem, backend: str, config: Any) -> float:
        layer = layers[problem]
        x, weight = (
            torch.randn(shape, device=device, dtype=dtype).contiguous(
                memory_format=torch.channels_last
            )
            for shape in (layer.x_shape, layer.weight_shape)
        )
        scale, shift = torch.rand(2, layer.weight_shape[0], device=device)
        conv = GpuConv(weight, scale, shift, dtype, *layer.geometry, layer.groups)
        conv.is_cached = True
        conv.run_by(backend, config, x, None, True)  # packs, compiles
        return do_bench(
            lambda: conv.run_by(backend, config, x, None, True), return_mode="median"
        ) / 1e3  # fmt: skip

    return measure
