"""Two GPUs without one: fake tensors with device "cuda", on which all code on the host runs.

`play` makes FakeTensorMode's tensors acceptable to the package, and gives its CUDA ops, Triton
launches and cuDNN's ops fake implementations, which check their arguments like the real ones and
allocate the outputs. Every other op that is not for GPUs raises, as this package's for the CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import math
from collections import Counter, defaultdict
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fused_resnet import layout
from fused_resnet.kernels import fingerprint, native, registry, target, tuning
from fused_resnet.kernels.cpu import onednn
from fused_resnet.kernels.cuda import cudnn
from fused_resnet.kernels.cuda.implicit_gemm import tiles
from fused_resnet.kernels.problem import output_shape

FLOAT16 = (torch.float16, torch.bfloat16)
CALLS: Counter[str] = Counter()  # of fake kernels since `play`, by the names of ops and kernels
CURRENT = [0]  # the current device's index, after those that will be current again
TRITON = ("elementwise", "batch_norm", "backward", "convolution")


# --- the arguments of kernels, checked as csrc/common.h does --------------------------------------


def on_gpu(*tensors: Tensor | None) -> None:
    given = [t for t in tensors if t is not None]
    assert all(isinstance(t, FakeTensor) and t.is_cuda for t in given), given
    assert len({t.device for t in given}) <= 1, [t.device for t in given]


def dense(t: Tensor) -> None:
    expected = 1
    for stride, size in sorted((t.stride(d), t.size(d)) for d in range(t.dim()) if t.size(d) > 1):
        assert stride == expected, (t.shape, t.stride())
        expected *= size


def same_layout(t: Tensor | None, x: Tensor) -> None:
    if t is not None:
        assert (t.shape, t.dtype, t.device) == (x.shape, x.dtype, x.device), (t, x)
        pairs = zip(t.shape, t.stride(), x.stride(), strict=True)
        assert all(size <= 1 or a == b for size, a, b in pairs), (t.stride(), x.stride())


def rows(t: Tensor) -> None:
    """Channels_last (of x with one channel, planes match too)."""
    strides = zip(t.shape, t.stride(), layout.channels_last_strides(t.shape), strict=True)
    assert t.dim() == 4 and all(n <= 1 or a == b for n, a, b in strides), (t.shape, t.stride())


def aligned(*tensors: Tensor | None) -> None:
    assert all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def vectors(x: Tensor, size: int, *named: Tensor | None, dtype: Any = None) -> None:
    dtype = dtype or (torch.float64 if x.dtype == torch.float64 else torch.float32)
    for t in named:
        assert t is None or (tuple(t.shape), t.dtype, t.device) == ((size,), dtype, x.device), t
        assert t is None or size <= 1 or t.stride(0) == 1


# --- this package's CUDA ops (csrc/cuda) ----------------------------------------------------------


def add_relu(x, residual):
    dense(x), same_layout(residual, x)
    return torch.empty_like(x)


def add_relu_out(x, residual, out):
    dense(x), same_layout(residual, x), same_layout(out, x)


def add_relu_backward(dy, y):
    dense(dy), same_layout(y, dy)
    return torch.empty_like(dy)


def _vector(x, *sizes):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((*sizes, x.shape[1]), dtype=dtype)


def bn_add_relu(x, weight, bias, residual, eps, activation):
    assert x.dim() == 4
    dense(x), same_layout(residual, x), vectors(x, x.shape[1], weight, bias)
    return torch.empty_like(x), _vector(x), _vector(x)


def bn_normalise(x, mean, var, rest, weight, bias, residual, eps, activation):
    dense(x), same_layout(residual, x), vectors(x, x.shape[1], mean, var, rest, weight, bias)
    return torch.empty_like(x)


def bn_add_relu_backward(dy, x, y, weight, mean, var, eps, relu, need_dx, need_dresidual):
    dense(x), same_layout(dy, x), same_layout(y, x), vectors(x, x.shape[1], weight, mean, var)
    assert y is not None or not relu
    dx, dresidual = (
        torch.empty_like(x) if need else x.new_empty(0) for need in (need_dx, need_dresidual)
    )
    return dx, _vector(x), _vector(x), dresidual


def bn_gradient_by_sums(g, x, sums, weight, mean, var, eps):
    assert x.dtype != torch.float64 and x.numel() > 0
    dense(x), same_layout(g, x), vectors(x, x.shape[1], weight, mean, var)
    assert sums.shape[1:] == (2, x.shape[1]) and sums.dtype == torch.float32
    return torch.empty_like(x), _vector(x), _vector(x)


def bn_merge_statistics(statistics, pixels, part_pixels):
    parts, three, K = statistics.shape
    assert three == 3 and statistics.is_contiguous() and statistics.dtype == torch.float32
    assert math.ceil(pixels / part_pixels) == parts
    return tuple(statistics.new_empty(K) for _ in range(3))


def convolve(x, weight, y, stride, padding, dilation, groups, tile, splits):
    """Checks operands as csrc/cuda/convolution/conv_bn_relu.cu; returns statistics' part_pixels."""
    (N, C, H, W), (K, R, S, c) = x.shape, weight.shape
    assert x.dtype in (*FLOAT16, torch.float32) and weight.dtype == y.dtype == x.dtype
    elements = 16 // x.element_size()
    assert c * groups == C and c % elements == 0 and K // groups % elements == 0
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip((H, W), padding, dilation, (R, S), stride, strict=True)
    ]
    assert y.shape == (N, K, *sizes) and 0 not in y.shape and weight.is_contiguous()
    rows(x), rows(y), aligned(x, weight, y)
    described = tiles()[tile]
    assert splits == 1 or described["architecture"] == 80
    assert described["architecture"] == 80 or x.element_size() == 2
    halves = described["architecture"] == 90 and described["warps"] == 8
    return 64 if splits > 1 else described["block_m"] // (1 + halves)


def implicit_gemm(x, weight, scale, shift, residual, y, activation, *rest):
    convolve(x, weight, y, *rest)
    vectors(x, weight.shape[0], scale, shift, dtype=torch.float32)
    if residual is not None:
        rows(residual), aligned(residual), same_layout(residual, y)


def _statistics(x, z, pixels, count=3):
    parts = math.ceil(z.numel() // z.shape[1] / pixels)
    return x.new_empty((parts, count, z.shape[1]), dtype=torch.float32)


def convolution_statistics(x, weight, z, *rest):
    pixels = convolve(x, weight, z, *rest)
    return _statistics(x, z, pixels), pixels


def normalised_convolution_statistics(
    x, mean, var, rest, norm_weight, norm_bias, eps, weight, z, tile
):
    pixels = convolve(x, weight, z, (1, 1), (0, 0), (1, 1), 1, tile, 1)
    assert x.dtype in FLOAT16 and weight.shape[1:3] == (1, 1) and tiles()[tile]["normalises"]
    vectors(x, x.shape[1], mean, var, rest, norm_weight, norm_bias)
    return _statistics(x, z, pixels), pixels


def convolution_gradient_sums(
    dy, weight, g, x, mean, var, rest, norm_weight, norm_bias, eps, padding, dilation, groups, tile,
    splits,
):  # fmt: skip
    assert dy.dtype in FLOAT16
    pixels = convolve(dy, weight, g, (1, 1), padding, dilation, groups, tile, splits)
    rows(x), aligned(x), same_layout(x, g)
    vectors(x, x.shape[1], mean, var, rest, norm_weight, norm_bias)
    return _statistics(x, g, pixels, 2)


def stem(x, weight, scale, shift, pool):
    assert weight.dtype in FLOAT16 and x.dtype in (torch.float32, weight.dtype) and x.shape[1] == 3
    assert weight.shape == (64, 7, 8, 4) and weight.is_contiguous()
    aligned(weight), vectors(x, 64, scale, shift, dtype=torch.float32)
    P, Q = (((n - 1) // 2 + 1 - 1) // 2 + 1 if pool else (n - 1) // 2 + 1 for n in x.shape[2:])
    return weight.new_empty(x.shape[0], P, Q, 64).permute(0, 3, 1, 2)


OPS = (
    add_relu, add_relu_out, add_relu_backward, bn_add_relu, bn_normalise, bn_add_relu_backward,
    bn_gradient_by_sums, bn_merge_statistics, implicit_gemm, convolution_statistics,
    normalised_convolution_statistics, convolution_gradient_sums, stem,
)  # fmt: skip


def backend_memory_format(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    """cuDNN's; without a GPU PyTorch would choose other convolutions for 16 bits."""
    formats = layout.memory_format(x), layout.memory_format(weight)
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format


class SyncBatchNorm:
    """PyTorch's autograd function, whose number of processes with images depends on values."""

    @staticmethod
    def apply(x, weight, bias, mean, var, eps, momentum, group, processes):
        on_gpu(x, weight, bias, mean, var)
        assert processes == 2
        return torch.batch_norm(x, weight, bias, None, None, True, 0.0, eps, True)


# PyTorch's ops for GPUs that have no fake implementation.
ATEN = ("_fused_sgd_", "_fused_sgd_.tensor_lr", "_fused_adamw_", "_fused_adamw_.tensor_lr")


# --- the registered ops, run as on a GPU, and compared with their fake implementations ------------

RUN = {
    "add_relu": ("add_relu", "_add_relu"),
    "add_relu_out": ("add_relu", "_add_relu_out"),
    "add_relu_backward": ("add_relu", "_add_relu_backward"),
    "bn_add_relu": ("bn_add_relu", "_bn_add_relu"),
    "bn_add_relu_backward": ("bn_add_relu", "_bn_backward"),
    "conv_bn_relu": ("conv_bn_relu", "_conv_bn_relu"),
    "conv_norm_relu": ("conv_norm_relu", "_conv_norm_relu"),
    "convolution_backward_triton": ("conv_bn_relu", "_conv_backward_triton"),
}


def facts(t: Any) -> Any:
    """What a user can tell of a result without its values."""
    if isinstance(t, (tuple, list)):
        return [facts(part) for part in t]
    return t if t is None else (tuple(t.shape), t.dtype, t.stride(), t.device)


def compared(run: Any, fake: Any) -> Any:
    def both(*arguments: Any) -> Any:
        result = run(*arguments)
        assert facts(result) == facts(fake(*arguments)), run.__name__
        return result

    return both


def registered() -> Any:
    find = torch._library.simple_registry.singleton.find
    for name, (module, run) in RUN.items():
        owner = importlib.import_module(f"fused_resnet.ops.{module}")
        fake = find(f"fused_resnet::{name}").fake_impl.kernel.func
        yield name, compared(getattr(owner, run), fake)


def counted(name: str, function: Any) -> Any:
    def run(*arguments: Any, **options: Any) -> Any:
        CALLS[name] += 1
        on_gpu(*(a for a in arguments if isinstance(a, Tensor)))
        return function(*arguments, **options)

    return run


def never(*_: Any) -> None:
    raise AssertionError("a CUDA kernel was called with real tensors")


# --- Triton and cuDNN -----------------------------------------------------------------------------


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Checks that the kernel takes these arguments: tensors on the GPU, integers, and None."""
    options = {"num_warps", "num_stages", "maxnreg"}
    passed = {k: v for k, v in constants.items() if k not in options}
    inspect.signature(kernel.fn).bind(*arguments, **passed)
    assert 1 <= len(grid) <= 3 and all(isinstance(n, int) and n > 0 for n in grid), grid
    assert grid[0] < 2**31 and all(n < 2**16 for n in grid[1:]), grid
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    on_gpu(*tensors)
    # Triton launches on the current device, on its current stream.
    assert tensors[0].get_device() == CURRENT[-1], (kernel.fn.__name__, tensors[0].device)
    assert all(isinstance(a, (Tensor, int, float, type(None))) for a in arguments), arguments
    CALLS[kernel.fn.__name__] += 1


def fused(x, weight, bias, residual, stride, padding, dilation, groups):
    CALLS["cudnn"] += 1
    on_gpu(x, weight, bias, residual)
    assert x.dtype == weight.dtype == bias.dtype and tuple(bias.shape) == (weight.shape[0],)
    rows(x), rows(weight)
    shape = output_shape(x.shape, weight.shape, stride, padding, dilation, groups)
    assert shape is not None
    y = layout.channels_last_empty(shape, x)
    same_layout(residual, y)
    return y


# --- autograd -------------------------------------------------------------------------------------


_TASKS = itertools.count()


def run_backward(
    roots: Any, gradients: Any, inputs: Any = None, create_graph: bool = False
) -> list[Any]:
    """Autograd's engine, whose C++ asks CUDA for the current streams of a GPU. Gradients are
    checked and converted as there."""
    edge = torch.autograd.graph.get_gradient_edge
    starts = [edge(t) for t in roots]
    waiting: Counter[Any] = Counter()
    seen, stack = set(), [start.node for start in starts]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is not None:
                waiting[following] += 1
                stack.append(following)
    arrived: dict[Any, dict[int, Any]] = defaultdict(dict)

    def arrive(node: Any, number: int, g: Any) -> None:
        if g is None:
            return
        meta = node._input_metadata[number]
        assert g.device == meta.device, (node, g, meta)
        g = g.sum_to_size(meta.shape)  # of broadcast operands
        if g.dtype != meta.dtype:
            g = g.to(meta.dtype)
        there = arrived[node].get(number)
        arrived[node][number] = g if there is None else there + g

    for start, t, g in zip(starts, roots, gradients, strict=True):
        arrive(start.node, start.output_nr, torch.ones_like(t) if g is None else g)
    wanted = [] if inputs is None else [edge(t) for t in inputs]
    found: dict[Any, Any] = {}
    ready = [n for n in dict.fromkeys(s.node for s in starts) if not waiting[n]]
    task = next(_TASKS)  # of which torch.utils.checkpoint recomputes each segment once
    with (
        torch.set_grad_enabled(create_graph),
        mock.patch.object(torch._C, "_current_graph_task_id", lambda: task),
    ):
        while ready:
            node = ready.pop()
            mine = arrived.pop(node, {})
            for e in wanted:
                if e.node is node:
                    found[node, e.output_nr] = mine.get(e.output_nr)
            edges, out = list(node.next_functions), [None] * len(node.next_functions)
            if mine and not (hasattr(node, "variable") and inputs is not None):
                arguments = [mine.get(i) for i in range(len(node._input_metadata))]
                if hasattr(node, "_forward_cls"):  # returns one gradient per argument, of any type
                    grads = _tuple(node.apply(*arguments))
                    out = [g for g, need in zip(grads, node.needs_input_grad, strict=True) if need]
                    edges = [e for e in edges if e[0] is not None]
                else:
                    out = list(_tuple(node(*arguments)))
            for (following, number), g in zip(edges, out, strict=True):
                if following is not None:
                    arrive(following, number, g)
                    waiting[following] -= 1
                    if not waiting[following]:
                        ready.append(following)
    return [found.get((e.node, e.output_nr)) for e in wanted]


def _tuple(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, Tensor) or value is None else tuple(value)


def backward(tensors, grad_tensors=None, retain_graph=None, create_graph=False, inputs=None):
    roots = _tuple(tensors)
    gradients = _tuple(grad_tensors) if grad_tensors is not None else (None,) * len(roots)
    assert inputs is None
    pairs = [(t, g) for t, g in zip(roots, gradients, strict=True) if t.requires_grad]
    run_backward(*zip(*pairs, strict=True), create_graph=create_graph)


def grad(outputs, inputs, grad_outputs=None, *_, create_graph=False, **__):
    roots, inputs = _tuple(outputs), _tuple(inputs)
    gradients = _tuple(grad_outputs) if grad_outputs is not None else (None,) * len(roots)
    return tuple(run_backward(roots, gradients, inputs, create_graph))


# --- torch.cuda -----------------------------------------------------------------------------------


class Stream:
    """Also an event, or a graph whose replay does nothing."""

    device = torch.device("cuda", 0)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: 1.0  # milliseconds of elapsed_time


@contextlib.contextmanager
def device(which: Any) -> Any:
    index = which if isinstance(which, int) else torch.device(which).index
    CURRENT.append(CURRENT[-1] if index is None else index)
    try:
        yield
    finally:
        CURRENT.pop()


@contextlib.contextmanager
def nothing(*_: Any, **__: Any) -> Any:
    yield


PROPERTIES = SimpleNamespace(
    name="fake", major=9, minor=0, multi_processor_count=132, total_memory=2**37
)
CUDA = {
    "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 2,
    "current_device": lambda: CURRENT[-1], "get_device_properties": lambda *_: PROPERTIES,
    "get_device_capability": lambda *_: (9, 0), "get_device_name": lambda *_: "fake",
    "is_bf16_supported": lambda *_, **__: True, "synchronize": lambda *_: None,
    "_lazy_init": lambda: None, "init": lambda: None, "set_device": lambda *_: None,
    "current_stream": lambda *_: Stream(), "default_stream": lambda *_: Stream(),
    "Stream": Stream, "Event": Stream, "CUDAGraph": Stream, "graph": nothing, "stream": nothing,
    "device": device, "graph_pool_handle": object, "is_current_stream_capturing": lambda: False,
    "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8, device="cpu"),
    "set_rng_state": lambda *_: None, "empty_cache": lambda: None,
    "max_memory_allocated": lambda *_: 0, "memory_allocated": lambda *_: 0,
    "reset_peak_memory_stats": lambda *_: None,
}  # fmt: skip


class Mode(FakeTensorMode):
    avoid_device_init = True  # although torch.cuda.is_available() says that there is a GPU

    def __deepcopy__(self, memo: Any) -> Mode:
        return self  # of copied tensors too


def _address(t: Tensor) -> int:
    """As if every storage started at a multiple of 256 bytes."""
    storage = t.untyped_storage()
    if not isinstance(t, FakeTensor):
        return _REAL_ADDRESS(t)
    return (storage._cdata << 8) + t.storage_offset() * t.element_size()


_REAL_ADDRESS = Tensor.data_ptr


def clear_caches() -> None:
    """Of what is known about the GPU."""
    support = importlib.import_module("fused_resnet.kernels.triton.support")
    for cached in (
        target.target_of, target._multiprocessors, native.built_for, cudnn.unavailable,
        support.unavailable, tuning.file_name, tuning.choice, registry.warn_once,
    ):  # fmt: skip
        cached.cache_clear()
    registry._candidates.clear()
    tuning._winners.clear()


@contextlib.contextmanager
def play() -> Any:
    """Fake tensors on a Hopper GPU, with this package built for it, Triton and cuDNN."""
    registry.table("cpu")  # the CPU's probes are cached, and fail on fake tensors
    for dtype in (torch.float32, torch.bfloat16):
        onednn._failure(dtype)
    library = torch.library.Library("fused_resnet_native", "FRAGMENT")
    ops = torch.library.Library("fused_resnet", "FRAGMENT")
    for name, run in [*registered()]:
        torch.library.register_fake(f"fused_resnet::{name}", run, lib=ops, allow_override=True)
    aten = torch.library.Library("aten", "IMPL", "Meta")
    for name in ATEN:
        aten.impl(name, lambda *_, **__: None)
    for op in OPS:
        library.impl(op.__name__, never, "CUDA")
        fake = counted(op.__name__, op)
        torch.library.register_fake(f"fused_resnet_native::{op.__name__}", fake, lib=library)
    modules = {
        name: importlib.import_module(f"fused_resnet.{name}")
        for name in (
            "fusion.call", "fusion.description", "fusion.regions.state", "fusion.regions.verify",
            "kernels.triton.support",
        )
    }  # fmt: skip
    build = {**native.build_info(), "cuda_archs": "8.0 9.0a+PTX 9.0a", "cuda_version": "13.0"}
    step = importlib.import_module("fused_resnet.graphs.training_step")
    fakes = [
        (step, "_host_rng_state", lambda: 0),  # the mode's own use of it aside
        (modules["fusion.call"], "Tensor", FakeTensor),
        (modules["fusion.description"], "Tensor", FakeTensor),
        (torch._C, "_len_torch_dispatch_stack", lambda: 0),
        (fake_tensor, "init_gpu_context", lambda device: None),
        (native, "build_info", lambda: build),
        (modules["kernels.triton.support"], "probe", lambda device_type: None),
        (cudnn, "_probe", lambda *_: None),
        (cudnn, "_fused", fused),
        (torch.backends.cudnn, "is_available", lambda: True),
        # What the host reads of a result: a finite loss, nothing overflowed.
        (FakeTensor, "__bool__", lambda t: False),
        (FakeTensor, "__float__", lambda t: 1.0),
        (FakeTensor, "item", lambda t: 0.0),
        # Of models that `fuse` changed: values are compared with their own calls'.
        (modules["fusion.regions.verify"], "compared", lambda m, own, run, given: (run(), None)),
        (modules["fusion.regions.state"].Untouched, "restored", lambda untouched: True),
        (torch._C, "_conv_determine_backend_memory_format", backend_memory_format),
        (torch.nn.modules.batchnorm, "sync_batch_norm", SyncBatchNorm),
        (torch.autograd, "backward", backward),
        (torch.autograd, "grad", grad),
        (Tensor, "data_ptr", _address),
        (torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata << 8),
        *((importlib.import_module(f"fused_resnet.kernels.triton.{m}"), "launch", launch)
          for m in TRITON),
    ]  # fmt: skip
    try:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name, fake in [*fakes, *((torch.cuda, *item) for item in CUDA.items())]:
                patch.setattr(owner, name, fake)
            clear_caches()
            CALLS.clear()
            with Mode(allow_fallback_kernels=False):
                nothing = torch.empty(0, 3, dtype=torch.int64, device="cpu")  # as the real one
                patch.setattr(fingerprint, "_NOTHING", nothing)
                yield
    finally:
        for added in (library, ops, aten):
            added._destroy()
        clear_caches()
