"""Settings in every form that PyTorch takes, and plans made under another default device or dtype
or in inference mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.kernels import registry
from tests.models.model_helpers import (
    agree,
    both_ways,
    fused,
    images,
    made,
    pair,
    same_outputs,
    same_step,
)

FORMS = {
    "one integer": lambda v: v[0],
    "a tuple of one": lambda v: (v[0],),
    "a list": list,
    "torch.Size": torch.Size,
}


@both_ways
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("kind", ["basic", "grouped"])
def test_stride_padding_and_dilation(kind, form):
    stock, mine = pair(kind)
    for model in (stock, mine):
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                for name in ("stride", "padding", "dilation"):
                    setattr(m, name, form(getattr(m, name)))
    assert all(fused(mine))
    same_outputs(stock, mine, images())
    same_step(stock, mine, images())
    same_step(stock.train(), mine.train(), images())


@both_ways
@pytest.mark.parametrize("size", [3, (3,), (3, 3)])
def test_the_pooling_s_settings(size):
    stock, mine = pair("basic")
    for model in (stock, mine):
        model.maxpool.kernel_size, model.maxpool.stride = size, (2,)
        model.maxpool.padding, model.maxpool.dilation = (1,), (1,)
    same_outputs(stock, mine, images())
    same_step(stock.train(), mine.train(), images())


@both_ways
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kernels", ["native", "vendor"])
def test_another_default_device(training, kernels):
    if registry.missing("conv_bn_relu", kernels, "cpu"):
        pytest.skip(f"{kernels} is not available")
    stock, mine = pair("grouped")
    compare = same_step if training else same_outputs
    stock.train(training), mine.train(training)
    x = images()
    with fr.use_backend(kernels):
        with torch.device("meta"):
            compare_with = [m(x) for m in (stock, mine)]
        agree(compare_with[1].detach(), compare_with[0].detach())
        compare(stock, mine, x)


@both_ways
@pytest.mark.parametrize("training", [False, True])
def test_another_default_dtype(training):
    stock, mine = pair("basic")
    stock.train(training), mine.train(training)
    x = images()
    torch.set_default_dtype(torch.float64)
    try:
        (same_step if training else same_outputs)(stock, mine, x)
        assert stock(x).dtype == mine(x).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    (same_step if training else same_outputs)(stock, mine, x)


def _frozen(model: Any) -> Any:
    model.train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval().requires_grad_(False)
    return model


@both_ways
def test_inference_mode_and_then_training():
    """Autograd does not save tensors that were created in inference mode."""
    stock, mine = map(_frozen, pair("basic"))
    for model in (stock, mine):
        with torch.inference_mode():
            for _ in range(3):
                model(images())
    same_step(stock, mine, images())
    stock.eval(), mine.eval()
    with torch.inference_mode():
        mine(images())
    assert made(mine)
    same_step(stock, mine, images())
    x = images().requires_grad_()
    with torch.inference_mode():
        for model in (stock, mine):
            model.layer1[0](torch.randn(1, 64, 8, 8))
    y = mine.layer1[0](mine.maxpool(mine.relu(mine.bn1(mine.conv1(x)))))
    y.sum().backward()
    assert x.grad is not None and x.grad.norm() > 0


@both_ways
@pytest.mark.parametrize("way", ["family", "fuse"])
def test_images_made_in_inference_mode():
    """Stock's first convolution cannot save them."""
    stock, mine = pair("basic")
    with torch.inference_mode():
        x = images()
    for model in (stock.train(), mine.train()):
        model(images())
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            model(x)
        with torch.no_grad():
            model.eval()(x)


@both_ways
def test_nested_tensors_raise_as_stock():
    x = torch.nested.nested_tensor([torch.randn(3, 32, 32), torch.randn(3, 32, 32)])
    for model in pair("basic"):
        with torch.no_grad(), pytest.raises(NotImplementedError, match="convolution"):
            model(x)
