"""The problems that `tuning.tune` measures, the check of an output, and the timing."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.tolerance import assert_close

from .activation import Activation
from .cuda.convolution import GpuConv
from .problem import Gemm, Problem
from .registry import Provider
from .target import current
from .training.cuda import gradient_layer
from .tuning import Wrong


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


CHUNK = 2**24  # outputs that are compared at once, which bounds the memory in float64
GRAPH_S = 2e-3  # of one replay, long enough for the clock of events
MAX_CALLS, REPLAYS = 64, 15


def seconds(call: Callable[[], Any]) -> float:
    """The median time of one call on the current GPU. Several calls are captured in one
    CUDA graph: launched one by one, short kernels would all take as long as Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()

        def timed(run: Callable[[], Any]) -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            run()
            end.record(stream)
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        calls = max(1, min(MAX_CALLS, int(GRAPH_S / max(timed(call), 1e-6))))
        graph = torch.cuda.CUDAGraph()
        # Without torch.cuda.graph, which empties PyTorch's cache of memory before each capture.
        # thread_local: other threads compile meanwhile.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(calls):
                call()
        finally:
            graph.capture_end()
        graph.replay()
        times = [timed(graph.replay) for _ in range(REPLAYS)]
    return statistics.median(times) / calls


class _Case:
    """One problem's operands, and what its output must be."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem = problem
        generator = torch.Generator(device).manual_seed(0)
        self.x, weight = (
            torch.randn(shape, device=device, dtype=problem.dtype, generator=generator).contiguous(
                memory_format=torch.channels_last
            )
            for shape in (problem.x_shape, problem.weight_shape)
        )
        K = problem.weight_shape[0]
        scale, shift = torch.rand(2, K, device=device, generator=generator)
        self.conv = GpuConv(problem, weight, scale, shift)
        self.conv.is_cached = True
        per_image = math.prod(problem.y_shape[1:])
        # Stock's output and the exact one, of some images each.
        self.parts = [
            tuple(_expected(x, weight, scale, shift, problem, d) for d in (x.dtype, torch.float64))
            for x in self.x.split(max(1, CHUNK // per_image))
        ]

    def run(self, backend: str, config: Any) -> Tensor:
        return self.conv.run_by(backend, config, self.x, None, Activation.RELU)

    def check(self, backend: str, config: Any) -> None:
        """Raises `Wrong` unless the output is as close to the exact one as the tolerance rule
        demands."""
        # Freed memory of its size is what the output gets: it must not hold an earlier output.
        freed = [self.x.new_full(self.problem.y_shape, math.nan) for _ in range(2)]
        del freed
        y = self.run(backend, config)
        images = y.split([len(stock) for stock, _ in self.parts])
        for part, (stock, exact) in zip(images, self.parts, strict=True):
            try:
                assert_close(part, stock, exact, what="y")
            except AssertionError as error:
                raise Wrong(str(error)) from None


def _expected(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, problem: Problem, dtype: torch.dtype
) -> Tensor:
    """relu(conv(x, weight) * scale + shift) by PyTorch in `dtype`."""
    y = torch.conv2d(x.to(dtype), weight.to(dtype), None, *problem.geometry)
    norm = torch.promote_types(dtype, torch.float32)  # as of a model in 16 bits
    mean, var, scale, shift = (
        t.to(norm) for t in (torch.zeros_like(scale), torch.ones_like(scale), scale, shift)
    )
    return F.batch_norm(y, mean, var, scale, shift, training=False, eps=0.0).relu_()


def measure_on(device: torch.device) -> Callable[[Problem, str, Any], float]:
    """A function that returns the time of a problem on a backend with a configuration, seconds. It
    raises `Wrong` unless the output satisfies the tolerance rule."""

    @functools.lru_cache(maxsize=1)  # consecutive configurations are of one problem
    def case_of(problem: Problem) -> _Case:
        return _Case(problem, device)

    def measure(problem: Problem, backend: str, config: Any) -> float:
        with torch.no_grad(), current(device):
            case = case_of(problem)
            case.check(backend, config)  # packs and compiles, too
            return seconds(lambda: case.run(backend, config))

    return measure
