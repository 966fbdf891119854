"""Differences between a fused model and stock that testers found."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.kernels import native
from tests.fusion.regions.pairs import images, pair, same

pytestmark = [
    pytest.mark.skipif(native.load() is not None, reason="no native kernels"),
    pytest.mark.refused,
]


def iadd_on_input(m, x):
    x += 1
    return F.relu(m.u1(x))


def test_augmented_assignment_writes_the_input() -> None:
    seen = []
    for m in pair(iadd_on_input):
        x = images()
        with torch.no_grad():
            m(x)
        seen.append(x)
    same(*seen)


def iadd_alias(m, x):
    y = F.relu(m.u1(x))
    first = y
    y += m.u2(x)
    return first


def clamped(m, x):
    y = F.relu(m.u1(x))
    y.clamp_(max=0.1)
    return y


def slice_written(m, x):
    y = F.relu(m.u1(x))
    y[:, :4].mul_(2)
    return y


def view_written(m, x):
    y = F.relu(m.u1(x))
    y.view(2, -1).mul_(2)
    return y


def converted_written(m, x):
    y = F.relu(m.u1(x))
    y.to(torch.float32).mul_(2)
    return y


def write_between(m, x):
    x = torch.cat([x])
    y = m.c1(x)
    z = m.relu(x)
    return F.relu(m.n1(y)) + z


class Halving(nn.Module):
    """torch.fx cannot trace it."""

    def forward(self, x):
        if x.sum() > -1e9:
            x.mul_(0.5)
        return x


def untraced_write(m, x):
    y = F.relu(m.u1(x))
    m.extra(y)
    return y


WRITES = [iadd_alias, clamped, slice_written, view_written, converted_written, write_between]


@pytest.mark.parametrize("body", WRITES)
def test_writes(body) -> None:
    with torch.no_grad():
        same(*(m(images()) for m in pair(body)))


def test_write_before_a_fused_part_s_end_in_training() -> None:
    with torch.no_grad():
        same(*(m(images()) for m in pair(write_between, True)))


def test_write_in_an_untraced_module() -> None:
    with torch.no_grad():
        same(*(m(images()) for m in pair(untraced_write, extra=Halving())))


@pytest.mark.parametrize("training", [False, True])
def test_iadd_keeps_the_dtype(training: bool) -> None:
    def body(m, x, r):
        y = m.u1(x)
        y += r
        return F.relu(y)

    fused, stock = (m(images(), images(1).double()) for m in pair(body, training))
    assert fused.dtype == stock.dtype


# --- results ---


def test_one_tensor_returned_twice() -> None:
    def body(m, x):
        y = F.relu(m.u1(x))
        return y, y

    with torch.no_grad():
        for m in reversed(pair(body)):
            a, b = m(images())
            assert a is b


def test_gradient_with_respect_to_a_returned_feature() -> None:
    def body(m, x):
        y = F.relu(m.u1(x))
        return y, m.u2(y)

    found = []
    for m in reversed(pair(body, True)):
        feature, y = m(images())
        found.append(torch.autograd.grad(y.square().mean(), feature)[0])
    same(*found)


class Named(list):
    pass


@dataclasses.dataclass
class Result:
    y: Any
    calls: int = 0


@dataclasses.dataclass
class Counted(Result):
    def __post_init__(self):
        self.calls += 1


def list_subclass(m, x):
    return Named([F.relu(m.u1(x))])


def late_attribute(m, x):
    found = Result(F.relu(m.u1(x)))
    found.extra = found.y * 2
    return found


def counted(m, x):
    found = Counted(F.relu(m.u1(x)))
    found.calls = 7
    return found


@pytest.mark.parametrize("body", [list_subclass, late_attribute, counted])
def test_result_objects(body) -> None:
    with torch.no_grad():
        fused, stock = (m(images()) for m in pair(body))
    assert type(fused) is type(stock)
    if isinstance(stock, Result):
        assert vars(fused).keys() == vars(stock).keys()
        assert fused.calls == stock.calls


# --- raises where stock works ---


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 4), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("training", [False, True])
def test_addition_and_relu_of_any_rank(shape, training: bool) -> None:
    def body(m, x, a, b):
        return m.u1(x).mean(), F.relu(a + b)

    a, b = torch.randn(shape), torch.randn(shape)
    same(*(m(images(), a, b)[1] for m in pair(body, training)))


def test_addition_and_relu_of_integers() -> None:
    def body(m, x, a):
        return m.u1(x).mean(), F.relu(a + a.flip(0))

    a = torch.arange(-8, 8, dtype=torch.int32).view(2, 2, 2, 2)
    with torch.no_grad():
        same(*(m(images(), a)[1] for m in pair(body)))


def test_unit_broadcast_to_its_residual_in_training() -> None:
    def body(m, x):
        return F.relu(m.u1(x[:1]) + x)

    same(*(m(images()) for m in reversed(pair(body, True))))


def channels_last_inside(m, x):
    x = x.contiguous(memory_format=torch.channels_last)
    return F.relu(m.u1(x)).permute(0, 2, 3, 1).view(-1, 16)


def nhwc(m, x):
    y = m.u1(x.view(2, 8, 8, 16).permute(0, 3, 1, 2))
    return F.relu(y).permute(0, 2, 3, 1).view(-1, 16)


@pytest.mark.parametrize("body", [channels_last_inside, nhwc])
@pytest.mark.parametrize("training", [False, True])
def test_views_of_channels_last(body, training: bool) -> None:
    with torch.no_grad():
        same(*(m(images()) for m in reversed(pair(body, training))))


@pytest.mark.parametrize("training", [False, True])
def test_layout_of_the_weights(training: bool) -> None:
    fused, stock = (
        m.to(memory_format=torch.channels_last)(images())
        for m in pair(lambda m, x: F.relu(m.u1(x)), training)
    )
    assert fused.stride() == stock.stride()


def test_layout_of_the_second_input() -> None:
    x = images().to(memory_format=torch.channels_last)
    with torch.no_grad():
        fused, stock = (m(images(), x) for m in pair(lambda m, a, x: F.relu(m.u1(x))))
    assert fused.stride() == stock.stride()


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.LazyConv2d(8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


def test_lazy_modules() -> None:
    model = fr.fuse(Lazy())
    assert model(images()).shape == (2, 8, 6, 6)


# --- gradients ---


def test_residual_that_alone_requires_a_gradient() -> None:
    grads = []
    for m in pair(lambda m, x: F.relu(m.u1(x) + m.prompt)):
        m.requires_grad_(False)
        m.prompt = torch.full((2, 16, 8, 8), 0.5, requires_grad=True)  # a plain attribute
        y = m(images())
        assert y.requires_grad
        grads.append(torch.autograd.grad(y.sum(), m.prompt)[0])
    same(*grads)


# --- running statistics ---


def shared_norm(m, x):
    a = m.n1(m.c1(x))
    b = F.relu(m.n1(m.c2(3 * x + 1)))
    return F.relu(a + b)


def statistics_read(m, x):
    y = m.u1(x)
    mean = m.n1.running_mean.clone()
    return F.relu(y) + mean.view(1, -1, 1, 1)


def shared_norm_without_convolution(m, x):
    a = m.n1(x)
    b = F.relu(m.n1(2 * x))
    return F.relu(a + b) + m.c1(x)


@pytest.mark.parametrize("body", [shared_norm, statistics_read, shared_norm_without_convolution])
def test_order_of_statistics(body) -> None:
    models = pair(body, True)
    same(*(m(images()) for m in models))
    same(*(dict(m.named_buffers()) for m in models))


# --- what a proxy answers differently from a tensor ---


def tracing(m, x):
    y = F.relu(m.u1(x))
    return y if torch.fx._symbolic_trace.is_fx_tracing() else y * 2


def is_tensor(m, x):
    y = F.relu(m.u1(x))
    return y if isinstance(x, Tensor) else y * 2


def has_attribute(m, x):
    y = F.relu(m.u1(x))
    return y * 2 if hasattr(x, "tensors") else y


def by_dtype(m, x):
    return F.relu(m.u1(x)) * {torch.float32: 2.0}.get(x.dtype, 5.0)


def by_channels(m, x):
    y = F.relu(m.u1(x))
    return y if x.shape[1] in {16, 32} else y * 2


def swallowed(m, x):
    y = F.relu(m.u1(x))
    try:
        return y * float(x.max())
    except TypeError:
        return y * 0


def by_type(m, x):
    y = F.relu(m.u1(x))
    return y if type(x).__name__ == "Tensor" else y * 2


def numpy_product(m, x):
    return F.relu(m.u1(x)) / pytest.importorskip("numpy").prod(x.shape[2:])


def copied(m, x):
    return F.relu(m.u1(copy.deepcopy(x)))


ASKED = [
    is_tensor, has_attribute, by_dtype, by_channels, swallowed, by_type, numpy_product, copied,
    tracing,
]  # fmt: skip


@pytest.mark.parametrize("body", ASKED)
def test_what_a_forward_asks_of_a_tensor(body) -> None:
    with torch.no_grad():
        same(*(m(images()) for m in pair(body)))


def test_identity_of_two_inputs() -> None:
    def body(m, a, b):
        y = F.relu(m.u1(a))
        return y * 2 if a is b else y + b

    x = images()
    with torch.no_grad():
        same(*(m(x, x) for m in pair(body)))


def test_shape_in_a_text() -> None:
    with torch.no_grad():
        texts = [m(images())[1] for m in pair(lambda m, x: (F.relu(m.u1(x)), f"{x.shape}"))]
    assert texts[0] == texts[1]


# --- constants among the arguments ---


@pytest.mark.parametrize("first, second", [(2, 2.0), (1, True), (0.0, -0.0)])
def test_equal_constants_of_other_types(first, second) -> None:
    def body(m, x, c):
        y = F.relu(m.u1(x)) + 1
        return y if type(c) is int else y * 2, y / c, c

    found = []
    for m in pair(body):
        with torch.no_grad():
            m(images(), first)
            found.append(m(images(), second))
    same(found[0][:2], found[1][:2])
    assert type(found[0][2]) is type(found[1][2])


# --- stale after a change, and effects that happen once ---
