"""`fr.inference`: one callable for a model, with a CUDA graph per input shape on a GPU.

Without a GPU the graphs are simulated: a replay runs the forward on the memory and with the weights
of its capture, so that stale memory and stale weights are detected.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet import inference as function
from fused_resnet.tolerance import TOLERANCE, measure_error
from tests.graphs.recorded_steps import SETTINGS
from tests.models.model_helpers import randomise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
module = __import__("sys").modules["fused_resnet.graphs.inference"]


@pytest.fixture
def graphs(monkeypatch):
    """The shapes of all captures; on the CPU the graphs are simulated (see `ready`)."""
    made = []
    record = module.record

    def played(run, example):
        x = example.clone()
        frozen = copy.deepcopy(run.__self__.model)  # a graph reads the weights of its capture
        captured = fr.Inference.__new__(fr.Inference)
        captured.__dict__.update(run.__self__.__dict__, model=frozen)
        y = run(x).clone()
        return module.Graph(x, y, lambda: y.copy_(captured._run(x)), contextlib.nullcontext)

    def noted(run, example):
        made.append(tuple(example.shape))
        return (record if DEVICE == "cuda" else played)(run, example)

    monkeypatch.setattr(module, "record", noted)
    return made


def ready(model, x, **options):
    call = fr.inference(model, x, **options)
    if DEVICE == "cpu":
        call.cuda_graph = True
    return call


@pytest.fixture(params=["family", pytest.param("fuse", marks=pytest.mark.slow)])
def model(request):
    """Of this package, or torchvision's changed by `fuse`."""
    if request.param == "family":
        return randomise(fr.resnet18(num_classes=10)).eval().to(DEVICE)
    stock = pytest.importorskip("torchvision.models").resnet18(num_classes=10)
    return fr.fuse(randomise(stock).eval().to(DEVICE))


def images(n=2, size=64):
    return torch.randn(n, 3, size, size, device=DEVICE)


def same(y, want):
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


def test_outputs_equal_the_models(model, graphs):
    call = ready(model, images())
    for x in (images(), images(), images(3), images(2, 80), images().double().float()):
        with torch.no_grad():
            want = model(x)
        y = call(x)
        same(y, want)
        assert not y.requires_grad
    assert len(graphs) <= 4, "a shape was captured twice"


def test_outputs_are_new_memory(model, graphs):
    call = ready(model, images())
    first, x = call(images()), images()
    expected = first.clone()
    second = call(x)
    assert torch.equal(first, expected) and second.data_ptr() != first.data_ptr()


def test_any_layout_of_x(model, graphs):
    call = ready(model, images())
    x = images()
    want = call(x)
    same(call(x.contiguous(memory_format=torch.channels_last)), want)
    same(call(x.transpose(2, 3).contiguous().transpose(2, 3)), want)


CHANGES = {
    "in place": lambda m: m.layer1[0].conv1.weight.mul_(1.5),
    "statistics": lambda m: m.bn1.running_var.mul_(2.0),
    "last layer": lambda m: m.fc.bias.add_(1.0),
    "loaded": lambda m: m.load_state_dict(
        {k: v * 1.25 if v.is_floating_point() else v for k, v in m.state_dict().items()}
    ),
    "assigned": lambda m: m.load_state_dict(
        {k: v * 1.25 if v.is_floating_point() else v for k, v in m.state_dict().items()},
        assign=True,
    ),
    "moved": lambda m: setattr(m.fc.weight, "data", m.fc.weight.data * 2),
    "replaced": lambda m: setattr(m.fc, "weight", nn.Parameter(m.fc.weight.detach() * 2)),
    "surgery": lambda m: setattr(m, "fc", nn.Linear(512, 10).to(DEVICE)),
    "an added module": lambda m: m.relu.add_module("more", nn.Linear(1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_used(model, graphs, change):
    call, x = ready(model, images()), images()
    before = call(x)
    recorded = len(graphs)
    with torch.no_grad():
        CHANGES[change](model)
        want = model(x)
    same(call(x), want)
    assert change == "an added module" or not torch.allclose(before, want, rtol=1e-3)
    assert len(graphs) == recorded + 1
    same(call(x), want)
    assert len(graphs) == recorded + 1, "captured again though nothing changed"


def test_training_and_back(model, graphs):
    call, x = ready(model, images()), images()
    model.train()
    with pytest.raises(ValueError, match=r"inference: model must be in eval mode: call model.eval"):
        call(x)
    model(x)  # changes the running statistics
    model.eval()
    with torch.no_grad():
        same(call(x), model(x))


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_run(model, graphs, kind):
    call, x, seen = ready(model, images()), images(), []
    handle = getattr(model.layer2, f"register_{kind}_hook")(lambda *which: seen.append(1))
    for _ in range(2):
        call(x)
    assert len(seen) == 2
    handle.remove()
    call(x)
    assert len(seen) == 2


def test_few_graphs_are_kept(model, graphs):
    call = ready(model, images(1, 32))
    for n in range(1, 14):
        call(images(n, 32))
    assert len(call._graphs) == 8
    before = len(graphs)
    call(images(13, 32))
    call(images(6, 32))
    assert len(graphs) == before
    call(images(1, 32))
    assert len(graphs) == before + 1


def test_an_empty_batch(model, graphs):
    assert ready(model, images())(images(0)).shape == (0, 10)
    assert (0, 3, 64, 64) not in graphs, "an empty batch must not be captured"


def test_a_forced_backend_has_its_own_graph(model, graphs):
    call, x = ready(model, images()), images()
    call(x)
    for recorded in (1, 0):
        before = len(graphs)
        with fr.use_backend("reference"):
            call(x)
        assert len(graphs) == before + recorded
        call(x)
        assert len(graphs) == before + recorded


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_has_its_own_graph(graphs, setting):
    """One switched off after a capture must not be replayed as if it were on."""
    net = nn.Conv2d(3, 4, 3).eval().to(DEVICE)
    call, x = ready(net, images(1, 8)), images(1, 8)
    call(x)
    before = len(graphs)
    with SETTINGS[setting]():
        call(x)
        call(x)
    assert len(graphs) == before + 1


class Autocast(nn.Module):
    """A layer that notes autocast's dtype, or None, and whether its cache of casts is in use."""

    def __init__(self):
        super().__init__()
        self.fc, self.seen = nn.Linear(8, 8), set()

    def forward(self, x):
        enabled = torch.is_autocast_enabled(DEVICE)
        dtype = torch.get_autocast_dtype(DEVICE) if enabled else None
        self.seen.add((dtype, enabled and torch.is_autocast_cache_enabled()))
        return self.fc(x)


def test_surrounding_autocast_is_used(graphs):
    """Its cache of casts is not: it is freed when the region ends, and graphs would read it."""
    net = Autocast().eval().to(DEVICE)
    call, x = ready(net, images(1, 8)), images(1, 8)
    for dtype in (None, torch.bfloat16, None, torch.float16, torch.bfloat16):
        net.seen.clear()
        with torch.no_grad(), torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            y = call(x)
            assert not net.seen - {(dtype, False)}
            assert y.dtype == (dtype or torch.float32)
            torch.testing.assert_close(y, net.fc(x))
    assert len(graphs) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_as_accurate_as_autocast(model, graphs, dtype):
    call, x = ready(model, images(), dtype=dtype), images()
    y = call(x)
    with torch.no_grad():
        exact = copy.deepcopy(model).cpu().double()(x.cpu().double())
        with fr.use_backend("reference"), torch.autocast(DEVICE, dtype):
            stock = model(x)
    assert y.dtype == dtype
    error, theirs = measure_error(y, exact), measure_error(stock, exact)
    assert error.max_abs <= TOLERANCE.allowed_max(theirs, dtype)
    with torch.no_grad():
        assert model(x).dtype == torch.float32, "the model itself was changed"


def test_other_modules(graphs):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU()).eval().to(DEVICE)
    call, x = ready(net, images()), images()
    with torch.no_grad():
        same(call(x), net(x))


def test_threads_take_turns(model, graphs):
    call = ready(model, images(1, 32))
    xs = [images(1 + i % 3, 32) for i in range(8)]
    with torch.no_grad():
        want = [model(x) for x in xs]
    got = [None] * 8

    def work(i):
        for _ in range(3):
            got[i] = call(xs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for y, w in zip(got, want, strict=True):
        same(y, w)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.gpu
def test_streams_take_turns(model):
    call, x = fr.inference(model, images()), images()
    with torch.no_grad():
        want = model(x)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    got = []
    for i in range(40):
        with torch.cuda.stream(streams[i % 4]):
            got.append(call(x if i % 2 else -x))
    torch.cuda.synchronize()
    for y in got[1::2]:
        same(y, want)


def test_errors(model):
    x = torch.randn(1, 3, 32, 32)
    for bad, got in (
        (None, "NoneType"),
        (torch.ones(1, 3, 8, 8, dtype=torch.int64), r"torch.int64 of shape \(1, 3, 8, 8\)"),
        (torch.ones(3, 8, 8), r"torch.float32 of shape \(3, 8, 8\)"),
    ):
        with pytest.raises(TypeError, match=rf"inference: example must be .* got {got}"):
            fr.inference(model, bad)
    prepared = fr.inference(model, torch.zeros(1, 3, 32, 32), cuda_graph=False)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="inference: copy or pickle the model"):
            copied(prepared)
    with pytest.raises(TypeError, match=r"explain: model must be an nn.Module, got str"):
        fr.explain("resnet18")
    with pytest.raises(ValueError, match=r"inference: dtype must be float16, bfloat16 or None"):
        fr.inference(model.cpu(), x, dtype=torch.float64)
    with pytest.raises(ValueError, match="inference: cuda_graph needs a GPU, example is on cpu"):
        fr.inference(model.cpu(), x, cuda_graph=True)
    with pytest.raises(ValueError, match="must be in eval mode"):
        fr.inference(model.train(), x)
    call = fr.inference(model.eval(), x)
    with pytest.raises(RuntimeError, match="x is on meta, the model was prepared on cpu"):
        call(x.to("meta"))
    assert function is fr.inference
