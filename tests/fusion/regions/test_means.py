"""Means over an image's pixels in fused models, as in squeeze-and-excitation: values, and which run
by the op."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import tolerance
from fused_resnet.kernels import native
from tests.fusion.regions.region_helpers import calibrated

pytestmark = pytest.mark.skipif(native.load() is not None, reason="no native kernels")
OP = "fused_resnet_native::mean_pixels"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Excited(nn.Module):
    """x * sigmoid(conv(mean(x))) after a convolution, with a mean written in one of many ways."""

    def __init__(self, mean: Any) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 48, 3, bias=False), nn.BatchNorm2d(48)
        self.gate = nn.Conv2d(48, 48, 1)
        if isinstance(mean, nn.Module):
            self.pool = mean
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        m = self.mean(x)
        return x * self.gate(m.view(m.shape[0], 48, 1, 1)).sigmoid()


SERVED = {
    "module": nn.AdaptiveAvgPool2d(1),
    "function": lambda x: nn.functional.adaptive_avg_pool2d(x, (1, 1)),
    "method": lambda x: x.mean((2, 3)),
    "from the end": lambda x: x.mean([-1, -2], keepdim=True),
    "torch.mean": lambda x: torch.mean(x, dim=(2, 3)),
}
# Of other values, or of a result that the op does not make.
LEFT = {
    "one dimension": lambda x: x.mean(2, keepdim=True).mean(3),
    "wider": lambda x: x.mean((2, 3), dtype=torch.float32).to(x.dtype),
    "channels": lambda x: x.mean((1, 2), keepdim=True)[..., :1].repeat(1, 48, 1, 1),
}  # fmt: skip


def served(call: Any, *args: Any) -> int:
    with torch.profiler.profile() as found:
        call(*args)
    return sum(event.name == OP for event in found.events())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*SERVED, *LEFT])
def test_values(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = calibrated(Excited((SERVED | LEFT)[name]))
    x = torch.randn(2, 3, 40, 31).to(dtype)
    stock = copy.deepcopy(model).to(dtype)
    exact = copy.deepcopy(stock).double()(x.double())
    mine = fr.fuse(copy.deepcopy(stock))
    with torch.no_grad():
        tolerance.assert_close(mine(x), stock(x), exact)
        assert served(mine, x) == (name in SERVED and dtype != torch.float32)
        assert mine(x).stride() == stock(x).stride()


@pytest.mark.parametrize("why", ["gradients", "autocast", "hook", "training"])
def test_who_else_computes_it(why: str) -> None:
    """Autograd, autocast and hooks have a part in it: PyTorch runs."""
    torch.manual_seed(0)
    dtype = torch.float32 if why == "autocast" else torch.bfloat16
    x, seen = torch.randn(2, 3, 14, 13).to(dtype), []
    stock = calibrated(Excited(nn.AdaptiveAvgPool2d(1))).to(dtype)
    mine = fr.fuse(copy.deepcopy(stock))
    if why == "hook":
        for model in (stock, mine):
            model.pool.register_forward_hook(lambda m, args, y: seen.append(y) or y * 2)
    if why == "training":
        stock.train(), mine.train()
    with (
        torch.set_grad_enabled(why in ("gradients", "training")),
        torch.autocast("cpu", enabled=why == "autocast"),
    ):
        assert served(mine, x) == 0
        torch.testing.assert_close(mine(x), stock(x), rtol=0.02, atol=0.02)
    assert (len(seen) > 0) == (why == "hook")
