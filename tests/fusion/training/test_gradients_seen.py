"""What a user sees of gradients besides their values: layouts, batches of them at once, and
statistics under torch.utils.checkpoint."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_resnet as fr
from tests.models.model_helpers import both_ways, images, pair

LEVELS = ["full", "low", "lower", "minimal"]


def _layouts(model: Any, x: Tensor) -> tuple[list[tuple[int, ...]], list[Tensor]]:
    """Strides of all gradients, that of the input among them, and the gradients."""
    x = x.detach().requires_grad_()
    y = model(x)
    grads = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
    return [y.stride(), *(g.stride() for g in grads)], [y, *grads]


@both_ways
@pytest.mark.refused  # a block alone has other strides for channels_last weights
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("part", ["block", "projecting block", "network"])
def test_layouts_are_stock_s(part, training, layout, weights):
    models = []
    for model in pair("bottleneck"):
        model.train(training).to(memory_format=weights)
        block = {"block": model.layer1[0], "projecting block": model.layer2[0]}
        models.append(block.get(part, model))
    C = {"block": 64, "projecting block": 256}.get(part, 3)
    x = torch.randn(2, C, 40, 40).contiguous(memory_format=layout)
    want, got = (_layouts(model, x)[0] for model in models)
    if layout is weights:  # otherwise stock converts x
        assert got[:2] == want[:2]
    if weights is torch.contiguous_format and layout is torch.contiguous_format:
        assert got == want
        for grad in _layouts(models[1], x)[1]:
            grad.view(len(grad), -1)


@both_ways
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("how", [{"create_graph": True}, {"is_grads_batched": True}], ids=str)
@pytest.mark.parametrize("part", ["block", "projecting block", "network"])
def test_layouts_of_gradients_by_formula(part, how, training):
    """A penalty on gradients flattens them by `view`."""
    strides = []
    for model in pair("basic"):
        model = {"block": model.layer1[0], "projecting block": model.layer2[0]}.get(part, model)
        x = torch.randn(2, 3 if part == "network" else 64, 16, 16, requires_grad=True)
        y = model.train(training)(x)
        v = torch.ones(2, *y.shape) if "is_grads_batched" in how else torch.ones_like(y)
        grads = torch.autograd.grad(y, [x, *model.parameters()], v, **how)
        strides.append([g.stride() for g in grads])
    assert strides[0] == strides[1]


@both_ways
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_strides_of_one_pixel(size, training, layout):
    """The strides of dimensions of one element choose the layout of the next operation."""
    for gradients in (True, False):
        found = []
        for model in pair("basic"):
            block = model.layer1[0].train(training)
            x = torch.randn(4, 64, size, size).contiguous(memory_format=layout)
            with torch.set_grad_enabled(gradients):
                y = block(x.requires_grad_(gradients))
            found.append([y.stride()])
            if gradients:
                found[-1].append(torch.autograd.grad(y.square().sum(), x)[0].stride())
        assert found[0] == found[1]


@both_ways
@pytest.mark.parametrize("training", [False, True])
def test_a_critic_s_gradient_penalty(training):
    """WGAN-GP takes the norm of the input's gradient by `view(n, -1)`."""
    results = []
    for model in pair("basic"):
        model.train(training)
        x = images().requires_grad_()
        (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        ((dx.view(len(dx), -1).norm(dim=1) - 1) ** 2).mean().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == len(results[1])
    for want, got in zip(*results, strict=True):
        assert (got - want).norm() <= 2e-2 * want.norm() + 1e-4 * max(g.norm() for g in results[0])


@both_ways
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_batches_of_gradients(kind, training, level):
    """`is_grads_batched`, as jacobian(vectorize=True) uses it."""
    results = []
    for model in pair(kind):
        block = model.double().layer2[0].train(training)
        if isinstance(block, fr.layers.planned.Planned):
            fr.set_activation_memory(block, level)
        x = torch.randn(2, block.conv1.in_channels, 6, 6, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(3)))
        y = block(x)
        v = torch.randn(3, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(4))
        inputs = [x, *block.parameters()]
        results.append(torch.autograd.grad(y, inputs, v, is_grads_batched=True))
    for want, got in zip(*results, strict=True):
        assert got.shape == want.shape and not got.requires_grad
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_batches_of_gradients_of_the_ops():
    x, r = (torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    scale, shift = (torch.rand(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    norm = [torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    cases = [
        (fr.add_relu(x, r), [x, r]),
        (fr.bn_add_relu(x, *norm, r)[0], [x, *norm, r]),
        (fr.conv_bn_relu(x, weight, scale, shift, padding=1), [x, weight, scale, shift]),
    ]
    for y, inputs in cases:
        v = torch.randn(4, *y.shape, dtype=y.dtype)
        got = torch.autograd.grad(y, inputs, v, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(y, inputs, u, retain_graph=True) for u in v]
        for i, grad in enumerate(got):
            torch.testing.assert_close(
                grad, torch.stack([e[i] for e in each]), rtol=1e-9, atol=1e-12
            )


def _segments(model: Any, x: Tensor, reentrant: bool) -> Tensor:
    for stage in (model.layer1, model.layer2):
        x = checkpoint(stage, x, use_reentrant=reentrant)
    return x


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_checkpointing_updates_statistics_once(level, reentrant):
    _, mine = pair("basic")
    plain = copy.deepcopy(mine.train())
    fr.set_activation_memory(mine, level)
    x = torch.randn(2, 64, 16, 16)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    plain.layer2(plain.layer1(inputs[0])).square().sum().backward()
    _segments(mine, inputs[1], reentrant).square().sum().backward()
    for name, buffer in plain.named_buffers():
        assert torch.equal(dict(mine.named_buffers())[name], buffer), name
    for p, q in zip(plain.parameters(), mine.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(
                q.grad, p.grad, rtol=1e-4, atol=1e-5 * p.grad.abs().max().item()
            )
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-4)


def test_a_forward_in_a_hook_of_backward_is_no_recomputation():
    _, mine = pair("basic")
    mine.train()
    x = torch.randn(2, 64, 16, 16)
    y = torch.ones(3, requires_grad=True)
    y.register_hook(lambda g: (mine.layer1(x), None)[1])
    y.sum().backward()
    assert mine.layer1[0].bn1.num_batches_tracked == 1
