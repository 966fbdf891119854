"""gradient_profile, response_profile and loss_along against plain PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fused_resnet as fr
from fused_resnet import depth


def make(block: str = "basic") -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(0)
    model = fr.cifar_resnet(8, block=block).train()
    return model, torch.randn(6, 3, 8, 8), torch.arange(6)


def state(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


@pytest.fixture
def unchanged():
    """Checks after the test that a model's state, gradients and modes are unchanged."""
    recorded: list[Any] = []

    def record(model: nn.Module) -> None:
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        grads = [p.grad.clone() for p in model.parameters()]
        recorded.append((model, state(model), grads, [m.training for m in model.modules()]))

    yield record
    for model, before, grads, modes in recorded:
        assert all(map(torch.equal, state(model), before))
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
        assert [m.training for m in model.modules()] == modes
        assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("block", ["basic", "preact"])
def test_gradients(block, unchanged):
    model, x, y = make(block)
    other = copy.deepcopy(model).double()
    cross_entropy(other(x.double()), y).backward()
    want = {n: m.weight.grad.norm().item() for n, m in other.named_modules()
            if isinstance(m, (nn.Conv2d, nn.Linear))}  # fmt: skip
    model.layer1[0].conv1.weight.requires_grad_(False)
    del want["layer1.0.conv1"]
    unchanged(model)
    profile = depth.gradient_profile(model, lambda m: cross_entropy(m(x), y))
    assert [layer.name for layer in profile] == list(want)
    for layer in profile:
        assert layer.value == pytest.approx(want[layer.name], rel=1e-3)


def test_gradients_of_unused_layers():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    profile = depth.gradient_profile(model, lambda m: m[0](torch.ones(1, 3)).sum())
    assert profile[0].value > 0 and profile[1] == ("1", 0.0)
    with torch.no_grad():
        assert depth.gradient_profile(model, lambda m: m(torch.ones(1, 3)).sum())[0].value > 0


def test_responses(unchanged):
    model, x, _ = make()
    other = copy.deepcopy(model)
    want = []
    with fr.use_backend("reference"), torch.no_grad():
        h = other.bn1(other.conv1(x))
        want.append(h)
        h = h.relu()
        for stage in other.stages():
            for b in stage:
                want.append(b.bn1(b.conv1(h)))
                want.append(b.bn2(b.conv2(want[-1].relu())))
                h = (want[-1] + (h if b.downsample is None else b.downsample(h))).relu()
    unchanged(model)
    profile = depth.response_profile(model, x)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert sorted(layer.name for layer in profile) == sorted(names)
    for layer, y in zip(profile, want, strict=True):
        assert layer.value == pytest.approx(y.std(correction=0).item(), rel=1e-4)


def test_loss_along_a_direction(unchanged):
    model, x, y = make()
    unchanged(model)

    def loss(m: nn.Module) -> Tensor:
        return cross_entropy(m(x), y)

    with torch.no_grad():
        here = loss(copy.deepcopy(model)).item()
    losses = depth.loss_along(model, loss, [-0.5, 0.0, 0.5], seed=3)
    assert losses[1] == pytest.approx(here, abs=1e-6)
    assert losses[0] != pytest.approx(here) != losses[2]
    assert depth.loss_along(model, loss, [0.5], seed=3)[0] == pytest.approx(losses[2])
    assert depth.loss_along(model, loss, [0.5], seed=4)[0] != pytest.approx(losses[2])


def test_the_direction_has_the_norm_of_each_filter():
    seen: list[list[Tensor]] = []
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        model[0].weight[1] *= 100
        model[0].weight[2] = 0
    start = [p.clone() for p in model.parameters()]

    def loss(m: nn.Module) -> Tensor:
        seen.append([p.clone() for p in m.parameters()])
        return torch.zeros(())

    depth.loss_along(model, loss, [1.0])
    moved = [a - b for a, b in zip(seen[0], start, strict=True)]
    length, want = (t.flatten(1).norm(dim=1) for t in (moved[0], start[0]))
    torch.testing.assert_close(length, want, rtol=1e-4, atol=1e-5)
    assert all(not d.any() for d in moved[1:])


def test_clear_errors():
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(ValueError, match="gradient_profile: model must have a layer"):
        depth.gradient_profile(model, lambda m: torch.zeros(()))
    with pytest.raises(ValueError, match="response_profile: model must have a norm"):
        depth.response_profile(model, torch.zeros(1))
    with pytest.raises(ValueError, match=r"loss must return a scalar, got \(2, 10\)"):
        depth.loss_along(make()[0], lambda m: m(torch.randn(2, 3, 8, 8)), [0.0])
    with pytest.raises(ValueError, match="loss must return a scalar, got float"):
        depth.gradient_profile(make()[0], lambda m: 1.0)
