"""`inference`: a model's forward as a callable with minimal overhead per call.

On a GPU a forward of a ResNet is about sixty kernels of 5 to 50 us each. At small batch launching
them one by one takes longer than running them. A CUDA graph launches all of them at once; it is
captured once per input shape, with fixed addresses of its input and output.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.checks import one_of
from fused_resnet.fusion import refresh, verified
from fused_resnet.fusion.inference.release import releasing
from fused_resnet.kernels.fingerprint import enabled as fingerprints
from fused_resnet.kernels.fingerprint import fingerprint, ranges_of, table_of
from fused_resnet.layers.released import Released, restore_all

from .capture import Graph, autocast, record, settings

_MAX_GRAPHS = 8  # cached graphs, one per input shape and settings, each with its memory


class Inference:
    """Prepares `model` for inference on inputs like `example`.

    The callable computes y = model(x) without gradients, under autocast if dtype is given.

    model: any module in eval mode, on `example`'s device; the models of this package run fused.
    example: (N, C, H, W), floating point; only its shape, dtype and device are used.
    dtype: the autocast dtype, float16 or bfloat16; None: that of a surrounding autocast, else the
    model's dtype. The output has this dtype. Weights are packed for it once.
    cuda_graph: replay one CUDA graph per input shape (the last 8 are cached); None: on GPUs only.
    PyTorch's settings that change results (autocast, TF32, determinism, cuDNN's) have own graphs.
    check: how writes are noticed that move neither version counter nor address (through `.data`,
    NumPy, collectives, another process): "sampled" reads all vectors and a part of each output
    channel's weights; "full" reads every byte of every parameter and buffer; "none" nothing. On
    the CPU, with the native build; on a GPU such writes are not noticed.

    release_weights: keep the packed weights alone, on the CPU. A convolution of K outputs, C inputs
    per group and R x S taps, in elements of b bytes, then holds

        p = K' * C * R * S * b' + w   bytes instead of   K * C * R * S * b + p,

    K' = K rounded up to 16; b' = b, but 4 for float16, and where bfloat16 is multiplied in float32;
    w: of the weights transformed for Winograd's filtering, 64 * K * C (144 with 4 x 4 tiles), where
    that is at most 2 MiB; larger ones are dropped, and their convolutions run by the direct kernel.
    Linear layers, norms and biases stay. Weights are packed and released one by one, here and in
    `release`. Parameters remain the same objects: whatever reads one (state_dict, training, copies,
    pickles, .to(), load_state_dict, a call that is not fused, an optimizer) finds its values, to
    the last bit, restored from the packed ones; shapes, dtypes and gradients can be asked without
    that. The next call then restores all, and packs them beside the parameters: call
    `release(example)` to release again. `kept`: the names of the weights that were not released,
    with the reason: of another dtype than their packing (float32 under bfloat16 autocast), shared
    by several modules, a part of a larger buffer, in shared or mapped memory, or held by a view, a
    state_dict, autograd or TorchScript. While weights are being released no other thread may use
    the model; restoring is safe at any time. C++ extensions that take a released parameter without
    PyTorch's argument parser get PyTorch's error that its data is not allocated, and torch.compile
    with fullgraph=True of a model from `fuse` an interrupted graph: read the weights before.

    The callable takes x (N, C, H, W) of any batch, size, layout and floating dtype on the model's
    device, and returns new memory. The first call with a shape captures its graph; that of
    `example` is captured here. Calls from several threads and streams are serialised. After a
    change of a parameter or buffer (in place, by load_state_dict, or replaced) the next call packs
    the weights and captures again. A model with hooks runs without a graph, so that its hooks run.
    Other attributes of modules (eps, stride, a replaced forward) are read at capture only: call
    `inference` again after changing them.
    It cannot be copied or pickled; its `model` can.
    Raises TypeError for an example that is no such tensor; ValueError for a model in training mode,
    for any other dtype or check, and for cuda_graph=True without a GPU; RuntimeError that names
    both devices if x is on another device than the model.
    Source: CUDA programming guide, "CUDA graphs".
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        *,
        dtype: torch.dtype | None = None,
        cuda_graph: bool | None = None,
        check: str = "sampled",
        release_weights: bool = False,
    ) -> None:
        one_of("inference: check", check, ("sampled", "full", "none"))
        if dtype not in (None, torch.float16, torch.bfloat16):
            raise ValueError(f"inference: dtype must be float16, bfloat16 or None, got {dtype}")
        found = type(example).__name__
        if isinstance(example, Tensor):
            found = f"{example.dtype} of shape {tuple(example.shape)}"
            if example.dim() == 4 and example.is_floating_point():
                found = ""
        if found:
            raise TypeError(
                f"inference: example must be a floating-point tensor (N, C, H, W), got {found}"
            )
        if cuda_graph and example.device.type != "cuda":
            raise ValueError(f"inference: cuda_graph needs a GPU, example is on {example.device}")
        self.model = model
        self.device = example.device
        self.dtype = dtype
        self.cuda_graph = self.device.type == "cuda" if cuda_graph is None else cuda_graph
        self._graphs: OrderedDict[Any, Graph] = OrderedDict()
        self.check = check
        self._guard = _StateGuard(model, check == "full")
        self._turn = threading.Lock()
        self.kept: dict[str, str] = {}
        if release_weights:
            self.release(example)
        else:
            self(example)

    def __reduce__(self) -> Any:
        raise TypeError("inference: copy or pickle the model, and call `inference` with that")

    def release(self, example: Tensor) -> dict[str, str]:
        """Gives the memory of packed weights back, as `release_weights` does, once more after
        something restored them. example: as for the class.

        Returns the names of the weights of convolutions that keep their memory, each with the
        reason; later also in `kept`."""
        if not verified(self.model):  # the first fused call is compared with one that reads weights
            self(example)
        refresh(self.model)  # other plans hold their memory too
        with releasing(self.model) as found:
            self(example)
        self._guard = _StateGuard(self.model, self.check == "full")
        self.kept = found.kept()
        return dict(self.kept)

    def __call__(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) on the model's device -> model(x)."""
        if self.model.training:
            raise ValueError("inference: model must be in eval mode: call model.eval()")
        if x.device != self.device:
            raise RuntimeError(
                f"inference: x is on {x.device}, the model was prepared on {self.device}"
            )
        with torch.no_grad(), self._turn:
            token = fingerprints.set(self.check != "none")
            try:
                if not self._guard.holds():
                    self._graphs.clear()
                    restore_all(self.model.parameters())  # plans will, one after the other
                    refresh(self.model)
                    self._guard = _StateGuard(self.model, self.check == "full")
                if not self.cuda_graph or x.numel() == 0 or self._guard.has_hooks():
                    return self._run(x)
                return self._replay(x)
            finally:
                fingerprints.reset(token)

    def _run(self, x: Tensor) -> Tensor:
        with autocast(self.device.type, self.dtype):
            return self.model(x)

    def _replay(self, x: Tensor) -> Tensor:
        key = (x.shape, x.dtype, settings(self.device.type, self.dtype))
        graph = self._graphs.pop(key, None)
        if graph is None:
            graph = record(self._run, x)
            while len(self._graphs) >= _MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs[key] = graph  # as the most recently used
        with graph.turn():
            graph.x.copy_(x)
            graph.replay()
            return graph.y.clone()


inference = Inference


class _StateGuard:
    """Detects changed or replaced modules, parameters and buffers of a model, and restored
    parameters; values: also those written without a trace, of tensors on the CPU."""

    def __init__(self, model: nn.Module, values: bool) -> None:
        modules = list(model.modules())
        self._dicts = [d for m in modules for d in (m._parameters, m._buffers, m._modules)]
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._members = self._current_members()
        tensors = [t for t in self._members if isinstance(t, Tensor)]
        self._released = [t for t in tensors if type(t) is Released]
        self._tensors = [t for t in tensors if type(t) is not Released]
        self._state = self._current_state()
        self._table = table_of(ranges_of(self._tensors if values else (), whole=True))
        self._print = fingerprint(self._table)

    def _current_members(self) -> list[object]:
        return list(chain.from_iterable(d.values() for d in self._dicts))

    def _current_state(self) -> list[tuple[int, int]]:
        # Tensors created in inference mode have no version counter, only an address.
        return [(0 if t.is_inference() else t._version, t.data_ptr()) for t in self._tensors]

    def holds(self) -> bool:
        now = self._current_members()
        same = len(now) == len(self._members) and all(map(is_, now, self._members))
        same = same and all(type(t) is Released for t in self._released)
        same = same and self._current_state() == self._state
        return same and fingerprint(self._table) == self._print

    def has_hooks(self) -> bool:
        return any(self._hooks)
