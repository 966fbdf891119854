"""Changes after the first call of a fused model, and effects of every call."""

from __future__ import annotations

import copy
import random
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.fusion.call import call_reason
from fused_resnet.kernels import native
from tests.fusion.regions.pairs import Pairs, images, pair, same

pytestmark = pytest.mark.skipif(native.load() is not None, reason="no native kernels")

SETTING = {"scale": 1.0}


def scaled(scale: Any) -> Any:
    return lambda m, x: F.relu(m.u1(x)) * scale(m)


def set_class(m: Any, value: Any) -> None:
    type(m).flag = value


def set_global(m: Any, value: Any) -> None:
    SETTING["scale"] = value


CHANGES: dict[str, Any] = {
    "new attribute": (lambda m: getattr(m, "own", 1.0), lambda m: setattr(m, "own", 3.0)),
    "class attribute": (lambda m: 3.0 if m.flag else 1.0, lambda m: set_class(m, True)),
    "global": (lambda m: SETTING["scale"], lambda m: set_global(m, 3.0)),
    "object": (lambda m: m.config.scale, lambda m: setattr(m.config, "scale", 3.0)),
    "dict": (lambda m: m.options["scale"], lambda m: m.options.update(scale=3.0)),
    "array": (lambda m: float(m.array[0]), lambda m: m.array.__setitem__(0, 3.0)),
    "leaf's attribute": (lambda m: 1 + m.extra.p, lambda m: setattr(m.extra, "p", 0.5)),
    "leaf's mode": (lambda m: 1.0 + m.extra.training, lambda m: m.extra.train()),
    "default dtype": (
        lambda m: 1.0 if torch.get_default_dtype() == torch.float32 else 3.0,
        lambda m: torch.set_default_dtype(torch.float64),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str) -> None:
    scale, make = CHANGES[change]
    numpy = pytest.importorskip("numpy")
    found = []
    for m in pair(
        scaled(scale),
        config=types.SimpleNamespace(scale=1.0), options={"scale": 1.0}, array=numpy.ones(1),
    ):  # fmt: skip
        x = images()
        try:
            with torch.no_grad():
                m(x)
                make(m)
                found.append(m(x))
        finally:
            set_class(m, False)
            set_global(m, 1.0)
            torch.set_default_dtype(torch.float32)
    same(*found)


class Base(Pairs):
    def head(self, x):
        return x

    def forward(self, x):
        return self.head(F.relu(self.u1(x)))


class Derived(Base):
    def forward(self, x):
        return super().forward(x) * 2


def base_forward(m, patch) -> None:
    patch.setattr(Base, "forward", lambda self, x: F.relu(self.u2(x)))


def helper(m, patch) -> None:
    patch.setattr(Base, "head", lambda self, x: x * 3)


def own_helper(m, patch) -> None:
    patch.setitem(m.__dict__, "head", lambda x: x * 3)


@pytest.mark.parametrize("change", [base_forward, helper, own_helper])
def test_replaced_methods_are_seen(change) -> None:
    stock, found = Derived(None).eval(), []
    for m in (fr.fuse(copy.deepcopy(stock)), stock):
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            m(images())
            change(m, patch)
            found.append(m(images()))
    same(*found)


def count(m, x):
    m.config.n += 1
    return F.relu(m.u1(x)) * m.config.n


def draw(m, x):
    return F.relu(m.u1(x)) * m.generator.random()


def draw_torch(m, x):
    return F.relu(m.u1(x)) * float(torch.rand((), generator=m.source))


def seeded(m, x):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noise = torch.rand_like(x)
    return F.relu(m.u1(x + noise))


def keep(m, x):
    m.store["features"].append(F.relu(m.u1(x)))
    return m.store["features"][-1] * len(m.store["features"])


@pytest.mark.parametrize("body", [count, draw, draw_torch, seeded, keep])
def test_effects_of_every_call(body) -> None:
    found = []
    for m in pair(body):
        m.config, m.generator = types.SimpleNamespace(n=0), random.Random(0)
        m.source, m.store = torch.Generator().manual_seed(0), {"features": []}
        with torch.no_grad():
            found.append([m(images()) for _ in range(3)])
        assert all(isinstance(y, Tensor) for y in m.store["features"])
    same(*found)


def test_changed_arguments() -> None:
    def body(m, given):
        given["features"] = F.relu(m.u1(given["x"]))
        return given

    for m in reversed(pair(body)):
        given = {"x": images()}
        with torch.no_grad():
            assert m(given) is given
        assert set(given) == {"x", "features"}


@pytest.mark.refused
def test_call_impl_of_the_class() -> None:
    class Doubled(Pairs):
        def _call_impl(self, *args):
            return super()._call_impl(*args) * 2

    stock = Doubled(lambda m, x: F.relu(m.u1(x))).eval()
    with torch.no_grad():
        same(fr.fuse(copy.deepcopy(stock))(images()), stock(images()))


def test_a_frozen_norm_s_class_first_seen_in_a_trace() -> None:
    """torch.fx replaces nn.Module.__call__ while it traces: what is noted of the class then is not
    that, or nothing would be fused in this process any more."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)

    forward.__qualname__ = "FrozenBatchNorm2d.forward"
    members = {"__module__": "models.backbone", "forward": forward}
    found = []
    for m in pair(lambda m, x: F.relu(m.u1(x))):
        norm: Any = type("FrozenBatchNorm2d", (nn.Module,), members)()
        for name, t in (*m.n1.named_parameters(), *m.n1.named_buffers()):
            norm.register_buffer(name, t.detach().clone())
        m.n1 = norm
        with torch.no_grad():
            found.append(m(images()))
        assert call_reason(images()) is None
    same(*found)


def by_methods(m, x):
    return m.u1(x).add(x).relu()


def by_methods_in_place(m, x):
    return m.u1(x).add_(x).relu_()


def idle(m, x):
    return F.relu(m.u1(m.extra(x)))


REPLACED = {
    "dropout": (idle, nn.Dropout, "forward"),
    "add": (by_methods, Tensor, "add"),
    "relu": (by_methods, Tensor, "relu"),
    "add_": (by_methods_in_place, Tensor, "add_"),
    "relu_": (by_methods_in_place, Tensor, "relu_"),
}


@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.parametrize("training", [False, True])
def test_methods_replaced_for_the_whole_process(name, training, monkeypatch) -> None:
    """As dropout is, to sample from a model in eval mode."""
    body, owner, method = REPLACED[name]
    models = pair(body, training, extra=nn.Dropout(0.5).eval())
    models[0].extra.eval(), models[1].extra.eval()
    same(*(m(images()) for m in models))
    before = getattr(owner, method)
    monkeypatch.setattr(owner, method, lambda *args: before(*args) * 0.5)
    same(*(m(images()) for m in models))


def test_compiled_in_place_and_called_by_keyword() -> None:
    found = []
    for m in pair(lambda m, x, scale=1.0: F.relu(m.u1(x)) * scale):
        with torch.no_grad():
            x = images()
            found.append([m(x), m(x=x), m(x, scale=2.0), m(scale=3, x=x)])
            m.compile(backend="eager")
            found[-1].append(m(x))
    same(*found)


class Through(nn.Module):
    """Calls the modules of another module, not that module: encoders of U-Nets do so."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Pairs(None)
        self.encoder.gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        e = self.encoder
        return F.relu(e.n2(e.c2(F.relu(e.n1(e.c1(x)))))) * e.gain


def other_conv(e) -> None:
    torch.manual_seed(3)
    e.c1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)


def other_norm(e) -> None:
    e.n2 = nn.InstanceNorm2d(16)


def other_gain(e) -> None:
    e.gain = 3.0


@pytest.mark.parametrize("change", [other_conv, other_norm, other_gain])
@pytest.mark.parametrize("training", [False, True])
def test_changes_in_a_module_that_is_not_called(change, training: bool) -> None:
    stock, found = Through().train(training), []
    for m in (fr.fuse(copy.deepcopy(stock)), stock):
        m(images())
        change(m.encoder)
        found.append(m(images()))
    same(*found)
