"""`fuse` on models of any class: values, gradients and buffers against stock, and what users do
with fused models."""

from __future__ import annotations

import copy
import enum
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fused_resnet as fr
from fused_resnet.fusion.regions.program import InferenceProgram
from fused_resnet.fusion.regions.region import regions_of
from fused_resnet.kernels import activation, native
from tests.fusion.regions.region_helpers import (
    LAST,
    Residual,
    calibrated,
    conv,
    leaves,
    outputs_agree,
    programs,
)
from tests.fusion.regions.zoo import MODELS, Dense, sequential
from tests.models.model_helpers import agree

pytestmark = pytest.mark.skipif(native.load() is not None, reason="no native kernels")


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_inference(name: str, layout: torch.memory_format) -> None:
    stock = calibrated(MODELS[name]())
    mine = fr.fuse(copy.deepcopy(stock))
    for shape in ((2, 16, 12, 10), (2, 16, 12, 10), (1, 16, 8, 8)):
        x = torch.randn(shape).contiguous(memory_format=layout)
        before = x.clone()
        with torch.no_grad():
            outputs_agree(mine(x), stock(x))
        assert torch.equal(x, before)
    assert programs(mine)


@pytest.mark.parametrize("name", MODELS)
def test_training(name: str) -> None:
    """Outputs, gradients and buffers of a step, and then outputs in eval mode."""
    stock = calibrated(MODELS[name]()).train()
    mine = fr.fuse(copy.deepcopy(stock))
    x = torch.randn(4, 16, 12, 10)
    for _ in range(2):
        found = []
        for model in (mine, stock):
            model.zero_grad()
            inner = x.clone().requires_grad_()
            torch.manual_seed(1)  # of dropout
            y = model(inner * 1)
            sum(t.square().mean() for t in leaves(y) if isinstance(t, Tensor)).backward()
            tensors = [inner.grad, *(p.grad for p in model.parameters()), *model.buffers()]
            found.append((y, tensors))
        outputs_agree(found[0][0], found[1][0])
        for a, b in zip(found[0][1], found[1][1], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.is_contiguous() == b.is_contiguous()
                # Where a ReLU's input is within rounding of zero, its mask may differ.
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    mine.eval(), stock.eval()
    with torch.no_grad():
        outputs_agree(mine(x), stock(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    stock = calibrated(nn.Sequential(Residual(), Dense()))
    mine, x = fr.fuse(copy.deepcopy(stock)), torch.randn(2, 16, 12, 10)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        y, want = mine(x), stock(x)
    assert y.dtype == want.dtype and y.stride() == want.stride()
    # Stock rounds to 16 bits after every operation: measured 2e-2 in bfloat16.
    torch.testing.assert_close(y, want, rtol=5e-2, atol=5e-2)


def test_one_node_of_the_graph_per_block() -> None:
    mine = fr.fuse(nn.Sequential(Residual(), Residual()).train())
    y = mine(torch.randn(2, 16, 8, 8, requires_grad=True))
    names, node = [], y.grad_fn
    while node is not None:
        names.append(type(node).__name__)
        node = node.next_functions[0][0] if node.next_functions else None
    assert sum("Native" in name or "Step" in name for name in names) == 2, names
    assert not any("Convolution" in name or "NormBackward" in name for name in names)


def test_consecutive_blocks_are_one_chain() -> None:
    mine = fr.fuse(nn.Sequential(Residual(), Residual(), nn.Identity(), Residual()).eval())
    with torch.no_grad():
        mine(torch.randn(2, 16, 8, 8))
    (program,) = programs(mine)
    assert isinstance(program, InferenceProgram) and len(program._steps) == 1


def test_nothing_of_the_model_changes() -> None:
    stock = Residual()
    state = {k: v.clone() for k, v in stock.state_dict().items()}
    optimizer = torch.optim.SGD(stock.parameters(), 0.1)
    stock.norm1.requires_grad_(False)
    mine = fr.fuse(stock)
    assert mine is not stock and type(mine) is Residual and fr.fuse(stock, inplace=True) is stock
    assert list(mine.state_dict()) == list(state)
    for a, b in zip(mine.parameters(), stock.parameters(), strict=True):
        assert a is b
    for a, b in zip(mine.buffers(), stock.buffers(), strict=True):
        assert a is b
    assert [n for n, _ in mine.named_modules()] == [n for n, _ in stock.named_modules()]
    x = torch.randn(2, 16, 8, 8)
    mine(x).sum().backward()
    assert mine.norm1.weight.grad is None
    before = mine.eval()(x)
    optimizer.step()
    assert not torch.equal(mine(x), before)


def test_twice_and_back() -> None:
    stock = calibrated(Residual())
    mine = fr.fuse(stock)
    region = mine.__dict__["_fused_resnet_region"]
    assert fr.fuse(mine, inplace=True).__dict__["_fused_resnet_region"] is region
    x = torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        assert not torch.equal(mine(x), stock(x))  # another order of summation
        assert torch.equal(fr.unfuse(mine)(x), stock(x))
    assert mine.__dict__.keys() == stock.__dict__.keys()


def test_nothing_to_fuse() -> None:
    with pytest.warns(UserWarning, match="holds nothing to fuse"):
        model = fr.fuse(nn.Sequential(nn.Linear(2, 2)))
    assert model(torch.ones(1, 2)).shape == (1, 2)
    for function in (fr.fuse, fr.unfuse):
        with pytest.raises(TypeError, match=r"must be an nn\.Module, got int"):
            function(3)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_are_fused(way: str) -> None:
    mine = fr.fuse(calibrated(Residual()))
    x = torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        want = mine(x)
    if way == "deepcopy":
        other = copy.deepcopy(mine)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(mine))
    else:
        file = io.BytesIO()
        torch.save(mine, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(other(x), want) and programs(other)
        other.first.weight.mul_(2)
        assert not torch.equal(other(x), want) and torch.equal(mine(x), want)


def test_another_module_with_the_same_dict_is_not_fused() -> None:
    """As DataParallel's replicas are made."""
    mine = fr.fuse(calibrated(Residual()))
    replica = mine.__new__(type(mine))
    replica.__dict__ = mine.__dict__.copy()
    replica._modules = dict(mine._modules, first=conv(16, 16))
    x = torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        assert torch.equal(replica(x), replica.forward(x))
        assert not torch.allclose(replica(x), mine(x))


CHANGES: dict[str, Any] = {
    "in place": lambda m: m.first.weight.mul_(2),
    "data": lambda m: m.first.weight.data.mul_(2),
    "load_state_dict": lambda m: m.load_state_dict(calibrated(Residual(), 1).state_dict()),
    "assign": lambda m: m.load_state_dict(calibrated(Residual(), 1).state_dict(), assign=True),
    "statistics": lambda m: m.norm2.running_mean.add_(1),
    "eps": lambda m: setattr(m.norm1, "eps", 0.5),
    "replaced": lambda m: setattr(m, "second", conv(16, 16)),
    "another activation": lambda m: setattr(m, "norm1", nn.Identity()),
    "forward": lambda m: setattr(m.norm1, "forward", lambda x: x * 2),
    "hook": lambda m: m.second.register_forward_hook(lambda module, inputs, y: y * 2),
    "pruned": lambda m: prune.l1_unstructured(m.first, "weight", 0.5),
    "weight norm": lambda m: parametrizations.weight_norm(m.first),
    "training": lambda m: m.norm1.train(),
    "converted": lambda m: m.double().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str) -> None:
    stock = calibrated(Residual())
    mine, x = fr.fuse(copy.deepcopy(stock)), torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        mine(x)
        for model in (mine, stock):
            torch.manual_seed(2)
            CHANGES[change](model)
        outputs_agree(mine(x), stock(x))


def test_hooks_run() -> None:
    mine, seen = fr.fuse(calibrated(nn.Sequential(Residual(), Residual()))), []
    for m in (mine, mine[0], mine[1].second):
        m.register_forward_hook(lambda module, *_: seen.append(module))
    with torch.no_grad():
        mine(torch.randn(1, 16, 8, 8))
    assert seen == [mine[0], mine[1].second, mine]


def test_hooks_on_an_activation() -> None:
    stock = calibrated(sequential())
    mine, x = fr.fuse(copy.deepcopy(stock)), torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        mine(x)
        for model in (mine, stock):
            model[2].register_forward_hook(lambda module, inputs, y: y + 1)
        outputs_agree(mine(x), stock(x))


class _Other(enum.IntEnum):
    """An activation that no kernel of this package computes."""

    SILU = 2

    def __call__(self, v: Tensor) -> Tensor:
        return nn.functional.silu(v)


class _Silus(nn.Module):
    """One after a convolution, a norm, an addition, and a norm and an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm1, self.norm2 = conv(16, 16), nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.norm3, self.act = nn.BatchNorm2d(16), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv(x)))
        z = self.act(self.norm2(y * 2))
        z = self.act(self.norm3(z * 2) + y)
        return self.act(z + x)


@pytest.mark.parametrize("mode", ["inference", "frozen", "training"])
def test_activations_that_kernels_lack(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(activation.OF_MODULE, nn.SiLU, _Other.SILU)
    stock = calibrated(_Silus()).train(mode == "training")
    mine, x = fr.fuse(copy.deepcopy(stock)), torch.randn(2, 16, 8, 8)
    with torch.set_grad_enabled(mode != "inference"):
        y, want = mine(x), stock(x)
    agree(y, want)
    assert [region.refused for *_, region in regions_of(mine)] == [None]
    if mode != "inference":
        for result in (y, want):
            result.square().sum().backward()
        for a, b in zip(mine.parameters(), stock.parameters(), strict=True):
            agree(a.grad, b.grad)


def test_threads() -> None:
    """While one thread traces, others run modules; several make a model's first call at once."""
    stock = calibrated(nn.Sequential(*(Residual() for _ in range(6))))
    x, errors = torch.randn(1, 16, 8, 8), []
    with torch.no_grad():
        want = stock(x)

    def infer(model: nn.Module) -> None:
        try:
            with torch.no_grad():
                for _ in range(5):
                    outputs_agree(model(x), want)
        except BaseException as error:
            errors.append(error)

    for _ in range(4):
        mine = fr.fuse(copy.deepcopy(stock))
        threads = [threading.Thread(target=infer, args=(m,)) for m in (mine, stock, mine, stock)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_stock_and_fused_of_one_class_side_by_side() -> None:
    stock, x = calibrated(Residual()), torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        before = stock(x)
        fr.fuse(stock)(x)
        assert torch.equal(stock(x), before)


@pytest.mark.filterwarnings("ignore")
def test_tools() -> None:
    """torch.func, torch.jit, torch.export and torch.fx."""
    stock = calibrated(nn.Sequential(Residual(), Residual()))
    mine, x = fr.fuse(copy.deepcopy(stock)), torch.randn(3, 16, 8, 8)
    with torch.no_grad():
        want = stock(x)
        doubled = {k: v * 2 for k, v in mine.named_parameters()}
        agree(
            torch.func.functional_call(mine, doubled, (x,)),
            torch.func.functional_call(stock, doubled, (x,)),
        )
        agree(mine(x), want)
        for graph in (
            torch.jit.trace(mine, x), torch.jit.script(mine), torch.fx.symbolic_trace(mine),
            torch.export.export(mine, (x,)).module(),
        ):  # fmt: skip
            agree(graph(x), want)

    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(mine, parameters, (one[None],)).square().sum()

    parameters = dict(mine.named_parameters())
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    first = torch.func.grad(loss)(parameters, x[0])
    for key, value in first.items():
        torch.testing.assert_close(each[key][0], value, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["second", "norm1"])
def test_scripted_part(part: str) -> None:
    """A scripted module keeps its tensors in C++; the fused copy has the same ones."""
    stock, x = calibrated(Residual()), torch.randn(2, 16, 8, 8)
    setattr(stock, part, torch.jit.script(getattr(stock, part)))
    mine = fr.fuse(stock)
    for training in (False, True):
        outputs_agree(mine.train(training)(x), stock.train(training)(x))
    mine(x).sum().backward()
    for (name, p), q in zip(mine.named_parameters(), stock.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None, name
    with torch.no_grad():
        for p in stock.parameters():
            p.mul_(1.5)
        outputs_agree(mine(x), stock(x))


def test_graph_with_an_unused_module() -> None:
    """The copy of a GraphModule leaves out what its graph does not call."""
    graph = torch.fx.symbolic_trace(calibrated(Residual()))
    graph.add_module("unused", nn.Linear(2, 2))
    mine, x = fr.fuse(graph), torch.randn(2, 16, 8, 8)
    outputs_agree(mine(x), graph(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_weight_that_a_hook_computes() -> None:
    stock, x = calibrated(Residual()), torch.randn(2, 16, 8, 8)
    nn.utils.weight_norm(stock.second)
    mine = fr.fuse(stock)
    outputs_agree(mine(x), stock(x))
    with torch.no_grad():
        stock.second.weight_g.mul_(2)
    outputs_agree(mine(x), stock(x))
    mine(x).sum().backward()
    assert stock.second.weight_g.grad is not None


def test_compiled() -> None:
    stock = calibrated(Residual())
    mine, x = fr.fuse(copy.deepcopy(stock)), torch.randn(2, 16, 8, 8)
    compiled = torch.compile(mine, backend="eager", fullgraph=True)
    with torch.no_grad():
        agree(compiled(x), stock(x))


UNREACHED = "this call does not reach it"


@pytest.mark.parametrize("name", ["residual", "data-dependent", "keywords", "folded", "in place"])
@pytest.mark.parametrize("training", [False, True])
def test_explain_accounts_for_every_convolution(name: str, training: bool) -> None:
    mine = fr.fuse(calibrated(MODELS[name]()).train(training))
    x = torch.randn(2, 16, 8, 8)
    mine(x)
    found = fr.explain(mine, x)
    assert sum(e.share or 0 for e in found) == pytest.approx(1)
    assert all(e.fused or e.reason for e in found)
    if name == "residual":
        assert [(e.name, e.fused) for e in found] == [("", True)]
    listed = [e.name for e in fr.explain(mine)]
    if name == "data-dependent":  # one of its parts is not called with this x
        assert {e.reason for e in found if e.name.startswith("inner")} == {UNREACHED}
        assert listed == ["inner", "first", "second"]
    else:
        assert listed == [e.name for e in found]


def test_refresh_and_memory() -> None:
    mine, x = fr.fuse(calibrated(nn.Sequential(Residual()))), torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        mine(x)
    (before,) = programs(mine)
    fr.refresh(mine[0])
    with torch.no_grad():
        mine(x)
    (after,) = programs(mine)
    assert after is not before
    mine.train()(x)
    assert not any(isinstance(p, InferenceProgram) for p in programs(mine))
