"""`torch.compile(model, backend="fused_resnet")`: values, gradients and buffers against stock, and
what is left to Inductor. In most tests Inductor's part runs as it is: compiling takes long."""

from __future__ import annotations

import copy
import gc
import logging
import threading
import weakref
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fused_resnet as fr
from fused_resnet.fusion.regions import backend
from fused_resnet.kernels import native
from fused_resnet.kernels.cpu.convolution import NativeConv
from tests.fusion.regions.pairs import same
from tests.fusion.regions.region_helpers import Residual, calibrated, conv, leaves, outputs_agree
from tests.fusion.regions.zoo import MODELS
from tests.models.model_helpers import agree, images, pair

pytestmark = pytest.mark.skipif(native.load() is not None, reason="no native kernels")
X = (2, 16, 12, 10)


@pytest.fixture(autouse=True)
def left_to_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The graphs that Inductor would compile; they run as they are."""
    found: list[Any] = []
    for name in ("_inductor", "_inductor_now"):
        monkeypatch.setattr(backend, name, lambda graph, *_, **__: found.append(graph) or graph)
    torch.compiler.reset()
    yield found
    torch.compiler.reset()


def compiled(model: Any, fullgraph: bool = True, **options: Any) -> Any:
    return torch.compile(model, backend=backend.backend, fullgraph=fullgraph, **options)


def graphs_of(model: nn.Module) -> list[Any]:
    mine = {id(p) for p in model.parameters()}
    bounds = [b for g in backend.graphs for b in g.bounds]
    return [b for b in bounds if any(id(t) in mine for t in b.tensors.values())]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_as_stock(name: str, training: bool) -> None:
    """Outputs; in training gradients and buffers of two steps too."""
    stock = calibrated(MODELS[name]()).train(training)
    model = copy.deepcopy(stock)
    mine = compiled(model, fullgraph=name != "data-dependent" and name != "cumulative")
    for step in range(2):
        found = []
        for called, m in ((mine, model), (stock, stock)):
            m.zero_grad()
            x = torch.randn(X, generator=torch.Generator().manual_seed(step)).requires_grad_(
                training
            )
            torch.manual_seed(1)  # of dropout
            with torch.set_grad_enabled(training):
                y = called(x)
            if training:
                sum(t.square().mean() for t in leaves(y) if isinstance(t, Tensor)).backward()
            found.append((y, [x.grad, *(p.grad for p in m.parameters()), *m.buffers()]))
        if not training:
            outputs_agree(found[0][0], found[1][0])
        for a, b in zip(found[0][1], found[1][1], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                same(a, b)
    if name != "cumulative" or not training:  # its momentum is computed in the forward
        assert graphs_of(model) and all(g.program is not None for g in graphs_of(model))


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "grouped"])
def test_torchvision(kind: str, left_to_inductor: list[Any]) -> None:
    """Every convolution of torchvision's networks is fused, for batches and images of any size,
    with one packing of every weight, and nothing is left to Inductor."""
    stock, _ = pair(kind)
    model = copy.deepcopy(stock)
    mine, packed = compiled(model), []
    original = NativeConv.__init__
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(NativeConv, "__init__", lambda *a: packed.append(a) or original(*a))
        counts = []
        for count, size in ((2, 64), (2, 64), (3, 64), (4, 64), (3, 48)):
            x = images(count, size)
            agree(mine(x), stock(x))
            counts.append(len(packed))
        assert len(set(counts)) == 1 and counts[0] > 8
    assert not left_to_inductor
    found = fr.explain(mine)
    assert found and all(e.fused and e.path == "inference" for e in found)


def test_no_recompilation() -> None:
    stock, _ = pair()
    mine, x = compiled(stock), images()
    with torch.no_grad():
        mine(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            agree(mine(x), stock(x))
    (graph,) = graphs_of(stock)
    program = graph.program
    with torch.no_grad():
        mine(x)
    assert graph.program is program


def _written(model: Any) -> None:
    with torch.no_grad():
        model.first.weight.mul_(1.5)


def _data(model: Any) -> None:
    model.norm1.running_mean.data += 1


def _assigned(model: Any) -> None:
    state = {name: t + 0.25 for name, t in model.state_dict().items() if t.is_floating_point()}
    model.load_state_dict(state, assign=True, strict=False)


def _replaced(model: Any) -> None:
    model.second = calibrated(conv(16, 16))


def _half(model: Any) -> None:
    model.second.weight.data = model.second.weight.data * 0.5


@pytest.mark.parametrize("change", [_written, _data, _assigned, _replaced, _half])
def test_changes_are_seen(change: Any) -> None:
    model = calibrated(Residual())
    mine, x = compiled(model), torch.randn(X)
    with torch.no_grad():
        mine(x)
        change(model)
        for _ in range(3):
            agree(mine(x), model(x))
    assert all(e.fused for e in fr.explain(mine))


def test_weights_made_for_each_call(left_to_inductor: list[Any]) -> None:
    """They are not packed at every call: Inductor computes such a graph."""
    model, x = calibrated(Residual()), torch.randn(X)
    mine = compiled(lambda values, x: functional_call(model, values, (x,)))
    with torch.no_grad():
        for i in range(4):
            values = {name: t * (1 + i / 8) for name, t in model.named_parameters()}
            agree(mine(values, x), functional_call(model, values, (x,)))
    assert left_to_inductor and not graphs_of(model)


class Standardised(nn.Conv2d):
    """Its weight is computed in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Writes(nn.Module):
    """Writes to a weight before it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(16, 16), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.conv.weight.mul_(0.5)
        return F.relu(self.norm(self.conv(x)))


class Switches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Residual()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.block(x)
        return y.float()


class Checkpointed(Switches):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def _parametrized() -> nn.Module:
    model = Residual()
    parametrizations.weight_norm(model.first)
    return model


def _standardised() -> nn.Module:
    model = Residual()
    model.first = Standardised(16, 16, 3, padding=1, bias=False)
    return model


class SameNormTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = conv(16, 16), conv(16, 16), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.b(F.relu(self.norm(self.a(x))))))


UNUSUAL: dict[str, Any] = {
    "parametrized": _parametrized, "standardised": _standardised, "writes": Writes,
    "switches": Switches, "one norm twice": SameNormTwice,
    "float64": lambda: Residual().double(),
    "padding same": lambda: nn.Sequential(nn.Conv2d(16, 16, 3, padding="same"), nn.ReLU()),
    "one dimension": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(16, 8, 3), nn.BatchNorm1d(8)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.parametrize("training", [False, True])
def test_unusual_forwards(name: str, training: bool) -> None:
    """What is not fused is left alone, and is right."""
    stock = calibrated(UNUSUAL[name]()).train(training)
    model = copy.deepcopy(stock)
    mine = compiled(model)
    for _ in range(2):
        found = []
        for called, m in ((mine, model), (stock, stock)):
            torch.manual_seed(0)
            x = torch.randn(X, dtype=next(m.parameters()).dtype)
            m.zero_grad()
            with torch.set_grad_enabled(training):
                y = called(x)
            if training:
                y.square().mean().backward()
            found.append([y.detach(), *(p.grad for p in m.parameters()), *m.buffers()])
        for a, b in zip(*found, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                rounding = 3e-2 if name == "switches" else 1e-3  # of bfloat16
                torch.testing.assert_close(a, b, rtol=rounding, atol=rounding / 10)


class EnablesGradients(Switches):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.block(x)


def test_gradients_enabled_inside() -> None:
    """Such a graph is not fused."""
    model = calibrated(EnablesGradients())
    x, mine = torch.randn(X), compiled(model)
    with torch.no_grad():
        y, want = mine(x), model(x)
    assert want.requires_grad and y.requires_grad
    for result in (y, want):
        result.sum().backward()
    assert torch.equal(y, want)


@pytest.mark.parametrize("name", ["residual", "folded"])
def test_gradients_of_weights_alone(name: str) -> None:
    """In eval mode, for an x that requires none."""
    stock = calibrated(MODELS[name]())
    model, x = copy.deepcopy(stock), torch.randn(X)
    compiled(model)(x).square().mean().backward()
    stock(x).square().mean().backward()
    for p, q in zip(model.parameters(), stock.parameters(), strict=True):
        same(p.grad, q.grad)


def test_other_weights_at_every_call() -> None:
    """They are packed for the first call alone, and for calls that repeat."""
    model, x, packed = calibrated(Residual()), torch.randn(X), []
    mine, original = compiled(model), NativeConv.__init__
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(NativeConv, "__init__", lambda *a: packed.append(a) or original(*a))
        for i in range(5):
            model.first.weight = nn.Parameter(model.first.weight * 1.1)
            agree(mine(x), model(x))
            assert len(packed) == 2, i
        for _ in range(3):
            agree(mine(x), model(x))
        assert len(packed) == 4


def test_reasons(caplog: pytest.LogCaptureFixture) -> None:
    """`explain` and the log say what was left."""
    model = calibrated(_parametrized())
    mine = compiled(model)
    with torch.no_grad(), caplog.at_level(logging.INFO, "fused_resnet"):
        mine(torch.randn(X))
    assert "parts of a graph are fused" in caplog.text
    found = {e.reason: e.fused for e in fr.explain(mine)}
    assert found == {"": True, "a weight is computed in the forward": False}
    caplog.set_level(logging.INFO, "fused_resnet")
    with fr.use_backend("reference"), torch.no_grad():
        agree(mine(torch.ones(X)), model(torch.ones(X)))
    assert "Inductor compiles a graph: the reference backend is forced" in caplog.text


class PlainWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.randn(16, 16, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.w, padding=1))


def test_graphs_without_a_program() -> None:
    """`explain` lists their convolutions, with the reason; of this model and of no other."""
    other = calibrated(Residual())
    x, owners, looked = torch.randn(X), backend._owners, []
    plain, residual, switches = PlainWeight(), calibrated(Residual()), calibrated(Switches())
    mine = compiled(plain)
    called = compiled(lambda values, x: functional_call(residual, values, (x,)))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(backend, "_owners", lambda ts: looked.append(1) or owners(ts))
        for i in range(3):
            agree(mine(x), plain(x))
            values = {name: t * (2 + i) for name, t in residual.named_parameters()}
            agree(called(values, x), functional_call(residual, values, (x,)))
        compiled(switches)(x)
    assert len(looked) == 2, "looking for the owners of tensors takes long"
    reason = "its weights belong to no module"
    assert {(e.name, e.fused, e.reason) for e in fr.explain(mine)} == {("w", False, reason)} or {
        (e.name, e.fused, e.reason) for e in fr.explain(mine)
    } == {("_orig_mod.w", False, reason)}
    assert [(e.name, e.fused, e.reason) for e in fr.explain(residual)] == [
        ("first", False, reason), ("second", False, reason),
    ]  # fmt: skip
    found = fr.explain(switches)
    assert [e.name for e in found] == ["block.first", "block.second"]
    assert all(not e.fused and "autocast" in e.reason for e in found)
    assert not fr.explain(other)


def test_graph_break() -> None:
    class Printing(Residual):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.norm1(self.first(x)))
            torch._dynamo.graph_break()
            return F.relu(self.norm2(self.second(y)) + x)

    model = calibrated(Printing())
    mine, x = compiled(model, fullgraph=False), torch.randn(X)
    with torch.no_grad():
        agree(mine(x), model(x))
    assert sum(e.fused for e in fr.explain(mine)) == 2


def test_segments_go_to_inductor(left_to_inductor: list[Any]) -> None:
    """Consecutive operations without a fused counterpart are one graph each."""

    class Scaled(Residual):
        def forward(self, x: Tensor) -> Tensor:
            gate = torch.sigmoid(x.mean((2, 3), keepdim=True)) * x.abs()
            y = super().forward(gate)
            return torch.tanh(y).exp() + y, gate.sum()

    model = calibrated(Scaled())
    mine, x = compiled(model), torch.randn(X).contiguous(memory_format=torch.channels_last)
    for layout in (torch.contiguous_format, torch.channels_last):
        with torch.no_grad():
            outputs_agree(
                mine(x.contiguous(memory_format=layout)), model(x.contiguous(memory_format=layout))
            )
    assert len({len(graph.graph.nodes) for graph in left_to_inductor}) == 2


def test_models_of_one_class() -> None:
    """They share the compiled code, and neither gets the other's weights, in threads neither."""
    models = [calibrated(Residual(), seed) for seed in range(4)]
    with torch.no_grad():
        for i, m in enumerate(models):
            m.first.weight.mul_(1 + i)
    mine = compiled(lambda m, x: m(x))
    x, errors = torch.randn(X), []
    with torch.no_grad():
        want = [m(x) for m in models]

    def call(i: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(10):
                    agree(mine(models[i], x), want[i])
        except BaseException as error:
            errors.append(error)

    for i in range(4):
        call(i)
    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors[0]


def test_models_of_one_class_take_turns() -> None:
    """As a student and its teacher: both stay fused, and are packed once."""
    models = [calibrated(Residual(), seed) for seed in range(3)]
    mine, x, packed = compiled(lambda m, x: m(x)), torch.randn(X), []
    original = NativeConv.__init__
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(NativeConv, "__init__", lambda *a: packed.append(a) or original(*a))
        for i in range(12):
            agree(mine(models[i % 3], x), models[i % 3](x))
    assert len(packed) == 6
    for model in models:
        assert [e.fused for e in fr.explain(model)] == [True]


def test_replaced_weights_are_let_go() -> None:
    model, x = calibrated(Residual()), torch.randn(X)
    mine = compiled(model)
    with torch.no_grad():
        mine(x)
        weight = weakref.ref(model.first.weight)
        _assigned(model)
        for _ in range(3):
            agree(mine(x), model(x))
    gc.collect()
    assert weight() is None and all(e.fused for e in fr.explain(mine))


@pytest.mark.parametrize("training", [False, True])
def test_memory_is_freed_with_the_model(training: bool) -> None:
    model = calibrated(Residual()).train(training)
    mine = compiled(model)
    with torch.set_grad_enabled(training):
        mine(torch.randn(X)).sum()
    assert graphs_of(model)
    weight = weakref.ref(model.first.weight)
    del model, mine
    gc.collect()  # the model
    gc.collect()  # what was made from it
    assert weight() is None


def test_gradients_to_the_second_order() -> None:
    stock = calibrated(Residual()).train()
    model, found = copy.deepcopy(stock), []
    for called, m in ((compiled(model), model), (stock, stock)):
        x = torch.randn(X, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (g,) = torch.autograd.grad(called(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), [x, *m.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * float(b.abs().max()))


class Gate(Residual):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * torch.sigmoid(y) + torch.tanh(x)


@pytest.mark.slow
@pytest.mark.parametrize("make", [Gate, Checkpointed])
@pytest.mark.parametrize("training", [False, True])
def test_with_inductor(make: Any, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of the entry point, with Inductor for the rest."""
    monkeypatch.undo()
    known = entry_points(group="torch_dynamo_backends")
    assert "fused_resnet" in known.names, "install the package: make build"
    stock = calibrated(make()).train(training)
    model, found = copy.deepcopy(stock), []
    for called, m in ((torch.compile(model, backend="fused_resnet"), model), (stock, stock)):
        for n in (2, 3):
            x = torch.randn((n, *X[1:]), generator=torch.Generator().manual_seed(0))
            x.requires_grad_(training)
            m.zero_grad()
            with torch.set_grad_enabled(training):
                y = called(x)
            found.append(y.detach())
            if training:
                y.square().mean().backward()
                found += [x.grad, *(p.grad.clone() for p in m.parameters())]
                # Uncompiled, a checkpoint's recomputation updates statistics a second time.
                found += [] if make is Checkpointed else [b.clone() for b in m.buffers()]
    half = len(found) // 2
    for a, b in zip(found[:half], found[half:], strict=True):
        same(a, b)
