"""What users and tools put in the place of PyTorch's modules, methods and functions is never
ignored: while it is there the results are stock's."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import fused_resnet as fr
from tests.models.model_helpers import (
    both_ways,
    fused,
    images,
    made,
    pair,
    reasons,
    same_outputs,
    same_step,
)


def _scaled(function: Any, by: float = 0.5) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) * by

    return wrapper


CLASSES = {
    "a norm's forward": (nn.BatchNorm2d, "forward"),
    "a convolution's forward": (nn.Conv2d, "forward"),
    "a convolution's _conv_forward": (nn.Conv2d, "_conv_forward"),
    "a ReLU's forward": (nn.ReLU, "forward"),
    "the pooling's forward": (nn.MaxPool2d, "forward"),
    "F.conv2d": (F, "conv2d"),
    "F.batch_norm": (F, "batch_norm"),
    "F.relu": (F, "relu"),
    "torch.batch_norm": (torch, "batch_norm"),
}


@both_ways
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("owner, name", CLASSES.values(), ids=CLASSES)
def test_replaced_for_the_whole_process(owner, name, training, monkeypatch):
    stock, mine = pair("basic")
    stock.train(training), mine.train(training)
    compare = same_step if training else same_outputs
    compare(stock, mine, images())
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _scaled(getattr(owner, name)))
        compare(stock, mine, images())
        assert not any(fused(mine))
        assert all("was replaced" in reason for reason in reasons(mine).values())
    assert all(fused(mine))
    compare(stock, mine, images())


def test_a_block_class_patched_after_its_plan(monkeypatch):
    _, mine = pair("basic")
    with torch.no_grad():
        want = mine(images())
        monkeypatch.setattr(fr.BasicBlock, "forward", _scaled(fr.BasicBlock.forward))
        assert not torch.allclose(mine(images()), want)


@pytest.mark.parametrize("name", ["forward", "_conv_forward", "_call_impl"])
@pytest.mark.parametrize("made_before", [False, True])
def test_replaced_on_an_instance(name, made_before, way):
    stock, mine = pair("basic")
    if made_before:
        same_outputs(stock, mine, images())
        same_step(stock.train(), mine.train(), images())
    for model in (stock, mine):
        conv = model.layer1[0].conv1
        setattr(conv, name, _scaled(getattr(conv, name)))
    same_outputs(stock.eval(), mine.eval(), images())
    if way == "family":
        assert reasons(mine) == {"layer1.0": f"conv1 has its {name} replaced"}
    same_step(stock.train(), mine.train(), images())


@both_ways
def test_the_class_s_own_method_on_an_instance():
    """What accelerate's remove_hook_from_module leaves: the module computes what its class does."""
    stock, mine = pair("basic")
    for m in [mine, *mine.modules()]:
        m.forward = types.MethodType(type(m).forward, m)
    assert all(fused(mine))
    same_outputs(stock, mine, images())
    assert made(mine)
    mine.layer1[0].conv1.forward = stock.layer1[0].conv1.forward = lambda x: torch.zeros_like(x)
    same_outputs(stock, mine, images())


class Tripled(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


def test_a_class_swapped_before_the_model_is_built(monkeypatch, way):
    """Quantisers replace nn.Conv2d by a subclass."""
    _, before = pair("basic")
    with monkeypatch.context() as patch:
        patch.setattr(nn, "Conv2d", Tripled)
        stock, mine = pair("basic")
        same_outputs(stock, mine, images())
        assert all(fused(before))  # built of PyTorch's own
    same_outputs(stock, mine, images())
    if way == "family":
        assert not any(fused(mine)) and "conv1 is a Tripled" in reasons(mine)["layer1.0"]


class Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


@both_ways
@pytest.mark.parametrize("training", [False, True])
def test_function_modes_see_every_operation(training):
    stock, mine = pair("basic")
    stock.train(training), mine.train(training)
    counts = []
    for model in (stock, mine):
        model(images())
        with Counting() as mode:
            model(images())
        counts.append([mode.seen.count(name) for name in ("conv2d", "batch_norm", "relu")])
    assert counts[0] == counts[1] and counts[0][0] == 14


@both_ways
def test_a_default_device_is_no_mode_to_fall_back_for():
    _, mine = pair("basic")
    with torch.no_grad(), torch.device("cpu"):
        mine(images())
    assert made(mine)


@both_ways
def test_tracing_before_dispatch():
    _, mine = pair("basic")
    with torch.no_grad():
        want = mine(images())
        graph = make_fx(mine, pre_dispatch=True)(images())
        targets = [str(node.target) for node in graph.graph.nodes]
        assert sum("conv2d" in t for t in targets) == 14
        assert not any("fused_resnet" in t for t in targets)
        torch.testing.assert_close(graph(images()), want, rtol=1e-3, atol=1e-4)


def _unregistered(model: nn.Module) -> None:
    """Weights as plain attributes, as hypernetworks and DataParallel's replicas have them."""
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)):
            for name, p in list(m.named_parameters(recurse=False)):
                delattr(m, name)
                setattr(m, name, p.detach().clone().requires_grad_())


@pytest.mark.parametrize("made_before", [False, True])
def test_weights_as_plain_attributes(made_before, way):
    stock, mine = pair("basic")
    if made_before:
        same_outputs(stock, mine, images())
    _unregistered(stock), _unregistered(mine)
    same_outputs(stock, mine, images())
    for model in (stock, mine):
        model.layer1[0].conv1.weight = model.layer1[0].conv1.weight * 3
    same_outputs(stock, mine, images())
    if way == "family":
        assert "conv1 has its weight a plain attribute" in reasons(mine)["layer1.0"]
    grads = []
    for model in (stock, mine):
        weight = model.layer2[0].conv1.weight
        model(images()).square().sum().backward()
        grads.append(weight.grad)
    torch.testing.assert_close(
        grads[1], grads[0], rtol=1e-3, atol=1e-4 * grads[0].abs().max().item()
    )


class OthersFrozenNorm(nn.Module):
    """DETR's: buffers, and eps in the forward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (
            ("weight", 1.5),
            ("bias", 0.3),
            ("running_mean", 0.1),
            ("running_var", 0.8),
        ):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, b, mean, var = (
            t.reshape(1, -1, 1, 1)
            for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = w * (var + 1e-5).rsqrt()
        return x * scale + (b - mean * scale)


def test_frozen_norms_of_other_projects(monkeypatch, way):
    cls: Any = type("OthersFrozenNorm", (OthersFrozenNorm,), {})
    stock, mine = pair("basic", norm_layer=cls)
    same_outputs(stock, mine, images())
    if way == "family":
        assert "is a OthersFrozenNorm" in reasons(mine)["layer1.0"]
    assert fr.register_frozen_norm(cls) is cls
    assert all(fused(mine))
    same_outputs(stock, mine, images())
    same_step(stock.train(), mine.train(), images())
    same_outputs(stock.eval(), mine.eval(), images())
    assert made(mine)  # a plan from before the replacement
    monkeypatch.setattr(cls, "forward", lambda self, x: x)
    same_outputs(stock, mine, images())
    same_step(stock.train(), mine.train(), images())
    with pytest.raises(
        TypeError, match=r"register_frozen_norm: cls must be a subclass of nn\.Module"
    ):
        fr.register_frozen_norm(3)


@both_ways
@pytest.mark.parametrize("module", ["detectron2.layers.batch_norm", "models.backbone"])
def test_known_frozen_norms(module):
    members = {"__module__": module, "forward": OthersFrozenNorm.forward}
    cls: Any = type("FrozenBatchNorm2d", (OthersFrozenNorm,), members)
    cls.forward = types.FunctionType(OthersFrozenNorm.forward.__code__, globals())
    cls.forward.__qualname__ = "FrozenBatchNorm2d.forward"
    stock, mine = pair("basic", norm_layer=cls)
    assert all(fused(mine))
    same_outputs(stock, mine, images())
