"""Whole models on the CUDA kernels: on a GPU, or in the emulator without one."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.kernels import cache, tuning
from fused_resnet.kernels.cuda import implicit_gemm
from fused_resnet.tolerance import TOLERANCE, measure_error
from tests.emulator import emulation
from tests.models.model_helpers import KINDS, both_ways, pair, randomise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "native" if DEVICE == "cuda" else "emulated"
NARROW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest) -> None:
    if DEVICE == "cpu":
        request.getfixturevalue("emulator")


@pytest.fixture
def device() -> str:
    return DEVICE


def images(count: int = 2, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, device=DEVICE)


def check_tolerance(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """The fused model's error against float64 is at most twice stock's, plus a small floor."""
    with torch.no_grad():
        exact = copy.deepcopy(model).cpu().double()(x.cpu().double())
        with fr.use_backend("reference"):
            stock = model(x)
        before = x.clone()
        with fr.use_backend(BACKEND):
            y = model(x)
    assert torch.equal(x, before) and y.dtype == stock.dtype
    error, theirs = measure_error(y, exact), measure_error(stock, exact)
    assert error.max_abs <= TOLERANCE.allowed_max(theirs, dtype), (error, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_models_are_as_accurate_as_stock(kind, dtype):
    _, model = pair(kind)
    check_tolerance(model.to(DEVICE, dtype), images().to(dtype), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("size", [33, 50, 96])
def test_odd_sizes(size):
    _, model = pair("bottleneck")
    x = images(1, size).to(torch.bfloat16)
    check_tolerance(model.to(DEVICE, torch.bfloat16), x, torch.bfloat16)


def count(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The number of calls of each convolution kernel."""
    calls = {"gemm": 0, "stem": 0, "stem and pool": 0, "reference": 0}
    run_conv, run_stem = implicit_gemm.run_conv, implicit_gemm.run_stem
    op = importlib.import_module("fused_resnet.ops.conv_bn_relu")
    by_reference = op.conv_bn_relu_reference

    def counted(name, function):
        def call(*arguments):
            calls[name] += 1
            return function(*arguments)

        return call

    def stem(conv, x, pool):
        calls["stem and pool" if pool else "stem"] += 1
        return run_stem(conv, x, pool)

    monkeypatch.setattr(implicit_gemm, "run_conv", counted("gemm", run_conv))
    monkeypatch.setattr(implicit_gemm, "run_stem", stem)
    monkeypatch.setattr(op, "conv_bn_relu_reference", counted("reference", by_reference))
    with torch.no_grad(), fr.use_backend(BACKEND):
        run()
    return calls


def test_every_convolution_uses_the_cuda_kernels(monkeypatch):
    model = randomise(fr.resnet18(num_classes=10)).eval().to(DEVICE, torch.bfloat16)
    x = images(1).to(torch.bfloat16)
    calls = count(lambda: model(x), monkeypatch)
    assert calls == {"gemm": 19, "stem": 0, "stem and pool": 1, "reference": 0}
    with fr.use_backend(BACKEND):
        assert all(row.fused and row.path == "inference" for row in fr.explain(model))


@pytest.mark.slow
def test_another_pooling_after_the_stem(monkeypatch):
    model = randomise(fr.resnet18(num_classes=10)).eval().to(DEVICE, torch.bfloat16)
    model.maxpool = nn.MaxPool2d(2)
    x = images(1).to(torch.bfloat16)
    assert count(lambda: model(x), monkeypatch)["stem"] == 1
    check_tolerance(model, x, torch.bfloat16)


@pytest.mark.slow
def test_another_padding_does_not_use_the_stem_kernel(monkeypatch):
    model = randomise(fr.resnet18(num_classes=10)).eval().to(DEVICE, torch.bfloat16)
    model.conv1 = nn.Conv2d(3, 64, 7, 2, 2, bias=False).to(DEVICE, torch.bfloat16)
    x = images(1).to(torch.bfloat16)
    calls = count(lambda: model(x), monkeypatch)
    assert calls["stem"] == calls["stem and pool"] == 0 and calls["gemm"] == 20
    check_tolerance(model, x, torch.bfloat16)


def test_autocast(monkeypatch):
    model = pair("basic")[1].to(DEVICE)
    x = images(1)

    def run():
        with torch.autocast(DEVICE, torch.bfloat16):
            y = model(x)
            assert y.dtype == torch.bfloat16
            with fr.use_backend("reference"):
                torch.testing.assert_close(y, model(x), rtol=0.1, atol=0.2)

    assert count(run, monkeypatch)["gemm"] == 13


@pytest.mark.slow
def test_unsupported_convolutions_use_the_reference(monkeypatch):
    """Groups of 4 channels: the block's convolutions run one by one."""
    model = randomise(fr.resnext50_32x4d(num_classes=10)).eval().to(DEVICE, torch.bfloat16)
    x = images(1, 32).to(torch.bfloat16)
    calls = count(lambda: model(x), monkeypatch)
    assert calls["reference"] == 3 and calls["gemm"] == 49
    with fr.use_backend(BACKEND):
        unfused = [row for row in fr.explain(model) if not row.fused]
    assert [row.name for row in unfused] == [f"layer1.{i}" for i in range(3)]
    assert all("supports a weight of shape (128, 4, 3, 3)" in row.reason for row in unfused)


CHANGES = {
    "weight": lambda m: m.layer1[0].conv1.weight.mul_(1.5),
    "stem": lambda m: m.conv1.weight.mul_(1.5),
    "statistics": lambda m: m.layer2[0].bn1.running_var.mul_(3.0),
    "loaded": lambda m: m.load_state_dict({k: v * 1.25 for k, v in m.state_dict().items()}),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_used(change):
    model = pair("basic")[1].to(DEVICE, torch.bfloat16)
    x = images(1, 32).to(torch.bfloat16)
    with torch.no_grad(), fr.use_backend(BACKEND):
        before = model(x)
        CHANGES[change](model)
        after = model(x)
        fresh = copy.deepcopy(model)(x)
    assert torch.equal(after, fresh) and not torch.equal(after, before)


@both_ways
def test_a_training_step_matches_stock():
    """The CUDA kernels of bn_add_relu, forward and backward, in a whole network."""
    stock, mine = pair("basic")
    stock, mine = stock.to(DEVICE).train(), mine.to(DEVICE).train()
    x = images(4, 32)
    for model, backend in ((stock, "reference"), (mine, BACKEND)):
        with fr.use_backend(backend):
            model(x).square().mean().backward()
    for (name, a), b in zip(stock.named_parameters(), mine.parameters(), strict=True):
        scale = a.grad.abs().max().item()
        assert (a.grad - b.grad).abs().max().item() <= 1e-3 * scale + 1e-7, name
    for (name, a), b in zip(stock.named_buffers(), mine.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_inference_in_16_bits():
    model = pair("basic")[1].to(DEVICE)
    x = images(2, 32)
    with fr.use_backend(BACKEND):
        call = fr.inference(model, x, dtype=torch.bfloat16)
        y = call(x)
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(y, model(x))


@both_ways
@pytest.mark.parametrize("capturing", [False, True], ids=["eager", "captured"])
def test_packing_is_synchronised_before_caching(capturing, monkeypatch):
    """Weights packed on one stream are complete before another stream uses them, and none is cached
    whose memory belongs to a graph."""
    model = pair("basic")[1].to(DEVICE, torch.bfloat16)
    x, checked, packed = images(1, 32).to(torch.bfloat16), [], []
    monkeypatch.setattr(cache, "capturing", lambda t: checked.append(t.shape) is None and capturing)
    pack = implicit_gemm.pack_stem
    monkeypatch.setattr(implicit_gemm, "pack_stem", lambda w: packed.append(1) or pack(w))
    with torch.no_grad(), fr.use_backend(BACKEND):
        first = model(x)
        blocks = 1 + sum(len(getattr(model, f"layer{i}")) for i in (1, 2, 3, 4))
        # Every plan, and the stem's other layout if its plan is kept.
        assert len(checked) == blocks + (not capturing)
        checked.clear()
        assert torch.equal(model(x), first)
    assert len(packed) == (2 if capturing else 1) and bool(checked) == capturing


@both_ways
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_another_stream_uses_complete_weights():
    x = images(1).to(torch.bfloat16)
    for _ in range(5):
        model = pair("basic")[1].to(DEVICE, torch.bfloat16)
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.no_grad(), fr.use_backend(BACKEND):
            with torch.cuda.stream(first):
                torch.cuda._sleep(200_000_000)
                want = model(x)
            with torch.cuda.stream(second):
                got = model(x)
        torch.cuda.synchronize()
        assert torch.equal(got, want)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's architecture is fixed")
@pytest.mark.parametrize("architecture", [80, 90])
def test_tiles_of_the_architecture_are_used(architecture, monkeypatch):
    tuning.choice.cache_clear()
    used, run_conv = set(), implicit_gemm.run_conv

    def spy(conv, x, residual, relu, y, config):
        used.add(implicit_gemm.tiles()[config.tile]["architecture"])
        run_conv(conv, x, residual, relu, y, config)

    monkeypatch.setattr(implicit_gemm, "run_conv", spy)
    _, model = pair("bottleneck")
    with emulation.device(architecture=architecture):
        x = images(1, 32).to(torch.bfloat16)
        check_tolerance(model.to(torch.bfloat16), x, torch.bfloat16)
    tuning.choice.cache_clear()
    assert architecture in used and used <= {80, architecture}
