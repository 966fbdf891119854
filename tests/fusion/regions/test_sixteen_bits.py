"""Fused models in 16 bits on a CPU where no kernel computes some convolutions in them: those, and
only those, are computed in float32, none by PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.fusion.inference.chain import steps_of
from fused_resnet.kernels import native, registry
from fused_resnet.kernels.cpu import onednn
from tests.fusion.regions.region_helpers import calibrated, programs
from tests.kernels import registrations

DTYPES = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(native.load() is not None, reason="no native kernels")


@pytest.fixture(autouse=True)
def no_sixteen_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN as on a processor without instructions for 16 bits, our kernels as with them."""
    registrations.keep(monkeypatch)
    failure, reason = onednn._failure, native.convolution_reason
    monkeypatch.setattr(
        onednn, "_failure", lambda d: failure(d) if d == torch.float32 else f"no {d}"
    )

    def without_odd_channels(shape: Any, dtype: torch.dtype, *rest: Any) -> str | None:
        return "odd" if shape[1] == 33 and dtype.itemsize == 2 else reason(shape, dtype, *rest)

    monkeypatch.setattr(native, "convolution_reason", without_odd_channels)


def layers(inputs: int, outputs: int, size: int, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def mixed() -> nn.Module:
    """Convolutions of all channels and of each alone, in turns; and one after the other."""
    parts = [*layers(16, 16, 3, 16), *layers(16, 32, 1), *layers(32, 32, 3, 32), *layers(32, 16, 1)]
    parts += [*layers(16, 16, 3, 16), *layers(16, 16, 5, 16), *layers(16, 33, 1)]
    return calibrated(nn.Sequential(*parts, *layers(33, 16, 3)))


def as_near(mine: Tensor, stock: Tensor, exact: Tensor) -> None:
    """Measured: 0.69 to 0.94 of stock's error."""
    mine_error, stock_error = ((t.double() - exact).norm().item() for t in (mine, stock))
    assert 0 < mine_error <= 1.1 * stock_error


def convolutions_of_pytorch(call: Any, *args: Any) -> int:
    with torch.profiler.profile() as found:
        call(*args)
    return sum(event.name == "aten::convolution" for event in found.events())


@pytest.mark.parametrize("how", ["model", "autocast", "inference", "export"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_no_kernel_computes_in_16_bits(dtype: torch.dtype, how: str) -> None:
    model = mixed()
    x = torch.randn(3, 16, 9, 11)
    if how in ("model", "export"):
        model, x = model.to(dtype), x.to(dtype)
    exact = copy.deepcopy(model).double()(x.double())
    autocast = torch.autocast("cpu", dtype, enabled=how in ("autocast", "inference"))
    with torch.no_grad(), autocast:
        stock = model(x)
        fused = fr.fuse(copy.deepcopy(model))
        call = fused
        if how == "inference":
            call = fr.inference(fused, x, dtype=dtype)
        elif how == "export":
            call = fr.export(fused, (x,)).module()
        call(x)
        mine = call(x)
        if how != "export":  # a graph holds the packed weights of our kernels alone
            assert convolutions_of_pytorch(call, x) == 0
    assert mine.dtype == stock.dtype == dtype
    as_near(mine, stock, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_plans(dtype: torch.dtype) -> None:
    model = mixed().to(dtype)
    fused, x = fr.fuse(copy.deepcopy(model)), torch.randn(3, 16, 9, 11, dtype=dtype)
    with torch.no_grad():
        fused(x)
    (program,) = programs(fused)
    dense = registry.conv_dtype(dtype, "cpu")
    wide = torch.float32
    found = [program.plan(f) for f in program.matched.found]
    assert [p.dtype for p in found] == [wide, dense, wide, dense, wide, wide, dense, wide]
    assert {p.usual_dtype for p in found} == {dense}
    together = [getattr(step, "plans", [step]) for step in steps_of(found)]
    assert all(len({plan.dtype for plan in plans}) == 1 for plans in together)
    explained = fr.explain(fused, x)
    assert [e.fused for e in explained] == [True] * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 16, 7, 6).to(dtype), torch.randn(2, 16, 7, 6).to(dtype)
    weight, ones = torch.randn(16, 1, 3, 3).to(dtype), torch.ones(16)
    options: dict[str, Any] = {"padding": 1, "groups": 16}

    def of(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return (torch.nn.functional.conv2d(x, weight, None, **options) + residual).relu()

    arguments = x, weight, ones, ones * 0, residual
    y = fr.conv_bn_relu(*arguments, **options)
    assert y.dtype == dtype
    assert convolutions_of_pytorch(lambda: fr.conv_bn_relu(*arguments, **options)) == 0
    exact = of(x.double(), weight.double(), residual.double())
    as_near(y, of(x, weight, residual), exact)
