"""The contenders of the whole-model benchmark, all with the same weights.

A contender is a function that takes a `Case` and its `Data` and returns a `Step`, which runs one
forward (mode "infer") or one training step (mode "train") per call. If it cannot run it raises
`Unavailable` with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.checks import one_of
from fused_resnet.fusion.training.activation_memory import set_activation_memory
from fused_resnet.graphs.inference import inference
from fused_resnet.graphs.training_step import training_step
from fused_resnet.models.resnet import get_model
from fused_resnet.parity.report import calibrate
from fused_resnet.parity.runs import stock_model, stock_path

EAGER = ("eager", "eager-channels_last")
IMAGE = 224  # pixels
CLASSES = 1000


class Unavailable(RuntimeError):
    """This contender cannot run this case; the message says why."""


@dataclass(frozen=True)
class Case:
    """One case of the benchmark. dtype: the name of a torch dtype; mode: "infer" or "train"."""

    model: str
    batch: int
    dtype: str
    mode: str = "infer"
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def label(self) -> str:
        return f"{self.model} batch {self.batch} {self.dtype} {self.mode}"


@dataclass
class Step:
    """call() returns the logits (N, classes) or the loss; model: None for other engines."""

    call: Callable[[], Tensor]
    model: nn.Module | None = None

    def __call__(self) -> Tensor:
        return self.call()


@dataclass
class Data:
    """state: the stock model's state_dict; x (N, 3, 224, 224) float32; targets (N,)."""

    state: dict[str, Tensor]
    x: Tensor
    targets: Tensor


def make_data(case: Case, seed: int = 0) -> Data:
    """Random weights and images under `seed`; batch norm statistics calibrated on the images."""
    torch.manual_seed(seed)
    with stock_path():
        model = stock_model(case.model)
        x = torch.randn(case.batch, 3, IMAGE, IMAGE)
        calibrate(model, x if case.batch > 1 else torch.cat([x, x.flip(3)]))
    return Data(model.state_dict(), x, torch.arange(case.batch) % CLASSES)


@functools.cache
def flops(model: str, mode: str) -> int:
    """Floating point operations per image (a multiply-add counts as two), counted by PyTorch."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), stock_path(), FlopCounterMode(display=False) as counter:
        net = stock_model(model).train(mode == "train")
        with torch.set_grad_enabled(mode == "train"):
            out = net(torch.empty(2, 3, IMAGE, IMAGE))
        if mode == "train":
            out.sum().backward()
    return counter.get_total_flops() // 2


# --- PyTorch --------------------------------------------------------------------------------------


def _prepared(model: nn.Module, case: Case, data: Data, layout: torch.memory_format) -> nn.Module:
    """`model` with the case's weights, dtype, device and mode; training keeps float32 weights."""
    model.load_state_dict(data.state)
    dtype = torch.float32 if case.mode == "train" else case.torch_dtype
    model = model.to(device=case.device, dtype=dtype).to(memory_format=layout)
    return model.train(case.mode == "train")


def _images(case: Case, data: Data, layout: torch.memory_format) -> Tensor:
    """x (N, 3, 224, 224); in training float32, since autocast converts it."""
    dtype = torch.float32 if case.mode == "train" else case.torch_dtype
    return data.x.to(device=case.device, dtype=dtype, memory_format=layout)


def _step(
    case: Case, data: Data, model: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor]
) -> Step:
    """forward(x) without gradients, or forward, cross-entropy, backward and SGD with momentum.

    In training a 16-bit dtype means autocast, with float32 weights.
    """

    @torch.no_grad()
    def infer() -> Tensor:
        return forward(x)

    if case.mode == "infer":
        return Step(infer, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    targets = data.targets.to(case.device)
    autocast = case.torch_dtype != torch.float32

    def train() -> Tensor:
        with torch.autocast(torch.device(case.device).type, case.torch_dtype, enabled=autocast):
            logits = forward(x)
        loss = nn.functional.cross_entropy(logits.float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Step(train, model)


def _on_stock_path(step: Step) -> Step:
    return Step(stock_path()(step.call), step.model)


def _eager(case: Case, data: Data, layout: torch.memory_format) -> Step:
    model = _prepared(stock_model(case.model), case, data, layout)
    return _on_stock_path(_step(case, data, model, _images(case, data, layout), model))


def _compile(case: Case, data: Data) -> Step:
    """torch.compile of the channels_last model: frozen in inference, plain in training.

    Freezing is enabled in inductor's configuration and the first call made here: as an option of
    torch.compile it takes effect only after tracing, and the weights are not packed. On GPUs
    inference uses the options of mode "max-autotune": every template is timed, with CUDA graphs.
    """
    import torch._inductor.config as inductor

    model = _prepared(stock_model(case.model), case, data, torch.channels_last)
    frozen = case.mode == "infer"
    options: dict[str, Any] | None = None
    if frozen and torch.device(case.device).type == "cuda":
        options = torch._inductor.list_mode_options("max-autotune")
    compiled = torch.compile(model, dynamic=False, options=options)
    images = _images(case, data, torch.channels_last)
    step = _on_stock_path(_step(case, data, model, images, compiled))
    if frozen:
        with inductor.patch(freezing=True):
            step()
    return step


def _fused(case: Case, data: Data) -> Step:
    model = _prepared(get_model(case.model, weights=None), case, data, torch.channels_last)
    return _step(case, data, model, _images(case, data, torch.channels_last), model)


def _fused_released(case: Case, data: Data) -> Step:
    """`inference` with `release_weights`: weights are packed and released in the first call."""
    if case.mode == "train":
        raise Unavailable("fused-released: inference only")
    model = _prepared(get_model(case.model, weights=None), case, data, torch.channels_last)
    x = _images(case, data, torch.channels_last)
    call = functools.cache(lambda: inference(model, x, release_weights=True))
    return Step(lambda: call()(x), model)


def _fused_at_level(case: Case, data: Data, level: str) -> Step:
    """`fused` at the given level of activation memory, instead of "auto"."""
    if case.mode != "train":
        raise Unavailable(f"fused-{level}: training only")
    step = _fused(case, data)
    assert step.model is not None
    set_activation_memory(step.model, level)
    return step


def _fused_graph(case: Case, data: Data) -> Step:
    """`inference` or `training_step`: the whole forward or training step as one CUDA graph.

    A step is captured in the fourth call, which is untimed or an outlier that the median ignores.
    Its saved tensors and peak are in the graph's memory pool, which per-call counters do not see.
    """
    if torch.device(case.device).type != "cuda":
        raise Unavailable("fused-graph: CUDA graphs need a GPU")
    model = _prepared(get_model(case.model, weights=None), case, data, torch.channels_last)
    x = _images(case, data, torch.channels_last)
    dtype = None if case.torch_dtype == torch.float32 else case.torch_dtype
    if case.mode == "infer":
        call = inference(model, x, dtype=dtype, cuda_graph=True)
        return Step(lambda: call(x), model)
    targets = data.targets.to(case.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    step = training_step(
        model, lambda y, t: nn.functional.cross_entropy(y.float(), t), optimizer, dtype=dtype
    )
    return Step(lambda: step(x, targets))


# --- other engines --------------------------------------------------------------------------------


def _peer(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise Unavailable(f"{package} is not installed (pip install {package})") from None


@contextlib.contextmanager
def _quiet_tracing() -> Iterator[None]:
    """Silences PyTorch's warnings about tracing, which both engines' importers use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _onnxruntime(case: Case, data: Data) -> Step:
    """ONNX Runtime on the exported model, with PyTorch's number of threads."""
    if case.mode == "train":
        raise Unavailable("onnxruntime: inference only")
    device = torch.device(case.device)
    cuda = device.type == "cuda"
    if case.torch_dtype != torch.float32 and not (cuda and case.dtype == "float16"):
        raise Unavailable(f"onnxruntime: has no {case.dtype} convolution on {case.device}")
    ort, _ = _peer("onnxruntime"), _peer("onnx")
    provider = "CUDAExecutionProvider" if cuda else "CPUExecutionProvider"
    if provider not in ort.get_available_providers():
        raise Unavailable(f"onnxruntime: this build has no {provider}")
    model = _prepared(stock_model(case.model), case, data, torch.contiguous_format)
    x = _images(case, data, torch.contiguous_format)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, stock_path(), _quiet_tracing():
        file = str(Path(folder) / "model.onnx")
        torch.onnx.export(model, (x,), file, input_names=["x"], dynamo=False)
        where = {"device_id": device.index or 0} if cuda else {}
        session = ort.InferenceSession(file, options, providers=[(provider, where)])
    feed = {"x": x.cpu().numpy()}
    return Step(lambda: torch.from_numpy(session.run(None, feed)[0]))


def _openvino(case: Case, data: Data) -> Step:
    """OpenVINO on the traced model; a 16-bit dtype is set as its inference precision."""
    if case.mode == "train":
        raise Unavailable("openvino: inference only")
    if torch.device(case.device).type != "cpu":
        raise Unavailable("openvino: measured on the CPU only")
    precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}.get(case.dtype)
    if precision is None:
        raise Unavailable(f"openvino: has no {case.dtype} inference precision")
    ov = _peer("openvino")
    exported = Case(case.model, case.batch, "float32")
    model = _prepared(stock_model(case.model), exported, data, torch.contiguous_format)
    with stock_path(), _quiet_tracing():
        graph = ov.convert_model(model, example_input=data.x, input=[tuple(data.x.shape)])
    core = ov.Core()
    supported = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}[precision] not in supported:
        raise Unavailable(f"openvino: this CPU has no {case.dtype} instructions")
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(graph, "CPU", settings).create_infer_request()
    x = data.x.numpy()
    return Step(lambda: torch.from_numpy(request.infer([x], share_inputs=True)[0]))


_BUILDERS: dict[str, Callable[[Case, Data], Step]] = {
    "eager": functools.partial(_eager, layout=torch.contiguous_format),
    "eager-channels_last": functools.partial(_eager, layout=torch.channels_last),
    "compile": _compile,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "fused": _fused,
    "fused-released": _fused_released,
    "fused-full": functools.partial(_fused_at_level, level="full"),
    "fused-low": functools.partial(_fused_at_level, level="low"),
    "fused-lower": functools.partial(_fused_at_level, level="lower"),
    "fused-minimal": functools.partial(_fused_at_level, level="minimal"),
    "fused-graph": _fused_graph,
}
CONTENDERS = tuple(_BUILDERS)


def build(name: str, case: Case, data: Data) -> Step:
    """The step of contender `name`, not yet called. ValueError for an unknown name."""
    one_of("bench: contender", name, CONTENDERS)
    return _BUILDERS[name](case, data)
