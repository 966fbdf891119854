"""Caches are never stale: after a weight, statistic or setting changes, the next output uses it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn

import fused_resnet as fr
from fused_resnet.fusion.inference import plan
from fused_resnet.fusion.store import made_from
from fused_resnet.kernels import cache, native
from tests.models.model_helpers import (
    agree,
    both_ways,
    clone,
    images,
    made,
    pair,
    randomise,
    same_outputs,
    same_step,
)


def _optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(images()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _fused_optimizer(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, foreach=True)
    model(images()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _no_grad(change):
    def edit(model):
        with torch.no_grad():
            change(model)

    return edit


def _load(assign):
    def edit(model):
        other = randomise(clone(model), seed=9)
        model.load_state_dict(other.state_dict(), assign=assign)

    return edit


def _replace_data(model):
    model.layer1[0].conv2.weight.data = model.layer1[0].conv2.weight.data * 1.5


def _new_parameter(model):
    conv = model.layer1[0].conv2
    conv.weight = nn.Parameter(conv.weight.detach() * 1.5)


def _new_buffer(model):
    model.layer1[0].bn1.running_var = model.layer1[0].bn1.running_var * 4


def _eps(model):
    model.layer1[0].bn2.eps = 0.5


def _stride(model):
    model.layer1[0].conv1.stride = (2, 2)
    model.layer1[0].downsample = nn.Sequential(nn.Conv2d(64, 64, 1, 2), nn.BatchNorm2d(64)).eval()
    torch.nn.init.constant_(model.layer1[0].downsample[0].weight, 0.01)
    torch.nn.init.constant_(model.layer1[0].downsample[0].bias, 0.5)


def _padding(model):
    model.conv1.padding = (1, 1)


def _class(model):
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    model.layer1[0].conv1.__class__ = Doubled


def _pool_stride(model):
    model.maxpool.stride = 1


def _one_norm_trains(model):
    model.layer1[0].bn1.train()


def _tracking_off(model):
    bn = model.layer1[0].bn1
    bn.track_running_stats, bn.running_mean, bn.running_var = False, None, None


def _shared_convolution(model):
    model.layer1[0].conv2 = model.layer1[0].conv1


def _through_training(model):
    model.train()
    for seed in (3, 4):
        model(images(4, 64, seed))
    model.eval()


def _data_before_train_and_eval(model):
    model.layer1[0].conv1.weight.data.mul_(2)
    model.train().eval()


def _to_and_back(model):
    model.double()
    model.float()


def _swap_blocks(model):
    model.layer2[0], model.layer2[1] = model.layer2[0], clone(model.layer2[1])
    with torch.no_grad():
        model.layer2[1].conv1.weight.neg_()


EDITS = {
    "an optimizer step": _optimizer,
    "a multi-tensor optimizer step": _fused_optimizer,
    "a weight in place": _no_grad(lambda m: m.layer1[0].conv1.weight.mul_(2)),
    "a view of a weight in place": _no_grad(lambda m: m.layer1[0].conv1.weight[0].zero_()),
    "a norm's weight in place": _no_grad(lambda m: m.layer1[0].bn1.weight.mul_(-2)),
    "a norm's bias in place": _no_grad(lambda m: m.bn1.bias.add_(1)),
    "a mean in place": _no_grad(lambda m: m.layer2[0].downsample[1].running_mean.add_(1)),
    "a variance in place": _no_grad(lambda m: m.layer1[0].bn2.running_var.mul_(9)),
    "load_state_dict": _load(False),
    "load_state_dict(assign=True)": _load(True),
    "another .data": _replace_data,
    "another parameter": _new_parameter,
    "another buffer": _new_buffer,
    "another eps": _eps,
    "another stride": _stride,
    "another padding": _padding,
    "another class": _class,
    "another stride of the pool": _pool_stride,
    "one norm in training mode": _one_norm_trains,
    "running statistics removed": _tracking_off,
    "a convolution used twice": _shared_convolution,
    "training and back": _through_training,
    ".data in place, then training and back": _data_before_train_and_eval,
    "float64 and back": _to_and_back,
    "another block": _swap_blocks,
}


@both_ways
@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("kind", ["basic", "block by block"])
def test_no_stale_copy(name, kind):
    stock, mine = pair("basic")
    if kind != "basic":
        for model in (stock, mine):
            model.layer4[0].relu = nn.Softplus()  # no network plan, only plans of blocks
    before = same_outputs(stock, mine, images())
    same_outputs(stock, mine, images())
    for model in (stock, mine):
        torch.manual_seed(11)
        EDITS[name](model)
    for _ in range(2):
        after = same_outputs(stock, mine, images())
    if name != "float64 and back":
        assert (after - before).abs().max() > 1e-4 * before.abs().max(), "the edit has no effect"


@both_ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_another_dtype_and_back(dtype):
    stock, mine = pair("bottleneck")
    same_outputs(stock, mine, images())
    stock.to(dtype), mine.to(dtype)
    x = images().to(dtype)
    with torch.no_grad():
        want, got = stock(x), mine(x)
        y = mine.layer1[0](torch.randn(2, 64, 9, 9).to(dtype))
    assert got.dtype == y.dtype == dtype and (got - want).abs().max() <= 0.1 * want.abs().max()
    stock.float(), mine.float()
    same_outputs(stock, mine, images())


@both_ways
def test_requires_grad_is_not_modified_and_toggles():
    stock, mine = pair("basic")
    for flag in (False, True):
        for model in (stock, mine):
            model.requires_grad_(flag)
        assert mine(images()).requires_grad == flag
        same_outputs(stock, mine, images())
        assert all(p.requires_grad == flag for p in mine.parameters())


@both_ways
def test_optimizers_built_before_the_first_call_update_the_model():
    stock, mine = pair("basic")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (stock, mine)]
    same_outputs(stock, mine, images())
    same_step(stock.train(), mine.train(), images())
    for optimizer in optimizers:
        optimizer.step()
    with torch.no_grad():
        agree(mine.eval()(images()), stock.eval()(images()), 5e-3)


def test_weights_created_in_inference_mode():
    stock, mine = pair("basic")
    state = {k: v.clone() for k, v in stock.state_dict().items()}
    with torch.inference_mode():
        created = fr.ResNet(fr.BasicBlock, [1, 2, 1, 1], num_classes=10).eval()
        created.load_state_dict(state)
    same_outputs(stock, created, images())
    with torch.inference_mode():  # inference tensors have no version counter
        created.layer1[0].conv1.weight.mul_(3)
    with torch.no_grad():
        stock.layer1[0].conv1.weight.mul_(3)
    same_outputs(stock, created, images())
    with torch.inference_mode():
        agree(mine(images()), pair("basic")[0](images()).clone())


def test_plans_are_freed_with_the_model():
    _, mine = pair("bottleneck")
    with torch.no_grad():
        mine(images())
    gc.collect()
    made = [*made_from(mine).values(), *made_from(mine.layer1[0]).values()]
    assert len(made) == 3  # the network's plan, its stem's and the block's
    references = [weakref.ref(mine), *map(weakref.ref, made)]
    del mine, made
    gc.collect()
    assert [r() for r in references] == [None] * 4


def test_a_stale_plan_is_freed_immediately():
    _, mine = pair("basic")
    with torch.no_grad():
        mine(images())
        old = weakref.ref(next(iter(made_from(mine.layer1[0]).values())))
        mine.layer1[0].conv1.weight.mul_(2)
        mine(images())
    gc.collect()
    assert old() is None


@both_ways
def test_frozen_norms_are_folded_again():
    """With gradients, in eval mode: after in-place writes to a norm, and to a convolution alone."""
    stock, mine = pair("basic")
    for model in (stock, mine):
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.requires_grad_(False)
    for edited in ("bn1.running_mean", "bn1.bias", "conv1.weight", "bn1.running_var"):
        same_step(stock, mine, images())
        with torch.no_grad():
            for model in (stock, mine):
                block = model.layer2[1]
                name, _, tensor = edited.partition(".")
                getattr(getattr(block, name), tensor).mul_(1.5).add_(0.1)
        same_step(stock, mine, images())


class _Memory(bytearray):
    """Memory for a tensor that can be referred to weakly."""


@both_ways
def test_an_address_is_not_reused():
    """`p.data` of the same parameter at the same version: memory that a plan was made from is not
    freed, or the next tensor might lie where it lay."""
    stock, mine = pair("basic")
    conv = mine.layer1[0].conv1
    weight, version = conv.weight.detach().clone(), conv.weight._version
    memory = _Memory(weight.numel() * weight.element_size())
    alive = weakref.ref(memory)
    conv.weight.data = torch.frombuffer(memory, dtype=weight.dtype).view_as(weight).copy_(weight)
    del memory
    same_outputs(stock, mine, images())
    conv.weight.data = weight
    gc.collect()
    assert alive() is not None, "freed while a plan was made from it"
    stock.layer1[0].conv1.weight.data.mul_(0.5)
    conv.weight.data = weight * 0.5
    same_outputs(stock, mine, images())
    gc.collect()
    assert alive() is None, "kept after the plan was made anew"
    assert conv.weight._version == version


def test_plans_of_weights_written_meanwhile(monkeypatch):
    """A write between the guard and the packing, as by another thread: the plan serves this call,
    and none after it."""
    stock, mine = pair("basic")
    packed = plan._pack

    def pack(unit, *rest):
        packs, conv = packed(unit, *rest), unit.conv
        if conv is mine.layer2[0].conv1 and not written:
            written.append(True)
            conv.weight.mul_(2)
        return packs

    written: list[bool] = []
    monkeypatch.setattr(plan, "_pack", pack)
    with torch.no_grad():
        mine(images())
        assert written and not made_from(mine.layer2[0])
        assert "network" not in [kind for kind, *_ in made_from(mine)]
        stock.layer2[0].conv1.weight.mul_(2)
    same_outputs(stock, mine, images())


def test_train_mode_drops_plans():
    _, mine = pair("basic")
    with torch.no_grad():
        mine(images())
    assert made_from(mine.layer1[0]) and made_from(mine)
    mine.train()
    assert not made_from(mine.layer1[0]) and not made_from(mine)
    block = mine.eval().layer1[0]
    with torch.no_grad():
        mine(images())
    assert made_from(block)
    block.train()
    assert not made_from(block)


@pytest.fixture
def one_process():
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@both_ways
@pytest.mark.parametrize("needs_grad", [False, True], ids=["inference", "frozen norms"])
def test_fsdp_all_gathered_weights(one_process, needs_grad):
    """FSDP all-gathers into the same tensor, of the same version and possibly at the same address:
    no guard can detect the previous step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    stock, mine = pair("basic")
    for model in (stock, mine):
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.requires_grad_(False)
    fully_shard(mine, mesh=init_device_mesh("cpu", (1,)))
    with torch.set_grad_enabled(needs_grad):
        for _ in range(4):
            agree(mine(images()), stock(images()))
            for model in (stock, mine):  # unsharded: FSDP does not reshard the root module
                for p in model.parameters():
                    p.data.mul_(1.1)
            # Gathered memory is freed: nothing that would read it is kept.
            assert not any(made(m) for m in mine.modules())


class Fused(nn.Module):
    """One call of conv_bn_relu, with a fixed scale and shift."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32, 3, 3))
        self.fixed = torch.ones(32), torch.zeros(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fr.conv_bn_relu(x, self.weight, *self.fixed, None, False, (1, 1), (1, 1), (1, 1), 1)


def test_op_on_fsdp_all_gathered_weights(one_process, monkeypatch):
    """Patched so that every forward has the same tensor, version and address, and no fingerprint,
    as on a GPU. After the last sharded module is deleted, packed weights are cached again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import _fully_shard, fully_shard

    monkeypatch.setattr(_fully_shard._fsdp_param, "free_storage", lambda tensor: None)
    monkeypatch.setattr(cache, "fingerprint", lambda table: 0)
    mine = fully_shard(Fused(), mesh=init_device_mesh("cpu", (1,)))
    x = torch.randn(2, 32, 8, 8)
    seen = set()
    hook = mine.register_forward_hook(
        lambda m, *_: seen.add((id(m.weight), m.weight._version, m.weight.data_ptr()))
    )
    with torch.no_grad():
        for _ in range(5):
            y = mine(x)
            mine.reshard()
            weight = mine.weight.to_local()
            torch.testing.assert_close(y, F.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-3)
            weight.mul_(1.5)
    assert len(seen) == 1
    hook.remove()
    del mine, weight
    gc.collect()
    plain = Fused()
    with torch.no_grad():
        for _ in range(3):
            plain(x)
    if native.load() is None:
        assert cache._cached[id(plain.weight)][-1] is not None


FUSED = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@both_ways
@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("needs_grad", [False, True], ids=["inference", "frozen norms"])
def test_fused_optimizers(kind, needs_grad):
    """They increment no version counter; and with frozen norms the model is not switched to
    train() and back."""
    _, mine = pair("basic")
    for m in mine.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.requires_grad_(False)
    optimizer = FUSED[kind]([p for p in mine.parameters() if p.requires_grad])
    for _ in range(4):
        with torch.set_grad_enabled(needs_grad):
            agree(mine(images()), clone(mine)(images()))
        mine(images()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@both_ways
@pytest.mark.parametrize("where", ["fc", "layer2", "layer1.0", "layer1.0.conv1", "maxpool"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_model_that_a_hook_refers_to_is_freed(where, training):
    _, mine = pair("basic")
    mine.train(training)
    for hooked in (False, True):
        if hooked:
            mine.get_submodule(where).register_forward_hook(lambda *_, model=mine: None)
        with torch.set_grad_enabled(training):
            mine(images())
    alive = weakref.ref(mine)
    del mine
    gc.collect()
    assert alive() is None


@both_ways
def test_replicas_do_not_share_what_was_made():
    """DataParallel's replicas copy a module's dict."""
    _, mine = pair("basic")
    with torch.no_grad():
        mine(images())
        replica = mine._replicate_for_data_parallel()
    assert made(mine) and not made(replica)


@both_ways
def test_replaced_dicts_and_reordered_blocks():
    stock, mine = pair("bottleneck")
    same_outputs(stock, mine, images())
    for model in (stock, mine):
        blocks = model.layer2._modules
        blocks["2"] = clone(blocks["1"])
        with torch.no_grad():
            blocks["2"].conv1.weight.mul_(-2)
    same_outputs(stock, mine, images())
    for model in (stock, mine):
        blocks = model.layer2._modules
        blocks["1"] = blocks.pop("1")
    same_outputs(stock, mine, images())
    for model in (stock, mine):
        other = clone(model.layer1[0].conv1)
        with torch.no_grad():
            other.weight.mul_(2)
        model.layer1[0].conv1.__setstate__(other.__dict__.copy())
    same_outputs(stock, mine, images())
