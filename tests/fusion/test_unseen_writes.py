"""Writes that move neither version counter nor address: the next call sees them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn

import fused_resnet as fr
from fused_resnet.fusion.store import made_from
from fused_resnet.kernels import cache, fingerprint, native
from tests.models.model_helpers import agree, both_ways, images, made, pair, same_outputs, same_step

pytestmark = pytest.mark.skipif(native.load() is not None, reason="needs the native kernels")


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Guards compare every byte until they have settled: here only in the first call after."""
    monkeypatch.setattr("fused_resnet.fusion.guard._SETTLING_S", 0.0)


def conv_of(model: Any) -> nn.Conv2d:
    return model.layer3[0].conv1


def _numpy(model: Any) -> None:
    conv_of(model).weight.detach().numpy()[:] *= 0.5


def _dlpack(model: Any) -> None:
    torch.from_dlpack(conv_of(model).weight.detach()).data.mul_(0.5)


def _everything(model: Any) -> None:
    """A mean teacher or moving average, as most are written."""
    for p in model.parameters():
        p.data.mul_(0.9)


def _alias(model: Any) -> None:
    """The memory of one parameter becomes another's."""
    blocks = model.layer2
    blocks[1].bn1.weight.data = blocks[1].bn2.weight.data


def _refilled(model: Any) -> None:
    """As sharding does: the storage is freed, allocated and filled again."""
    storage = conv_of(model).weight.untyped_storage()
    kept, size = conv_of(model).weight.detach() * 0.5, storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    conv_of(model).weight.data.copy_(kept)


WRITES = {
    "data.mul_": lambda m: conv_of(m).weight.data.mul_(0.5),
    "NumPy": _numpy,
    "DLPack": _dlpack,
    "all parameters": _everything,
    "an alias": _alias,
    "storage refilled": _refilled,
    "an output channel": lambda m: conv_of(m).weight.data[3].mul_(-5),
    "an input channel": lambda m: conv_of(m).weight.data[:, 17].mul_(-9),
    "a tap": lambda m: conv_of(m).weight.data[:, :, 0, -1].mul_(3),
    "one value of a mean": lambda m: m.layer2[0].downsample[1].running_mean.data[5].sub_(3),
    "one value of a variance": lambda m: m.bn1.running_var.data[63].mul_(9),
    "a norm's weight": lambda m: m.layer4[0].downsample[1].weight.data[-1].mul_(8),
    "a norm's bias": lambda m: m.layer4[0].bn2.bias.data[0].add_(8),
    "a projection": lambda m: m.layer2[0].downsample[0].weight.data.neg_(),
    "the stem": lambda m: m.conv1.weight.data.mul_(0.7),
}


@both_ways
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_writes(kind, write, layout):
    stock, mine = (m.to(memory_format=layout) for m in pair(kind))
    for _ in range(3):
        before = same_outputs(stock, mine, images())
    assert made(mine)
    write(stock), write(mine)
    after = same_outputs(stock, mine, images())
    assert not torch.equal(before, after)


@pytest.mark.parametrize("share", [0.01, 0.05])
@pytest.mark.parametrize("seed", range(5))
def test_values_at_random(seed, share):
    """1% of the values of each large weight."""
    _, mine = pair("basic")
    with torch.no_grad():
        mine(images())
    for m in mine.modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() * 4 > 2**15:
            (network,) = (e for key, e in made_from(mine).items() if key[0] == "network")
            assert network.holds()
            chosen = (
                torch.rand(m.weight.shape, generator=torch.Generator().manual_seed(seed)) < share
            )
            kept = m.weight.detach().clone()
            m.weight.data[chosen] += 1
            assert not network.holds()
            m.weight.data.copy_(kept)


@both_ways
def test_one_value_written_in_place():
    """Its version counter shows it, where a fingerprint may not."""
    stock, mine = pair("basic")
    for index in range(4):
        for _ in range(3):
            same_outputs(stock, mine, images())
        with torch.no_grad():
            for model in (stock, mine):
                model.layer4[0].conv2.weight.view(-1)[1000 + 97 * index] += 1e3
        same_outputs(stock, mine, images())


@both_ways
def test_exchanged_values():
    """Two weights of the same shape: the sum of all values stays the same."""
    stock, mine = pair("basic")
    same_outputs(stock, mine, images())
    for model in (stock, mine):
        a, b = model.layer2[1].conv1.weight.data, model.layer2[1].conv2.weight.data
        kept = a.clone()
        a.copy_(b), b.copy_(kept)
    same_outputs(stock, mine, images())


@both_ways
def test_parameters_in_one_buffer():
    """Flattened parameters, written as one: addresses are not multiples of a cache line."""
    stock, mine = pair("basic")
    flats = []
    for model in (stock, mine):
        flat = torch.cat([torch.zeros(1), *(p.detach().flatten() for p in model.parameters())])
        at = 1
        for p in model.parameters():
            p.data = flat[at : at + p.numel()].view_as(p)
            at += p.numel()
        flats.append(flat)
    same_outputs(stock, mine, images())
    for flat in flats:
        flat.mul_(0.9)
    same_outputs(stock, mine, images())
    for flat in flats:
        flat.detach().numpy()[:] *= 0.9
    same_outputs(stock, mine, images())


@both_ways
def test_frozen_norms_with_gradients():
    """Folded norms, and weights packed for the op."""
    stock, mine = pair("basic")
    for _ in range(3):
        same_step(stock, mine, images())
    for write in (_everything, WRITES["one value of a mean"], WRITES["data.mul_"]):
        write(stock), write(mine)
        for _ in range(3):
            same_step(stock, mine, images())


def test_the_op():
    x, weight, scale, shift = (
        torch.randn(1, 64, 8, 8),
        torch.randn(64, 64, 3, 3),
        torch.ones(64),
        torch.zeros(64),
    )
    for t in (weight, scale, shift, weight):
        for _ in range(3):
            y = fr.conv_bn_relu(x, weight, scale, shift, padding=1)
        assert len(cache._cached) > 0
        t.data.add_(0.5)
        want = fr.conv_bn_relu(x, weight.clone(), scale.clone(), shift.clone(), padding=1)
        assert not torch.equal(y, want)
        assert torch.equal(fr.conv_bn_relu(x, weight, scale, shift, padding=1), want)


def _write_in_another_process(weight: torch.Tensor) -> None:
    weight.mul_(0.5)


def test_memory_that_was_freed():
    """A fingerprint reads what the tensors have now: where they were, there may be no memory."""
    torch.manual_seed(0)
    size = 1024 * 1024 * 9 * 4  # larger than what glibc keeps when it is freed
    stock = nn.Sequential(nn.Conv2d(1024, 1024, 3, bias=False), nn.BatchNorm2d(1024)).eval()
    mine, x = fr.fuse(stock), torch.randn(1, 1024, 4, 4)
    with torch.no_grad():
        for _ in range(3):
            agree(mine(x), stock(x))
        storage, address = stock[0].weight.untyped_storage(), stock[0].weight.data_ptr()
        storage.resize_(0)
        other = torch.empty(size, dtype=torch.uint8)
        storage.resize_(size)
        del other
        assert stock[0].weight.data_ptr() != address
        stock[0].weight.data.normal_(0, 0.02)
        agree(mine(x), stock(x))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_fingerprint_that_was_started(count):
    """It is the same however many threads read ahead, and what else is asked meanwhile."""
    torch.manual_seed(0)
    one, other = ([torch.randn(64, 64, 3, 3) for _ in range(n)] for n in (9, 2))
    first, second = (
        fingerprint.table_of(fingerprint.ranges_of(tensors)) for tensors in (one, other)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    wanted, others = fingerprint.fingerprint(first), fingerprint.fingerprint(second)
    assert wanted != others
    torch.set_num_threads(count)
    model, x = fr.resnet18(num_classes=3).eval(), torch.randn(1, 3, 32, 32)
    try:
        for _ in range(50):  # more than regions at once
            fingerprint.start(first)
            assert fingerprint.fingerprint(first) == wanted
            fingerprint.start(first)
            assert fingerprint.fingerprint(second) == others
            fingerprint.start(second)
            fingerprint.start(first)
            with torch.no_grad():
                model(x)  # asks for its own
            assert fingerprint.fingerprint(first) == wanted
            thread = threading.Thread(target=fingerprint.start, args=(first,))
            thread.start()
            thread.join()
        one[3].data += 1
        fingerprint.start(first)
        assert fingerprint.fingerprint(first) != wanted
    finally:
        torch.set_num_threads(before)


@both_ways
def test_another_process():
    stock, mine = pair("basic")
    mine.share_memory()
    same_outputs(stock, mine, images())
    process = mp.get_context("spawn").Process(
        target=_write_in_another_process, args=(conv_of(mine).weight.detach(),)
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0
    conv_of(stock).weight.data.mul_(0.5)
    same_outputs(stock, mine, images())


@both_ways
def test_collectives():
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs gloo")
    stock, mine = pair("basic")
    same_outputs(stock, mine, images())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for model in (stock, mine):
            conv_of(model).weight.data.mul_(0.5)
            for p in model.parameters():
                dist.all_reduce(p.data)
                dist.broadcast(p.data, 0)
    finally:
        dist.destroy_process_group()
    same_outputs(stock, mine, images())


@both_ways
def test_what_is_missed_and_refresh():
    """A single value of a large weight may be missed; `refresh` and check="full" do not."""
    stock, mine = pair("basic")
    full = fr.inference(mine, images(), check="full")
    same_outputs(stock, mine, images())
    with torch.no_grad():
        for index in range(4):
            for model in (stock, mine):
                model.layer4[0].conv2.weight.data.view(-1)[1000 + index] += 1e3
            want = stock(images())
            if index % 2:
                agree(full(images()), want)
            fr.refresh(mine)
            agree(mine(images()), want)
    with pytest.raises(TypeError, match=r"refresh: model must be an nn\.Module, got int"):
        fr.refresh(3)
    with pytest.raises(ValueError, match="check must be one of sampled, full, none, got 'all'"):
        fr.inference(mine, images(), check="all")


@both_ways
def test_check_none_reads_nothing(monkeypatch):
    _, mine = pair("basic")
    none = fr.inference(mine, images(), check="none")
    none(images())
    monkeypatch.setattr("fused_resnet.fusion.guard.fingerprint", lambda _: 1 / 0)
    none(images())
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        mine(images())


@pytest.mark.parametrize("offset", [0, 1, 3, 15])
@pytest.mark.parametrize(
    "shape", [(64, 64, 3, 3), (64, 2048, 1, 1), (512, 256, 1, 1), (16, 100, 5, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_channel_is_covered(shape, offset, dtype):
    """Any write to one output channel or to one input channel changes the fingerprint."""
    count = torch.Size(shape).numel()
    weight = torch.zeros(count + offset, dtype=dtype)[offset:].view(shape)
    table = fingerprint.table_of(fingerprint.ranges_of([weight]))
    empty = fingerprint.fingerprint(table)
    assert fingerprint.fingerprint(table) == empty
    for dim in (0, 1):
        for i in range(shape[dim]):
            weight.select(dim, i).fill_(1)
            assert fingerprint.fingerprint(table) != empty, (dim, i)
            weight.select(dim, i).fill_(0)
    assert fingerprint.fingerprint(table) == empty


def test_tensors_that_are_not_dense():
    whole = torch.randn(128, 64, 3, 3)
    weight = whole[::2]
    table = fingerprint.table_of(fingerprint.ranges_of([weight, whole.transpose(0, 1)[:5]]))
    before = fingerprint.fingerprint(table)
    weight[-1, -1, -1, -1] += 1
    assert fingerprint.fingerprint(table) != before
    assert fingerprint.ranges_of([torch.empty(0), torch.empty(3, device="meta")]) == []
    with pytest.raises(RuntimeError, match=r"fingerprint: spans must be int64 of shape \(n, 3\)"):
        torch.ops.fused_resnet_native.fingerprint(torch.zeros(3))


def test_an_interrupted_comparison_reads_nothing_later():
    """Weights that are freed after an interrupt, as the large one's memory is given back."""
    weight = torch.zeros(2**24)
    table = fingerprint.table_of(fingerprint.ranges_of([weight]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fingerprint.start(table)
        del weight
        fingerprint.start(fingerprint.table_of(fingerprint.ranges_of([torch.zeros(3)])))
    finally:
        torch.set_num_threads(threads)
    small = torch.zeros(3)
    assert fingerprint.fingerprint(fingerprint.table_of(fingerprint.ranges_of([small])))
