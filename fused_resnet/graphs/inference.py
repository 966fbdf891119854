"""`inference`: a model's forward as a callable that does as little as possible per call.

On a GPU a forward of a ResNet is some sixty kernels of 5 to 50 us each, and launching them one by
one takes the CPU longer than that at small batch. A CUDA graph launches all of them at once: it is
recorded once per shape of input, from and into memory that stays where it is.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.kernels import registry

from .capture import Graph, record

_MOST_GRAPHS = 8  # shapes of input whose graphs, and memory, are kept


def inference(
    model: nn.Module,
    example: Tensor,
    *,
    dtype: torch.dtype | None = None,
    cuda_graph: bool | None = None,
) -> Inference:
    """`model` made ready for inference on inputs like `example`.

    y = model(x), without gradients; where dtype is given, under autocast to it.

    model: any module in eval mode, on `example`'s device; those of this family run fused.
    example: (N, C, H, W), floating; its values do not matter.
    dtype: what convolutions and products are computed in, float16 or bfloat16; None: as the model
    is. The output is of this dtype. Weights are laid out for it once, from the model's own.
    cuda_graph: replay a CUDA graph per shape of input (the last 8 are kept); None: on GPUs.

    The callable takes x (N, C, H, W) of any batch, size, layout and floating dtype on the model's
    device, and returns new memory. A shape's first call records its graph; the example's is
    recorded here. Calls from several threads and streams take turns. When a parameter or buffer has
    changed (in place, by load_state_dict, or replaced), the next call lays the weights out and
    records anew. A model with hooks runs without a graph, so that they do. What modules hold
    besides tensors (eps, stride, a replaced forward) is read when a graph is recorded: make the
    model ready anew after changing that.
    Raises ValueError for a model in training mode, a dtype that autocast does not have, or a graph
    asked for where there is no GPU; RuntimeError that names both devices where they differ.
    Source: CUDA programming guide, "CUDA graphs".
    """
    return Inference(model, example, dtype, cuda_graph)


class Inference:
    """What `inference` returns."""

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        dtype: torch.dtype | None,
        cuda_graph: bool | None,
    ) -> None:
        if dtype not in (None, torch.float16, torch.bfloat16):
            raise ValueError(f"inference: dtype must be float16, bfloat16 or None, got {dtype}")
        if cuda_graph and example.device.type != "cuda":
            raise ValueError(f"inference: cuda_graph needs a GPU, example is on {example.device}")
        self.model = model
        self.device = example.device
        self.dtype = dtype
        self.cuda_graph = self.device.type == "cuda" if cuda_graph is None else cuda_graph
        self._graphs: OrderedDict[Any, Graph] = OrderedDict()
        self._watch = _Watch(model)
        self._turn = threading.Lock()
        self(example)

    def __call__(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) on the model's device -> model(x)."""
        if self.model.training:
            raise ValueError("inference: model must be in eval mode: call model.eval()")
        if x.device != self.device:
            raise RuntimeError(
                f"inference: x is on {x.device}, the model was made ready on {self.device}"
            )
        with torch.no_grad(), self._turn:
            if not self._watch.holds():
                self._graphs.clear()
                self._watch = _Watch(self.model)
            if not self.cuda_graph or x.numel() == 0 or self._watch.hooked():
                return self._run(x)
            return self._replay(x)

    def _run(self, x: Tensor) -> Tensor:
        if self.dtype is None:
            return self.model(x)
        # The cache of autocast's casts must not outlive a recording.
        with torch.autocast(self.device.type, self.dtype, cache_enabled=False):
            return self.model(x)

    def _replay(self, x: Tensor) -> Tensor:
        key = (x.shape, x.dtype, registry.forced())
        graph = self._graphs.pop(key, None)
        if graph is None:
            graph = record(self._run, x)
            while len(self._graphs) >= _MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs[key] = graph  # the newest
        with graph.turn():
            graph.x.copy_(x)
            graph.replay()
            return graph.y.clone()


class _Watch:
    """Whether a model's modules, parameters and buffers are the same, unchanged, as they were."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._homes = [h for m in modules for h in (m._parameters, m._buffers, m._modules)]
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._members = self._now()
        self._tensors = [t for t in self._members if isinstance(t, Tensor)]
        self._state = self._state_now()

    def _now(self) -> list[object]:
        return list(chain.from_iterable(home.values() for home in self._homes))

    def _state_now(self) -> list[tuple[int, int]]:
        # What was made in inference mode has no version counter: its address is all there is.
        return [(0 if t.is_inference() else t._version, t.data_ptr()) for t in self._tensors]

    def holds(self) -> bool:
        now = self._now()
        same = len(now) == len(self._members) and all(map(is_, now, self._members))
        return same and self._state_now() == self._state

    def hooked(self) -> bool:
        return any(self._hooks)
