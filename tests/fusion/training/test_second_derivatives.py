"""create_graph=True: gradients, Hessian-vector products and gradients of gradients of networks are
stock's, also where operands depend on one another. In float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import fused_resnet as fr
from fused_resnet.layers.planned import Planned
from tests.models.model_helpers import both_ways, pair

LEVELS = ["full", "low", "lower", "minimal"]


def _same(want: Any, got: Any, what: str) -> None:
    scale = max(w.norm().item() for w in want)
    for w, g in zip(want, got, strict=True):
        assert (g - w).norm().item() <= 1e-8 * (w.norm().item() + 1e-3 * scale), what


def _block_twice(model: Any) -> None:
    model.layer1 = torch.nn.Sequential(model.layer1[0], model.layer1[0])


def _shared_convolution(model: Any) -> None:
    model.layer2[1].conv2 = model.layer2[1].conv1


def _shared_norm(model: Any) -> None:
    model.layer2[1].bn2 = model.layer2[1].bn1


def _shared_vector(model: Any) -> None:
    model.layer2[1].bn2.weight = model.layer2[1].bn1.bias


SHARING = {
    "nothing shared": lambda _: None,
    "a block twice": _block_twice,
    "a convolution of two units": _shared_convolution,
    "a norm of two units": _shared_norm,
    "a weight and a bias": _shared_vector,
}


@both_ways
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("share", SHARING.values(), ids=SHARING)
def test_of_networks(share, training):
    _compare(share, training, "full")


@pytest.mark.parametrize("level", LEVELS[1:])
def test_at_every_level(level):
    _compare(_block_twice, True, level)


def _compare(share: Any, training: bool, level: str) -> None:
    results = []
    for model in pair("basic"):
        model.double().train(training)
        share(model)
        if isinstance(model, Planned):
            fr.set_activation_memory(model, level)
        g = torch.Generator().manual_seed(5)
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=g).requires_grad_()
        weights = list(dict.fromkeys(model.parameters()))
        inputs = [x, *weights]
        y = model(x)
        loss = (y * torch.randn(y.shape, dtype=y.dtype, generator=g)).sum() + y.square().mean()
        plain = torch.autograd.grad(loss, inputs, retain_graph=True)
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        _same(plain, [t.detach() for t in grads], "with and without create_graph")
        vectors = [torch.randn(t.shape, dtype=t.dtype, generator=g) for t in grads]
        product = sum((t * v).sum() for t, v in zip(grads, vectors, strict=True))
        hvp = torch.autograd.grad(product, inputs)
        results.append(([t.detach() for t in grads], hvp))
    _same(results[0][0], results[1][0], "gradient")
    _same(results[0][1], results[1][1], "Hessian-vector product")


@both_ways
@pytest.mark.parametrize("training", [False, True])
def test_a_step_of_maml(training):
    """The loss after an inner step, differentiated with respect to the weights before it."""
    results = []
    for model in pair("basic"):
        model.double().train(training)
        g = torch.Generator().manual_seed(6)
        x, later = (torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=g) for _ in range(2))
        weights = dict(model.named_parameters())
        loss = functional_call(model, weights, (x,)).square().mean()
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        moved = {k: p - 1e-3 * d for (k, p), d in zip(weights.items(), grads, strict=True)}
        outer = functional_call(model, moved, (later,)).square().mean()
        results.append(torch.autograd.grad(outer, list(weights.values())))
    _same(*results, "meta-gradient")


@both_ways
def test_a_gradient_penalty():
    results: list[list[Tensor]] = []
    for model in pair("basic"):
        model.double().train()
        g = torch.Generator().manual_seed(7)
        x = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=g).requires_grad_()
        (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        ((dx.view(len(dx), -1).norm(dim=1) - 1) ** 2).mean().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    _same(*results, "gradient of the penalty")
