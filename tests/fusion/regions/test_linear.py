"""Linear layers of fused models: values, and which calls oneDNN serves."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fused_resnet as fr
from fused_resnet.fusion.regions import linear
from fused_resnet.kernels.cpu import onednn

pytestmark = pytest.mark.skipif(onednn.linear_reason() is not None, reason="no oneDNN")
# Float32 sums of 300 products, in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 3e-6}


class Model(nn.Module):
    """A convolution, so that there is something to fuse, and a linear layer."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 1), nn.Linear(300, 17, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.fixture
def served(monkeypatch) -> list[Tensor]:
    """The inputs of the calls that oneDNN computed. Small layers count as large ones."""
    seen: list[Tensor] = []

    def see(x: Tensor, *rest: Any, _run=onednn.linear) -> Tensor:
        seen.append(x)
        return _run(x, *rest)

    monkeypatch.setattr(onednn, "linear", see)
    monkeypatch.setattr(linear, "_FEWEST_PRODUCTS", 1)
    return seen


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    stock = Model(**options).eval()
    return stock, fr.fuse(stock)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(5, 300),
        lambda: torch.randn(1, 300),
        lambda: torch.randn(2, 3, 300),
        lambda: torch.randn(2, 3, 2, 300),
        lambda: torch.randn(300, 6).t(),
        lambda: torch.randn(4, 600)[:, ::2],
        lambda: torch.randn(3, 300, 4).transpose(1, 2),
    ],
    ids=["rows", "one", "3-D", "4-D", "transposed", "strided", "transposed 3-D"],
)
def test_values(make, bias, served):
    stock, mine = pair(bias=bias)
    x = make()
    with torch.no_grad():
        y, want = mine.linear(x), stock.linear(x)
    assert len(served) == 1
    assert y.shape == want.shape and y.dtype == want.dtype and y.stride() == want.stride()
    torch.testing.assert_close(y, want, **TOLERANCE)
    with torch.no_grad():
        assert torch.equal(mine(x), y)  # called by a module that is fused itself


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values(value, served):
    stock, mine = pair()
    x = torch.randn(4, 300)
    x[2, 7] = value
    with torch.no_grad():
        torch.testing.assert_close(mine.linear(x), stock.linear(x), **TOLERANCE, equal_nan=True)
    assert served


@pytest.mark.parametrize(
    "write",
    [
        lambda m: m.weight.data.mul_(2),
        lambda m: m.bias.detach().numpy().fill(3),
        lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach() * 2)),
        lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    ],
    ids=["data", "numpy", "parameter", "state_dict"],
)
def test_parameters_are_read_at_every_call(write, served):
    _, mine = pair()
    x = torch.randn(4, 300)
    with torch.no_grad():
        before = mine.linear(x)
        write(mine.linear)
        y = mine.linear(x)
    assert len(served) == 2 and not torch.equal(y, before)
    torch.testing.assert_close(y, F.linear(x, mine.linear.weight, mine.linear.bias), **TOLERANCE)


def doubled(m: nn.Module, inputs: Any, y: Tensor) -> Tensor:
    return y * 2


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CHANGES = {
    "float64": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "hook": lambda m: m.register_forward_hook(doubled),
    "forward": lambda m: setattr(m, "forward", lambda x: x[..., :17]),
    "subclass": lambda m: setattr(m, "__class__", Twice),
    "parametrized": lambda m: parametrizations.weight_norm(m),
    "plain weight": lambda m: m.__dict__.update(weight=m._parameters.pop("weight").detach()),
    "transposed weight": lambda m: setattr(
        m, "weight", nn.Parameter(m.weight.detach().t().contiguous().t())
    ),
    "training": lambda m: m.requires_grad_(),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_runs_as_it_is(change, served):
    stock, mine = pair()
    stock = copy.deepcopy(stock)
    for model in (stock, mine):
        CHANGES[change](model.linear)
    x = torch.randn(4, 300).to(next(mine.linear.parameters()).dtype)
    with torch.set_grad_enabled(change == "training"):
        y, want = mine.linear(x), stock.linear(x)
    assert not served and torch.equal(y, want) and y.requires_grad == want.requires_grad


CALLS = {
    "gradients": lambda m: m(torch.ones(4, 300, requires_grad=True)),
    "autocast": lambda m: _autocast(m),
    "keyword": lambda m: m(input=torch.ones(4, 300)),
    "vector": lambda m: m(torch.ones(300)),
    "empty": lambda m: m(torch.ones(0, 300)),
    "vmap": lambda m: torch.vmap(m)(torch.ones(3, 4, 300)),
    "reference": lambda m: _reference(m),
    "meta": lambda m: copy.deepcopy(m).to("meta")(torch.ones(4, 300, device="meta")).shape,
    "trace": lambda m: _traced(m),
    "no oneDNN": lambda m: _without_onednn(m),
}


def _autocast(m: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m(torch.ones(4, 300))


def _traced(m: nn.Module) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        x = torch.ones(4, 300)
        return torch.jit.trace(nn.Sequential(m), x, check_trace=False)(x)


def _reference(m: nn.Module) -> Tensor:
    with fr.use_backend("reference"):
        return m(torch.ones(4, 300))


def _without_onednn(m: nn.Module) -> Tensor:
    with torch.backends.mkldnn.flags(enabled=False):
        return m(torch.ones(4, 300))


@pytest.mark.parametrize("call", CALLS)
def test_other_calls_run_the_layer(call, served):
    stock, mine = pair()
    with torch.set_grad_enabled(call == "gradients"):
        y, want = CALLS[call](mine.linear), CALLS[call](stock.linear)
    assert not served
    assert y == want if call == "meta" else torch.equal(y, want) and y.dtype == want.dtype


def test_errors_are_those_of_the_layer(served):
    stock, mine = pair()
    for bad in (torch.ones(4, 299), [1.0], torch.ones(4, 300, dtype=torch.int64)):
        with torch.no_grad():
            with pytest.raises((RuntimeError, TypeError)) as wanted:
                stock.linear(bad)
            with pytest.raises(type(wanted.value)) as found:
                mine.linear(bad)
        assert str(found.value) == str(wanted.value)


def test_a_small_layer_runs_as_it_is(served, monkeypatch):
    monkeypatch.setattr(linear, "_FEWEST_PRODUCTS", 4 * 300 * 17)
    _, mine = pair()
    with torch.no_grad():
        mine.linear(torch.ones(3, 300))
        assert not served
        mine.linear(torch.ones(4, 300))
    assert len(served) == 1


def test_replaced_functions_are_called(served, monkeypatch):
    _, mine = pair()
    monkeypatch.setattr(F, "linear", lambda x, weight, bias: x)
    x = torch.randn(4, 300)
    with torch.no_grad():
        assert mine.linear(x) is x and not served


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stay_fused_and_their_own(make, served):
    _, mine = pair()
    other = make(mine)
    x = torch.randn(4, 300)
    with torch.no_grad():
        other.linear.weight.zero_()
        assert torch.equal(other.linear(x), other.linear.bias.expand(4, 17))
        assert not torch.equal(mine.linear(x), other.linear(x))
    assert len(served) == 3


def test_the_first_call_is_compared_with_the_layer(served):
    """A model's own call, with which a first fused one is compared, runs nothing fused."""

    class Pooled(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.conv(x).flatten(1))

    mine, x = fr.fuse(Pooled().eval()), torch.randn(4, 3, 15, 5)
    with torch.no_grad():
        mine(x)
    assert len(served) == 1


def test_fuse_and_unfuse(served):
    stock, mine = pair()
    x = torch.randn(4, 300)
    assert fr.fuse(mine, inplace=True) is mine
    fr.unfuse(mine)
    with torch.no_grad():
        assert torch.equal(mine.linear(x), stock.linear(x))
    with pytest.warns(UserWarning, match="holds nothing to fuse"):
        alone = fr.fuse(nn.Sequential(nn.Linear(300, 17)))
    with torch.no_grad():
        alone(x)
        stock.linear(x)  # of a model that is not fused, beside one that is
    assert not served


@pytest.mark.parametrize("which", ["weight", "x"])
def test_a_tensor_of_another_class_sees_the_linear_function_alone(which, served):
    seen: list[Any] = []

    class Logged(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    _, mine = pair()
    x = torch.randn(4, 300)
    if which == "x":
        x = x.as_subclass(Logged)
    else:
        mine.linear._parameters["weight"] = mine.linear.weight.detach().as_subclass(Logged)
    seen.clear()
    with torch.no_grad():
        mine.linear(x)
    assert seen == [F.linear] and not served
