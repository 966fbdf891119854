"""Small networks for the model tests: torchvision's and ours with the same state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.fusion.regions.program import Program
from fused_resnet.fusion.store import made_from
from fused_resnet.layers.planned import FUSED

tv = pytest.importorskip("torchvision.models", reason="the comparison is with torchvision")

KINDS = {
    "basic": ("BasicBlock", [1, 2, 1, 1], {}),
    "bottleneck": ("Bottleneck", [1, 2, 1, 1], {}),
    "grouped": ("Bottleneck", [1, 1, 1, 1], {"groups": 32, "width_per_group": 4}),
}


WAY = "family"
"""How `pair` makes our network: of this package's classes, or torchvision's changed by `fuse`. The
fixture `way` sets it."""
both_ways = pytest.mark.usefixtures("way")


def randomise(model: nn.Module, seed: int = 0) -> Any:
    """Statistics and affine parameters like a trained network's: initial ones hide a wrong eps, a
    missing mean and rounded statistics."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if not isinstance(m, nn.BatchNorm2d):
                continue
            shape = (m.num_features,)
            if m.running_mean is not None and m.running_var is not None:
                m.running_mean.copy_(torch.randn(shape, generator=g) * 0.2)
                m.running_var.copy_(torch.rand(shape, generator=g) + 0.5)
            if m.weight is not None:
                sign = torch.where(torch.rand(shape, generator=g) < 0.1, -1.0, 1.0)
                m.weight.copy_((torch.rand(shape, generator=g) + 0.5) * sign)
                m.bias.copy_(torch.randn(shape, generator=g) * 0.3)
    return model


def pair(kind: str = "basic", **options: Any) -> tuple[Any, Any]:
    """torchvision's network and ours with the same state, in eval mode."""
    block, layers, more = KINDS[kind]
    options = {"num_classes": 10, **more, **options}
    torch.manual_seed(0)
    stock = tv.ResNet(getattr(tv.resnet, block), layers, **options)
    if WAY == "fuse":
        mine = fr.fuse(tv.ResNet(getattr(tv.resnet, block), layers, **options), inplace=True)
    else:
        mine = fr.ResNet(getattr(fr, block), layers, **options)
    mine.load_state_dict(randomise(stock).state_dict())
    return stock.eval(), mine.eval()


def made(model: nn.Module) -> list[Any]:
    """What is cached for the model itself: plans and steps; of a fused model, programs."""
    region = model.__dict__.get(FUSED)
    if region is not None and region.belongs_to(model):
        return [p for p in region._programs.values() if isinstance(p, Program)]
    return list(made_from(model).values())


def images(count: int = 2, size: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def agree(got: Tensor, want: Tensor, tolerance: float = 2e-4) -> None:
    """Equal up to float32 rounding of a few layers; measured: 1e-5 of the largest value."""
    assert got.shape == want.shape and got.dtype == want.dtype
    finite = want.isfinite()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~finite & ~want.isnan()], want[~finite & ~want.isnan()])
    scale = want[finite].abs().max().item() if finite.any() else 1.0
    assert (
        (got[finite] - want[finite]).abs().max().item() <= tolerance * scale if finite.any() else 1
    )


def same_outputs(stock: nn.Module, mine: nn.Module, x: Tensor) -> Tensor:
    """Outputs of both without gradients: equal up to rounding, x unmodified. Returns ours."""
    before = x.clone()
    with torch.no_grad():
        want, got = stock(x), mine(x)
    agree(got, want)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True, msg="x was modified")
    return got


def same_step(stock: nn.Module, mine: nn.Module, x: Tensor) -> None:
    """One forward and backward of both: outputs, gradients and buffers.

    Where a ReLU's input is within rounding of zero, its mask depends on the order of summation:
    stock's two memory layouts differ by up to 0.05 of a gradient's largest value for that reason.
    Measured between stock and ours: at most 0.05 of a gradient's norm, 0.011 for the median.
    """
    outputs, errors = [], []
    for model in (stock, mine):
        model.zero_grad()
        y = model(x)
        outputs.append(y.detach())
        if y.requires_grad:
            (y * torch.arange(1.0, y.numel() + 1).view_as(y) / y.numel()).sum().backward()
    agree(outputs[1], outputs[0])
    # The gradient of a bias before batch norm is rounding error only.
    norms = [p.grad.norm().item() for p in stock.parameters() if p.grad is not None]
    floor = 1e-3 * max(norms, default=0.0)
    for (name, p), (other, q) in zip(
        stock.named_parameters(), mine.named_parameters(), strict=True
    ):
        assert name == other and (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert q.grad.dtype == p.grad.dtype
            errors.append(((q.grad - p.grad).norm() / (p.grad.norm() + floor)).item())
            assert errors[-1] <= 0.1, f"gradient of {name}: off by {errors[-1]:.2g} of its norm"
    median = sorted(errors)[len(errors) // 2] if errors else 0.0
    assert median <= 0.02, f"half of the gradients are off by {median:.2g} of their norm or more"
    for (name, p), (other, q) in zip(stock.named_buffers(), mine.named_buffers(), strict=True):
        assert name == other
        agree(q, p, 1e-4) if p.is_floating_point() else torch.testing.assert_close(q, p)


def fused(model: nn.Module) -> list[bool]:
    return [e.fused for e in fr.explain(model)]


def reasons(model: nn.Module) -> dict[str, str]:
    return {e.name: e.reason for e in fr.explain(model) if not e.fused}


def clone(model: nn.Module) -> Any:
    return copy.deepcopy(model)
