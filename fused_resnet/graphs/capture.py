"""Captures any callable as a CUDA graph, which reads its input from and writes its output to fixed
memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_resnet.kernels.cache import noting

RECORDING = threading.Lock()  # PyTorch supports one capture at a time per process
_WARM_UPS = 3  # calls before capture: compile kernels, pack weights, select cuDNN's plans


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
