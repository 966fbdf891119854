"""`fuse` and forwards that do more than a graph of operations holds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.kernels import native
from tests.fusion.regions.region_helpers import (
    Residual,
    calibrated,
    outputs_agree,
    programs,
)
from tests.models.model_helpers import agree

pytestmark = pytest.mark.skipif(native.load() is not None, reason="no native kernels")


class Switched(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.steps, self.seen = 2.0, [self.first], 0

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return F.relu(self.norm1(x)) * self.scale


def test_attributes_are_read_anew() -> None:
    stock = calibrated(Switched())
    mine, x = fr.fuse(copy.deepcopy(stock)), torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        mine(x)
        for model in (mine, stock):
            model.scale = 3.0
        outputs_agree(mine(x), stock(x))
        for model in (mine, stock):
            model.steps.append(model.second)
        outputs_agree(mine(x), stock(x))


class Counting(Residual):
    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.last = x
        return super().forward(x)


class Noisy(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(torch.rand(()))


@pytest.mark.parametrize("cls", [Counting, Noisy])
def test_forwards_with_side_effects_run_each_time(cls: type[Residual]) -> None:
    stock = calibrated(cls())
    mine, x = fr.fuse(copy.deepcopy(stock)), torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        for _ in range(3):
            torch.manual_seed(0)
            y = mine(x)
            torch.manual_seed(0)
            outputs_agree(y, stock(x))
    if cls is Counting:
        assert mine.seen == stock.seen == 3 and mine.last is x


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return -3 * dy


class Reversed(Residual):
    """Domain adaptation's reversed gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Reverse.apply(x))


class Frozen(Residual):
    """Features without gradients, and a part outside of autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = F.relu(self.norm1(self.first(x)))
        with torch.autocast("cpu", enabled=False):
            return self.norm2(self.second(y.float())) + x.float()


class Checkpointed(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False) * 1


class Modal(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if torch.is_grad_enabled() else 3.0)


@pytest.mark.parametrize("cls", [Reversed, Frozen, Checkpointed, Modal])
@pytest.mark.parametrize("autocast", [False, True])
def test_what_a_graph_cannot_hold(cls: type[Residual], autocast: bool) -> None:
    stock = calibrated(nn.Sequential(Residual(), cls(), Residual())).train()
    mine, x = fr.fuse(copy.deepcopy(stock)), torch.randn(4, 16, 8, 8)
    found = []
    for model in (mine, stock):
        inner = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(inner)
        y.square().mean().backward()
        found.append((y.dtype, inner.grad, [p.grad for p in model.parameters()]))
        with torch.no_grad():
            found[-1] += (model(x),)
    assert found[0][0] == found[1][0]
    close = {"rtol": 0.1, "atol": 0.02} if autocast else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(found[0][1], found[1][1], **close)
    torch.testing.assert_close(found[0][3], found[1][3], **close)
    for a, b in zip(found[0][2], found[1][2], strict=True):
        assert (a is None) == (b is None)


class Asks(Residual):
    """Takes another branch for a value of a graph than for a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if torch.is_tensor(x) else super().forward(x)


@pytest.mark.refused
def test_the_first_call_is_compared() -> None:
    stock = calibrated(Asks())
    mine, x = fr.fuse(copy.deepcopy(stock)), torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        for _ in range(2):
            outputs_agree(mine(x), stock(x))
    names = {e.name: e for e in fr.explain(mine)}
    assert names["inner"].fused and "other values" in names["first"].reason


def test_a_class_s_forward_is_replaced(monkeypatch) -> None:
    stock = calibrated(nn.Sequential(Residual()))
    mine, x = fr.fuse(copy.deepcopy(stock)), torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        mine(x)
        monkeypatch.setattr(Residual, "forward", lambda self, x: self.first(x))
        outputs_agree(mine(x), stock(x))


class Rectified(Residual):
    """The second branch writes to what the first reads."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        skip = self.norm1(y)
        z = y.relu_()
        return F.relu(skip) + self.norm2(self.second(z))


def test_an_input_is_written_before_its_part_runs() -> None:
    """The parts around it stay fused: the comparison of the first call has nothing to find."""
    stock = calibrated(nn.Sequential(Residual(), Rectified(), Residual()))
    mine, x = fr.fuse(copy.deepcopy(stock)), torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        outputs_agree(mine(x), stock(x))
    assert len(programs(mine)) == 1 and mine.__dict__["_fused_resnet_region"].refused is None
    assert {e.name for e in fr.explain(mine) if e.fused} >= {"0", "2"}


class OneUnit(nn.Module):
    """A convolution whose input is added to its output."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + x if self.norm is None else torch.relu(self.norm(y) + x)


@pytest.mark.parametrize("provider", ["native", "vendor"])
@pytest.mark.parametrize("norm", [False, True])
def test_a_convolution_of_its_own_residual(norm: bool, provider: str) -> None:
    """Its input must stay as it is until all pixels have read it, whoever owns it: a copy in
    another layout, or an output of the convolution before."""
    with fr.use_backend(provider):
        for first in (nn.Identity(), nn.Conv2d(32, 32, 1)):
            stock = calibrated(nn.Sequential(first, OneUnit(norm)))
            mine, x = fr.fuse(stock), torch.randn(3, 32, 17, 16)
            for call in (mine, fr.export(stock, (x,)).module() if provider == "native" else mine):
                with torch.no_grad():
                    for _ in range(2):
                        agree(call(x), stock(x), 1e-5)
