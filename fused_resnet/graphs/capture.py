"""CUDA graphs of any callable: recorded once, replayed from and into memory that stays in place."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_resnet.kernels.cache import noting

RECORDING = threading.Lock()  # PyTorch records one graph at a time in a process
_WARM_UPS = 3  # before recording: kernels are compiled, weights packed, cuDNN's plans chosen


class Graph(NamedTuple):
    """A recorded forward: from x, by replay, into y. turn: waits for the last user on whichever
    stream that was, and lets the next one wait for this. used: what it reads besides the model's
    own tensors, whose memory must stay though nobody else may want it any more."""

    x: Tensor
    y: Tensor
    replay: Callable[[], None]
    turn: Callable[[], contextlib.AbstractContextManager[None]]
    used: Sequence[object] = ()


def record(run: Callable[[Tensor], Tensor], example: Tensor) -> Graph:
    """Records run(x) for an x of example's shape and dtype, on its device."""
    # Under inference mode x would be a tensor that no call outside of it could copy into.
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
        # On a stream of this device: PyTorch's own for recording is of whichever came first. And
        # other threads may go on allocating.
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
