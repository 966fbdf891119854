"""What was made from a model costs nothing while it stays valid, and is freed with what it was made
from."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.fusion.inference import plan
from tests.models.model_helpers import agree, both_ways, images, made, pair, same_outputs, same_step


class _Memory(bytearray):
    """Memory of a tensor that can be referred to weakly."""


def _watched(conv: nn.Conv2d) -> weakref.ref:
    """Gives the weight memory of which the result says whether it is still alive."""
    kept = conv.weight.detach().clone()
    memory = _Memory(kept.numel() * kept.element_size())
    conv.weight.data = torch.frombuffer(memory, dtype=kept.dtype).view_as(kept).copy_(kept)
    return weakref.ref(memory)


def _assigned(model: Any) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


CHANGES = {
    "to('meta')": lambda m: m.to("meta"),
    "half": lambda m: m.half(),
    "load_state_dict(assign=True)": _assigned,
    "a replaced stage": lambda m: setattr(m, "layer2", nn.Identity()),
    "a deleted stage": lambda m: delattr(m, "layer2"),
    "refresh and a new weight": lambda m: (
        setattr(m.layer2[0].conv1, "weight", nn.Parameter(torch.zeros(1))),
        fr.refresh(m),
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_old_weights_are_freed_at_once(change, training, way):
    _, mine = pair("basic")
    alive = _watched(mine.layer2[0].conv1)
    if training:
        mine.train()(images()).sum().backward()
        mine.zero_grad()
    else:
        with torch.no_grad():
            mine(images())
    assert made(mine)
    change(mine)
    if way == "fuse":  # whose class knows nothing of plans: at the next call of any kind
        with contextlib.suppress(Exception), torch.no_grad():
            mine(images().to(mine.conv1.weight))
    gc.collect()
    assert alive() is None


@both_ways
def test_a_model_that_a_part_refers_to():
    _, mine = pair("basic")
    mine.layer1[0].conv1.owner = [mine]
    with torch.no_grad():
        mine(images())
    alive = weakref.ref(mine)
    del mine
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_eval_before_every_call_packs_nothing(kind, way, monkeypatch):
    stock, mine = pair(kind)
    same_outputs(stock, mine, images())
    packed = []
    original = plan._pack
    monkeypatch.setattr(plan, "_pack", lambda *a: (packed.append(1), original(*a))[1])
    for _ in range(3):
        mine.eval()
        for m in mine.modules():
            m.eval()
        same_outputs(stock, mine, images())
    assert not packed
    mine.train(), mine.eval()
    same_outputs(stock, mine, images())
    assert packed or way == "fuse"  # whose class knows nothing of plans


@both_ways
def test_a_frozen_part_s_mode_is_seen():
    """eval() of a model in eval mode, of which a part was in training mode."""
    stock, mine = pair("basic")
    for model in (stock, mine):
        model.layer2.train()
    same_step(stock, mine, images())
    for model in (stock, mine):
        model.eval()
    same_outputs(stock, mine, images())
    for model in (stock, mine):
        model.layer3[0].bn1.train()
    same_outputs(stock, mine, images())


@both_ways
@pytest.mark.parametrize("training", [False, True])
def test_a_deleted_stage_raises_as_stock_does(training):
    for model in (m.train(training) for m in pair("basic")):
        model(images())
        del model.layer4
        with pytest.raises(AttributeError, match="layer4"):
            model(images())


@pytest.fixture
def swapping():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@both_ways
@pytest.mark.parametrize("frozen", [False, True])
def test_swapped_parameters(frozen, swapping):
    """`.to()` and load_state_dict by torch.utils.swap_tensors, which refuses weak references."""
    stock, mine = pair("basic")
    for _ in range(3):
        if frozen:
            same_step(stock, mine, images())
        else:
            same_outputs(stock, mine, images())
    stock.zero_grad(), mine.zero_grad()
    state = {k: v * 1.01 if v.is_floating_point() else v for k, v in stock.state_dict().items()}
    for model in (stock, mine):
        model.load_state_dict(state)
        model.double()
    with torch.no_grad():
        agree(mine(images().double()), stock(images().double()))
    stock.float(), mine.float()
    same_outputs(stock, mine, images())
