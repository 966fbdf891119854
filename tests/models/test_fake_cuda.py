"""All code on the host that a GPU's tensors go through, with fake CUDA tensors (fake_cuda.py): what
is called, and the shape, dtype, strides and device of every result, as stock's."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

import fused_resnet as fr
from fused_resnet import layout
from fused_resnet.bench import contenders
from fused_resnet.fusion.training.activation_memory import LEVELS
from fused_resnet.kernels import native, registry, tuning
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.cuda.convolution import GpuConv
from fused_resnet.kernels.measure import problems
from fused_resnet.kernels.problem import Geometry, Problem
from fused_resnet.layers.sync_batch_norm import convert_sync_batchnorm
from fused_resnet.train import data as datasets
from fused_resnet.train import loop
from tests.models import fake_cuda
from tests.models.fake_cuda import CALLS, facts

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available"),
    pytest.mark.skipif(native.load() is not None, reason="the extension declares the CUDA ops"),
]
pytest.importorskip("triton")
resnet = pytest.importorskip("torchvision.models.resnet")
fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

NETWORKS: dict[str, Any] = {
    "basic": lambda: fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=10),
    "bottleneck": lambda: fr.ResNet(fr.Bottleneck, [1, 1, 1, 1], num_classes=10),
    "grouped": lambda: fr.ResNet(
        fr.Bottleneck, [1, 1, 1, 1], num_classes=10, groups=32, width_per_group=4
    ),
    "wide": lambda: fr.ResNet(fr.Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=128),
    "cifar": lambda: fr.cifar_resnet(8),
    "projection": lambda: fr.cifar_resnet(8, shortcut="projection"),
    "plain": lambda: fr.cifar_resnet(8, shortcut="none"),
    "preact": lambda: fr.cifar_resnet(8, block="preact"),
    "preact projection": lambda: fr.cifar_resnet(8, shortcut="projection", block="preact"),
    "preact bottleneck": lambda: fr.cifar_resnet(11, block="preact_bottleneck"),
    "stochastic": lambda: fr.cifar_resnet(14, stochastic_depth=0.5),
    "fused basic": lambda: fused("BasicBlock"),
    "fused bottleneck": lambda: fused("Bottleneck"),
}
DIFFERENT = ("bottleneck", "fused bottleneck", "grouped", "projection", "preact projection",
             "stochastic")  # fmt: skip
# The backend that is forced, and a kernel of which one must be called in inference.
BACKENDS = {None: "conv_bn_relu_kernel", "native": "implicit_gemm",
            "triton": "conv_bn_relu_kernel", "vendor": "cudnn"}  # fmt: skip
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def fused(block: str) -> Any:
    """torchvision's network changed by `fuse`."""
    model = resnet.ResNet(getattr(resnet, block), [1, 1, 1, 1], num_classes=10)
    return fr.fuse(model, inplace=True)


@pytest.fixture(autouse=True)
def gpu():
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # PyTorch's default on a GPU
    with fake_cuda.play():
        yield


def forced(backend: str | None) -> Any:
    return contextlib.nullcontext() if backend is None else fr.use_backend(backend)


def network(kind: str, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Any:
    torch.set_default_dtype(dtype)  # fake parameters cannot be converted
    with torch.device(device):
        model = NETWORKS[kind]()
    torch.set_default_dtype(torch.float32)
    return model


def images(memory_format: str = "contiguous", dtype: Any = torch.float32, n: int = 2) -> Tensor:
    x = torch.randn(n, 3, 32, 32, device="cuda", dtype=dtype)
    return x.contiguous(memory_format=FORMATS[memory_format])


def autocast(dtype: torch.dtype) -> Any:
    return torch.autocast("cuda", dtype, enabled=dtype != torch.float32)


@pytest.mark.pairwise
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("weights", ["converted", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("provider", BACKENDS)
@pytest.mark.parametrize("kind", DIFFERENT)
def test_inference(kind, provider, dtype, weights, memory_format):
    """By weights of `dtype`, or by autocast; the second call is by the plan of the first."""
    dtype = DTYPES[dtype]
    own = dtype if weights == "converted" else torch.float32
    model, x = network(kind, own).eval(), images(memory_format, own)
    with torch.no_grad(), autocast(dtype if own != dtype else torch.float32):
        with fr.use_backend("reference"):
            stock = facts(model(x))
        assert not CALLS
        with forced(provider):
            assert facts(model(x)) == facts(model(x)) == stock
    # cuDNN computes no convolution without a ReLU, so no pre-activation block.
    assert CALLS[BACKENDS[provider]] or (provider == "vendor" and "preact" in kind), CALLS


def step(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The facts of a training step's results."""
    x = x.detach().requires_grad_()
    for p in model.parameters():
        p.grad = None
    with autocast(dtype):
        y = model(x)
    y.float().square().sum().backward()
    gradients = {name: facts(p.grad) for name, p in model.named_parameters()}
    return {"y": facts(y), "x": facts(x.grad), **gradients}


@pytest.mark.pairwise
@pytest.mark.parametrize("mode", ["frozen", *LEVELS])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("provider", [None, "native", "triton"])
@pytest.mark.parametrize("kind", DIFFERENT)
def test_training(kind, provider, dtype, memory_format, mode, monkeypatch):
    """At every level of activation memory, and in eval mode with gradients."""
    monkeypatch.setattr(FakeTensor, "tolist", lambda t: [0.1, 0.95, 0.1, 0.95, 0.95, 0.1])
    model, x, dtype = network(kind), images(memory_format), DTYPES[dtype]
    model.train(mode != "frozen")
    with fr.use_backend("reference"):
        stock = step(model, x, dtype)
    assert not CALLS
    if mode != "frozen" and "fused" not in kind:  # of this package's blocks alone
        fr.set_activation_memory(model, mode)
    with forced(provider):
        for _ in range(2):
            got = step(model, x, dtype)
    assert got == stock, {k: (got[k], stock[k]) for k in stock if got[k] != stock[k]}
    assert CALLS or mode == "frozen", CALLS


@pytest.mark.parametrize("kind", sorted(NETWORKS.keys() - DIFFERENT))
def test_other_networks(kind, monkeypatch):
    dtype, memory_format = "bfloat16", "channels_last"
    test_inference(kind, None, dtype, "float32", memory_format)
    CALLS.clear()
    test_training(kind, None, dtype, memory_format, "full", monkeypatch)


def test_every_cuda_op_is_called():
    with fr.use_backend("native"):
        for dtype, mode in (("float32", "full"), ("bfloat16", "low")):
            model = network("bottleneck").train()
            fr.set_activation_memory(model, mode)
            step(model, images("channels_last", n=64), DTYPES[dtype])
        x = images("channels_last", torch.float16)
        with torch.no_grad():
            network("bottleneck", torch.float16).eval()(x)
        fr.add_relu(x, x, out=torch.empty_like(x))
        fr.add_relu(x.requires_grad_(), x).sum().backward()
    assert {op.__name__ for op in fake_cuda.OPS} <= set(CALLS), CALLS


def test_ops_of_tensors_without_modules():
    """Also out=, layouts that are neither, and second derivatives."""

    def run() -> list[Any]:
        x, residual = images(n=4)[::2], images("channels_last")
        weight = torch.randn(8, 3, 3, 3, device="cuda", requires_grad=True)
        scale = torch.rand(8, device="cuda")
        y = fr.add_relu(x, residual)
        z = fr.conv_bn_relu(x, weight, scale, scale, stride=2, padding=1)
        n, mean, var = fr.bn_add_relu(z, scale, scale)
        (d,) = torch.autograd.grad(n.sum(), weight, create_graph=True)
        (dd,) = torch.autograd.grad(d.sum(), weight)
        out = fr.add_relu(x, residual, out=torch.empty_like(residual))
        return [*map(facts, (y, out, z, n, mean, var, d, dd))]

    with fr.use_backend("reference"):
        stock = run()
    assert not CALLS
    for provider in BACKENDS:
        with forced(provider):
            assert run() == stock, provider
        assert CALLS


@pytest.mark.parametrize("provider", BACKENDS)
def test_rows_that_are_not_aligned(provider):
    """To 16 bytes: kernels read that many at once."""
    values = torch.randn(2 * 8 * 8 * 16 + 1, device="cuda", dtype=torch.bfloat16)[1:]
    x = values.view(2, 8, 8, 16).permute(0, 3, 1, 2)
    weight, scale = values[:256].view(16, 16, 1, 1), torch.rand(16, device="cuda")
    with forced(provider):
        y = fr.conv_bn_relu(x, weight, scale, scale, x)
        assert facts(y) == facts(fr.add_relu(x, x)) == facts(x) and CALLS


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["bottleneck", "preact projection"])
def test_an_empty_batch(kind, training):
    model, x = network(kind).train(training), images(n=0)
    with fr.use_backend("reference"):
        stock = facts(model(x))
    assert facts(model(x)) == stock


@pytest.mark.parametrize("provider", [None, "native", "triton"])
@pytest.mark.parametrize("kind", ["bottleneck", "fused bottleneck"])
def test_the_second_gpu_while_the_first_is_current(kind, provider):
    """Kernels are launched on the device of their tensors, which are all on that one."""
    model, x = network(kind, device="cuda:1"), images().to("cuda:1")
    with fr.use_backend("reference"):
        stock = [step(model.train(), x, torch.bfloat16), step(model.eval(), x, torch.float32)]
        with torch.no_grad():
            stock.append(facts(model(x)))
    assert stock[-1][-1] == torch.device("cuda", 1) and not CALLS
    with forced(provider):
        for _ in range(2):
            got = [step(model.train(), x, torch.bfloat16), step(model.eval(), x, torch.float32)]
            with torch.no_grad():
                got.append(facts(model(x)))
            assert got == stock
    assert CALLS and fake_cuda.CURRENT == [0]


@pytest.mark.parametrize("kind", ["bottleneck", "fused bottleneck"])
def test_a_damaged_file_of_tuned_kernels(kind, tmp_path, monkeypatch):
    """One line says so, and the kernels are those of a GPU that was not tuned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "fused_resnet").mkdir()
    path = tmp_path / "fused_resnet" / tuning.file_name(torch.device("cuda", 0))
    path.write_text('{"winners": [')
    model, x = network(kind).eval(), images()
    with torch.no_grad():
        with fr.use_backend("reference"):
            stock = facts(model(x))
        with pytest.warns(RuntimeWarning, match="is ignored .*tune` rewrites it") as caught:
            assert facts(model(x)) == facts(model(x)) == stock
    assert len(caught) == 1 and CALLS


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bottleneck", "fused bottleneck"])
def test_captured_inference(kind, dtype):
    model, x = network(kind).eval(), images()
    call = fr.inference(model, x, dtype=dtype)
    with torch.no_grad(), autocast(dtype or torch.float32), fr.use_backend("reference"):
        stock = [facts(model(images(n=n))) for n in (2, 3)]
    assert [facts(call(images(n=n))) for n in (2, 3)] == stock and call.cuda_graph
    assert len(call._graphs) == 2


@pytest.mark.parametrize("options", [
    {}, {"dtype": torch.bfloat16, "skip_nonfinite": True},
    {"dtype": torch.float16, "scaler": True, "max_norm": 1.0},
])  # fmt: skip
@pytest.mark.parametrize("kind", ["bottleneck", "fused bottleneck"])
def test_captured_training_step(kind, options):
    """Three eager steps, a captured one, and a replay."""
    model, targets = network(kind), torch.randint(10, (2,), device="cuda")
    if "scaler" in options:
        options = {**options, "scaler": torch.amp.GradScaler("cuda")}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
    step = fr.training_step(model, nn.functional.cross_entropy, optimizer, **options)
    losses = [facts(step(images("channels_last"), targets)) for _ in range(5)]
    assert losses == 5 * [((), torch.float32, (), torch.device("cuda", 0))]
    assert step.reason is None and len(step._graphs) == 1, step.reason
    assert facts(step.gradient_norm) == (losses[0] if len(options) > 1 else None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration_that_tune_measures(dtype, tmp_path, monkeypatch):
    """Of a few convolutions of a ResNeXt, and of their gradients."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device, measured = torch.device("cuda", 0), []
    names = registry.candidates("conv_bn_relu", "cuda")
    providers = [registry.provider(name, "cuda") for name in names if name != "reference"]
    layers = [
        Problem("conv_bn_relu", DTYPES[dtype], weight, Geometry(*geometry), x)
        for weight, geometry, x in (
            ((64, 3, 7, 7), ((2, 2), (3, 3), (1, 1)), (2, 3, 32, 32)),
            ((128, 4, 3, 3), ((2, 2), (1, 1), (1, 1), 32), (2, 128, 8, 8)),
            ((256, 128, 1, 1), ((1, 1), (0, 0), (1, 1)), (2, 128, 8, 8)),
            ((512, 512, 3, 3), ((1, 1), (1, 1), (1, 1)), (2, 512, 2, 2)),
        )
    ]

    def measure(problem: Problem, backend: str, config: Any) -> float:
        x, weight = (
            torch.randn(shape, device=device, dtype=problem.dtype)
            for shape in (problem.x_shape, problem.weight_shape)
        )
        conv = GpuConv(problem, weight, *torch.rand(2, weight.shape[0], device=device))
        y = conv.run_by(backend, config, layout.channels_last(x), None, Activation.RELU)
        expected = (problem.y_shape, problem.dtype, layout.channels_last_strides(problem.y_shape))
        assert facts(y)[:3] == expected
        measured.append((backend, config))
        return 1.0 / len(measured)

    found = problems(layers, device, providers)
    failed = []
    winners, complete, wrong, why = tuning.tune(
        found, device, providers, measure,
        lambda problem, backend, config, time_s: failed.append(config) if time_s > 1 else None,
    )  # fmt: skip
    assert why is None and complete and not wrong and not failed
    assert set(winners) == {p.gemm() for p in found}
    assert {backend for backend, _ in measured} == {"native", "triton", "vendor"}
    assert len(found) > len(layers) or dtype == "float32"
    for layer in layers:  # the winners are used
        assert tuning.choice_for(layer, device).time_s < 1


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("contender", ["fused", "fused-graph"])
def test_benchmarked_steps(contender, mode, monkeypatch):
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)
    own = torch.bfloat16 if mode == "infer" else torch.float32
    monkeypatch.setattr(contenders, "get_model", lambda name, **_: network("bottleneck", own))
    case = contenders.Case("resnet50", 2, "bfloat16", mode, "cuda")
    data = contenders.Data(network("bottleneck").state_dict(), images(), torch.arange(2))
    step = contenders.build(contender, case, data)
    shape = (2, 10) if mode == "infer" else ()
    assert {facts(step())[0] for _ in range(5)} == {shape} and CALLS


class Run(loop._Run):
    """A training run of a small network, on images that no loader reads."""

    def __init__(self, processes: int, **options: Any) -> None:
        config = loop.Config(batch=4, image_size=32, device="cuda", **options)
        super().__init__(config, print, None, 0, processes, torch.device("cuda", 0))

    def take(self, count: int) -> None:
        # As a loader collates it, in pinned memory.
        x, y = torch.randn(4 // self.processes, 3, 32, 32), torch.arange(4 // self.processes)
        for _ in range(count):
            assert self.one_step(x, y) == (1.0, 1.0)


@pytest.fixture
def training(monkeypatch):
    """The training loop with a fake network in place of one that is moved to the GPU."""
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(loop, "get_model", lambda name, **_: network("bottleneck"))
    images = [(torch.zeros(3, 32, 32), 0)] * 8
    data = datasets.Data((images, None), (images, None), [str(i) for i in range(10)])
    monkeypatch.setattr(datasets, "load", lambda *_: data)


@pytest.mark.parametrize("options", [
    {}, {"amp": "bfloat16", "cuda_graph": True}, {"amp": "float16", "accumulate": 2, "clip": 1.0},
    {"amp": "float16", "cuda_graph": True, "optimizer": "adamw", "ema": 0.9},
])  # fmt: skip
def test_training_loop(options, training):
    run = Run(1, **options)
    run.take(5)
    assert CALLS and run.step == 5
    assert (run.recorded is not None and len(run.recorded._graphs)) == options.get("cuda_graph", 0)


@pytest.fixture
def two_processes():
    """The first of two, whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=fake_pg.FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("sync_bn", [False, True])
def test_training_loop_of_two_processes(sync_bn, training, two_processes, monkeypatch):
    # DistributedDataParallel's C++ writes to the memory of gradients.
    monkeypatch.setattr(loop.distributed, "parallel", lambda model, *_: model)
    run = Run(2, amp="float16", sync_bn=sync_bn)
    run.take(2)
    assert run.step == 2


def test_stochastic_depth_agrees_by_tensors_on_the_gpu(two_processes, monkeypatch):
    """NCCL takes no others."""
    sent, send = [], dist.broadcast
    monkeypatch.setattr(FakeTensor, "tolist", lambda t: [0.1, 0.95, 0.1, 0.95, 0.95, 0.1])

    def broadcast(t: Tensor, *arguments: Any, **more: Any) -> None:
        sent.append(t.device)
        send(t, *arguments, **more)

    monkeypatch.setattr(dist, "broadcast", broadcast)
    model = convert_sync_batchnorm(network("stochastic"))
    y = model(images())
    assert sent == [torch.device("cuda", 0)] and facts(y)[0] == (2, 10)
