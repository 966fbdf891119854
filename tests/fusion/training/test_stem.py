"""A network's stem in training: convolution, norm, ReLU and pooling as one autograd node."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet as fr
from fused_resnet.fusion.training.network import NetworkStep
from fused_resnet.models.resnet import NETWORK
from tests.fusion.training.training_helpers import DTYPES, LAST, needs_native


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "window",
    [
        [3, 3, 2, 2, 1, 1], [2, 2, 2, 2, 0, 0], [3, 3, 1, 1, 1, 1], [5, 4, 3, 2, 2, 1],
        [3, 3, 5, 5, 0, 0],
    ],
)  # fmt: skip
@pytest.mark.parametrize("C", [16, 64, 5, 19])
def test_norm_relu_and_pooling_in_one_pass(C, window, dtype):
    """Bitwise equal to the separate passes, including ties, NaN and -0.0."""
    ops = torch.ops.fused_resnet_native
    wide = dtype == torch.float64
    x = torch.randint(-3, 4, (2, C, 13, 10)).to(dtype).contiguous(memory_format=LAST)
    x[0, 0, 3, 3], x[1, C - 1, 0, 0], x[1, 1] = float("nan"), float("inf"), -0.0
    vector = torch.float64 if wide else torch.float32
    weight, bias = torch.rand(C, dtype=vector) + 0.5, torch.randn(C, dtype=vector)
    stats = torch.stack([torch.randn(C), torch.rand(C) + 0.5]).double()
    y, index = ops.bn_pool(x, stats, weight, bias, 1e-5, window)
    relu = ops.bn_apply(x, stats, weight, bias, 1e-5, None, None, None, None, 0.0, True)
    relu.requires_grad_()
    sizes = (window[:2], window[2:4], window[4:])
    want, where = F.max_pool2d(relu, *sizes, return_indices=True)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.nan_to_num(), want.detach().nan_to_num())
    rows, columns = where // 10, where % 10
    p, q = torch.meshgrid(*(torch.arange(n) for n in y.shape[2:]), indexing="ij")
    taps = (rows - p * window[2] + window[4]) * window[1] + columns - q * window[3] + window[5]
    assert torch.equal(index.long(), taps)
    dy = torch.randint(-3, 4, y.shape).to(dtype).contiguous(memory_format=LAST)
    g = ops.bn_pool_gradient(dy, y, index, x, window)
    want.backward(dy)
    # As in ReLU's backward: the gradient passes where the activation is NaN.
    assert torch.equal(g, relu.grad.masked_fill(relu.detach() <= 0, 0))


@needs_native
def test_stem_is_one_node_and_differentiable_twice():
    torch.manual_seed(0)
    model = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=3).double().train()
    x = torch.randn(2, 3, 33, 30, dtype=torch.float64, requires_grad=True)
    results = []
    for backend in ("native", "reference"):
        net = copy.deepcopy(model)
        with fr.use_backend(backend):
            stem = NetworkStep(net, NETWORK, x).run_stem(net, x)
        assert (type(stem.grad_fn).__name__ == "StepFunctionBackward") == (backend == "native")
        inputs = [x, net.conv1.weight, net.bn1.weight, net.bn1.bias]
        grads = torch.autograd.grad(stem.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)
        with fr.use_backend(backend):
            plain = torch.autograd.grad(
                NetworkStep(net, NETWORK, x).run_stem(net, x).square().sum(), inputs
            )
        results.append([stem.detach(), *grads, *second, *plain])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


@needs_native
@pytest.mark.parametrize("pool", ["ceil", "average", "hooked", "dilated", "huge"])
def test_other_pooling_uses_pytorch(pool):
    model = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=3).train()
    model.maxpool = {
        "ceil": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        "average": nn.AvgPool2d(3, 2, 1),
        "hooked": nn.MaxPool2d(3, 2, 1),
        "dilated": nn.MaxPool2d(2, 2, dilation=2),
        "huge": nn.MaxPool2d(17, 2),
    }[pool]
    if pool == "hooked":
        model.maxpool.register_forward_hook(lambda m, i, o: o * 2)
    stock = copy.deepcopy(model)
    x = torch.randn(2, 3, 64, 64)
    y = model(x)
    with fr.use_backend("reference"):
        torch.testing.assert_close(y, stock(x), rtol=1e-3, atol=1e-3)
