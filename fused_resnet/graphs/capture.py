"""Captures any callable as a CUDA graph, which reads its input from and writes its output to fixed
memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet.dtypes import convolves_in_tf32, multiplies_in_tf32
from fused_resnet.kernels import registry
from fused_resnet.kernels.cache import noting

RECORDING = threading.Lock()  # PyTorch supports one capture at a time per process
_WARM_UPS = 3  # calls before capture: compile kernels, pack weights, select cuDNN's plans


def autocast_dtype(kind: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype that autocast has in a forward on device type `kind`: `dtype`, else that of the
    surrounding autocast; None: without autocast."""
    enabled = torch.is_autocast_enabled(kind)
    return dtype or (torch.get_autocast_dtype(kind) if enabled else None)


def autocast(kind: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to `autocast_dtype`, without the cache of casts: a captured forward would read
    weights that a surrounding autocast has cast in an earlier call, and freed since."""
    dtype = autocast_dtype(kind, dtype)
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(kind, dtype, cache_enabled=False)


def settings(kind: str, dtype: torch.dtype | None) -> tuple[object, ...]:
    """The global settings that a capture depends on, a part of the key of its graph. Replayed, a
    graph computes as was set when it was captured. kind, dtype: as of `autocast`."""
    backends = torch.backends
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    return (
        registry.forced(),
        autocast_dtype(kind, dtype),
        (convolves_in_tf32(), multiplies_in_tf32()),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_default_dtype(),
    )


class Graph(NamedTuple):
    """A captured forward: replay() reads x and writes y. turn: a context manager that waits for the
    previous user of the graph, on whichever stream, and makes the next one wait for this one. used:
    references that keep alive what the graph reads besides the model's tensors."""

    x: Tensor
    y: Tensor
    replay: Callable[[], None]
    turn: Callable[[], contextlib.AbstractContextManager[None]]
    used: Sequence[object] = ()


def record(run: Callable[[Tensor], Tensor], example: Tensor) -> Graph:
    """Captures run(x) for an x of example's shape and dtype, on its device."""
    # An x created in inference mode could not be copied into outside of it.
    device = example.device
    with RECORDING, torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
        x = example.detach().clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                run(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # PyTorch's default capture stream belongs to the first device that captured: pass one of
        # this device. thread_local: other threads may allocate meanwhile.
        with (
            noting() as used,
            torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"),
        ):
            y = run(x)
        done = torch.cuda.Event()

    @contextlib.contextmanager
    def turn() -> Iterator[None]:
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(done)
            yield
            done.record(stream)

    return Graph(x, y, graph.replay, turn, used)
