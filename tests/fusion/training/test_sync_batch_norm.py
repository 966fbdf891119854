"""Synchronised batch norm in two CPU processes equals one process with the whole batch."""

from __future__ import annotations

import copy
import datetime
import os
import socket
import traceback

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp

import fused_resnet as fr
from fused_resnet.kernels import native
from fused_resnet.kernels.training import collectives
from fused_resnet.models.preact import PreactBlock

pytestmark = [
    pytest.mark.xdist_group("synchronised"),  # a single process makes the fixture that starts two
    pytest.mark.skipif(native.load() is not None, reason="needs the native kernels"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
]

LAST = torch.channels_last
TIMEOUT = datetime.timedelta(seconds=60)
CASES = {
    "basic": (fr.BasicBlock, 16, 16, 1),
    "basic, projection": (fr.BasicBlock, 16, 32, 2),
    "bottleneck": (fr.Bottleneck, 64, 16, 1),
    "bottleneck, projection": (fr.Bottleneck, 32, 16, 2),
}


def make(case: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    kind, C, planes, stride = CASES[case]
    K = planes * kind.expansion
    torch.manual_seed(0)
    branch = None
    if stride > 1 or K != C:
        branch = nn.Sequential(nn.Conv2d(C, K, 1, stride, bias=False), nn.BatchNorm2d(K))
    block = kind(C, planes, stride, branch)
    with torch.no_grad():
        for m in block.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(0, 0.3)
    return block.to(dtype).train()


def batch(case: str, N: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    block, C, planes, stride = CASES[case]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N, C, 8, 6, generator=g, dtype=torch.float64)
    x[:, 0] += 1e4  # E[x^2] - E[x]^2 would lose all digits of this channel
    dy = torch.randn(N, planes * block.expansion, 8 // stride, 6 // stride, generator=g,
                     dtype=torch.float64)  # fmt: skip
    return x.to(dtype).contiguous(memory_format=LAST), dy.to(dtype).contiguous(memory_format=LAST)


def result(block: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = block(x)
    y.backward(dy)
    grads = {f"d{n}": p.grad.clone() for n, p in block.named_parameters()}
    buffers = {n: b.clone() for n, b in block.named_buffers()}
    return {"y": y.detach(), "dx": x.grad} | grads | buffers


# --- jobs: run in each process, write their outputs to `out` --------------------------------------


def _share(rank: int, N: int, first: int) -> slice:
    return slice(0, first) if rank == 0 else slice(first, N)


def _convert(module: nn.Module, group: object = None) -> nn.Module:
    return fr.convert_sync_batchnorm(module, group)


def every_case(rank: int, out: dict) -> None:
    """Every case, with equal and unequal batches, at every level."""
    for case in CASES:
        for first in (2, 4):
            x, dy = batch(case)
            mine = _share(rank, len(x), first)
            previous = None
            for level in ("full", "low", "lower"):
                convert = fr.convert_sync_batchnorm
                if level == "lower":  # PyTorch's modules use the same path
                    convert = nn.SyncBatchNorm.convert_sync_batchnorm
                block = convert(make(case))
                fr.set_activation_memory(block, level)
                assert {e.path for e in fr.explain(block)} == {"training"}
                outputs = result(block, x[mine], dy[mine])
                for name, value in outputs.items():
                    if name.startswith("d") and name[1:] in dict(block.named_parameters()):
                        dist.all_reduce(value)
                if previous is not None:
                    assert all(torch.equal(previous[k], outputs[k]) for k in previous), level
                previous = outputs
            out[case, first, rank] = previous


def collective_calls(rank: int, out: dict) -> None:
    """Collectives called in one forward and backward."""
    calls: list[str] = []
    plain = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}
    for name, call in plain.items():
        setattr(dist, name, lambda *a, p=call, n=name, **k: (calls.append(n), p(*a, **k))[1])
    block = _convert(make("bottleneck, projection"))
    x, dy = batch("bottleneck, projection", 4)
    y = block(x[2 * rank : 2 * rank + 2].requires_grad_())
    forward = list(calls)
    calls.clear()
    y.backward(dy[2 * rank : 2 * rank + 2])
    out["forward", rank], out["backward", rank] = forward, list(calls)
    calls.clear()
    block.eval()
    with torch.no_grad():
        block(x)
    out["eval", rank] = list(calls)
    for name, call in plain.items():
        setattr(dist, name, call)


def groups(rank: int, out: dict) -> None:
    """A group of one process does not communicate; a block of mixed norms is not fused."""
    group = [dist.new_group([r]) for r in range(2)][rank]
    block = _convert(make("basic"), group)
    x, dy = batch("basic", 4)
    out["single", rank] = result(block, x[2 * rank : 2 * rank + 2], dy[2 * rank : 2 * rank + 2])
    mixed = make("basic")
    mixed.bn1 = _convert(mixed.bn1)
    out["mixed", rank] = result(mixed, x[2 * rank : 2 * rank + 2], dy[2 * rank : 2 * rank + 2])


def explained(rank: int, out: dict) -> None:
    """explain reports blocks that would raise on the CPU as not fused."""
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    whole, bias, frozen, two = (_convert(make("basic, projection")) for _ in range(4))
    bias.conv1.bias = nn.Parameter(torch.zeros(32, dtype=torch.float64))
    frozen.bn2.eval()
    two.bn1.process_group, two.bn2.process_group = groups
    x, _ = batch("basic, projection", 4)
    for name, block in {"whole": whole, "bias": bias, "frozen": frozen, "two": two}.items():
        (e,) = fr.explain(block)
        block(x)
        out[name, rank] = (e.fused, e.path, e.reason)


def empty_batch(rank: int, out: dict) -> None:
    """Process 1 has no image and takes part, at every level and without gradients."""
    for case in CASES:
        x, dy = batch(case)
        mine = slice(0, 5 if rank == 0 else 0)
        for level in ("full", "low", "lower", "minimal"):
            block = _convert(make(case))
            fr.set_activation_memory(block, level)
            out[case, level, rank] = result(block, x[mine], dy[mine])
        with torch.no_grad():
            out[case, "no_grad", rank] = {"y": block(x[mine])} | dict(block.named_buffers())
    for level in ("full", "minimal"):
        torch.manual_seed(0)
        for model in (
            fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=3),
            fr.cifar_resnet(8, num_classes=3),
        ):
            fr.set_activation_memory(_convert(model), level)
            torch.manual_seed(rank)
            x = torch.randn(3 if rank == 0 else 0, 3, 33, 33)
            parallel = nn.parallel.DistributedDataParallel(model, static_graph=True)
            parallel(x).square().sum().backward()
            out[type(model).__name__, level, rank] = {
                n: p.grad for n, p in model.named_parameters()
            } | dict(model.named_buffers())
    try:
        _convert(make("basic"))(batch("basic")[0][:0])
    except ValueError as error:
        out["error", rank] = str(error)


def preact(rank: int, out: dict) -> None:
    """Pre-activation blocks, with no image on process 1."""
    for shortcut in (None, nn.Conv2d(16, 32, 1, 2, bias=False).double()):
        torch.manual_seed(0)
        planes, stride = (16, 1) if shortcut is None else (32, 2)
        block = PreactBlock(16, planes, stride, copy.deepcopy(shortcut)).double().train()
        if shortcut is not None:
            nn.init.constant_(block.downsample.weight, 0.1)
        x, _ = batch("basic")
        dy = torch.ones(5, planes, 8 // stride, 6 // stride, dtype=torch.float64)
        if rank == 0:
            out[planes, "want"] = result(copy.deepcopy(block), x, dy)
        mine = slice(0, 5 if rank == 0 else 0)
        out[planes, rank] = result(_convert(block), x[mine], dy[mine])


def standalone(rank: int, out: dict) -> None:
    """A norm outside any block; in the second pass process 1 has no image."""
    x, dy = batch("basic")
    for first in (4, 5):
        for affine in (True, False):
            norm = _convert(nn.BatchNorm2d(16, affine=affine).double())
            mine = _share(rank, len(x), first)
            out[first, affine, rank] = result(norm, x[mine], dy[mine])


def whole_networks(rank: int, out: dict) -> None:
    """Networks with a last norm outside the blocks, and with stochastic depth."""
    for name, options in {
        "preact": {"block": "preact"},
        "stochastic": {"stochastic_depth": 0.9},
    }.items():
        torch.manual_seed(0)
        model = _convert(fr.cifar_resnet(20, num_classes=3, **options)).double().train()
        state = copy.deepcopy(model.state_dict())
        torch.manual_seed(rank)  # a different random state per process
        g = torch.Generator().manual_seed(2)
        x = torch.randn(6, 3, 8, 8, generator=g, dtype=torch.float64)
        y = model(x[_share(rank, 6, 4)])
        (y.square().sum() / 6).backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad
                 for n, p in model.named_parameters()}  # fmt: skip
        for grad in grads.values():
            dist.all_reduce(grad)
        out[name, rank] = grads
        out[f"{name} state"] = state


def network(rank: int, out: dict) -> None:
    """Three optimizer steps of a whole network under DistributedDataParallel."""
    torch.manual_seed(0)
    model = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=3).double().train()
    out["model", rank] = copy.deepcopy(model.state_dict())
    model = nn.parallel.DistributedDataParallel(_convert(model), static_graph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    g = torch.Generator().manual_seed(2)
    for _ in range(3):
        x = torch.randn(4, 3, 33, 33, generator=g, dtype=torch.float64)
        half = x[2 * rank : 2 * rank + 2]
        optimizer.zero_grad()
        model(half).square().mean().backward()
        optimizer.step()
    out["trained", rank] = model.module.state_dict()


def double_backward(rank: int, out: dict) -> None:
    block = _convert(make("basic"))
    x, _ = batch("basic", 4)
    x = x[2 * rank : 2 * rank + 2].requires_grad_()
    y = block(x).square().sum()
    try:
        torch.autograd.grad(y, x, create_graph=True)
    except NotImplementedError as error:
        out["error", rank] = str(error)


def autocast(rank: int, out: dict) -> None:
    block = _convert(make("bottleneck", torch.float32))
    x, dy = batch("bottleneck", 4, torch.float32)
    x[:, 0] -= 1e4
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x[2 * rank : 2 * rank + 2])
    y.backward(dy[2 * rank : 2 * rank + 2].bfloat16())
    grads = {n: p.grad for n, p in block.named_parameters()}
    for grad in grads.values():
        dist.all_reduce(grad)
    out["grads", rank] = grads


def left_and_joined(rank: int, out: dict) -> None:
    """A step prepared in a group of processes, used after that is left and after another is joined,
    beside a copy whose step is prepared then."""
    block = _convert(make("bottleneck, projection"))
    x, dy = (t[2 * rank : 2 * rank + 2] for t in batch("bottleneck, projection", 4))
    store = dist.PrefixStore("joined again", dist.distributed_c10d._get_default_store())
    for when in ("joined", "left", "joined again"):
        if when == "left":
            dist.destroy_process_group()
        elif when == "joined again":
            dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=TIMEOUT)
        fresh = copy.deepcopy(block)
        block.zero_grad()
        got, want = result(block, x, dy), result(fresh, x, dy)
        out[when, rank] = all(torch.equal(got[name], want[name]) for name in want)


def peer_exited(rank: int, out: dict) -> None:
    """The other process has exited: an error in bounded time, no hang."""
    block = _convert(make("basic"))
    x, _ = batch("basic", 4)
    if rank == 1:
        os._exit(0)
    try:
        block(x)
    except RuntimeError as error:
        out["error", rank] = str(error)


JOBS = (
    every_case, collective_calls, groups, explained, empty_batch, preact, standalone,
    whole_networks, network, double_backward, autocast, left_and_joined,
    peer_exited,
)  # fmt: skip


def _entry(rank: int, port: int, folder: str) -> None:
    """Runs every job in one pair of processes: starting a pair costs an import of PyTorch."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=TIMEOUT
    )
    for job in JOBS:
        out: dict = {}
        try:
            job(rank, out)
        except BaseException:
            out = {"traceback": traceback.format_exc()}
        torch.save(out, f"{folder}/{job.__name__}-{rank}.pt")
    os._exit(0)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The jobs' outputs, by name of the job."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    processes = [context.Process(target=_entry, args=(r, port, str(folder))) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=200)
        process.kill()
    written: dict[str, dict] = {job.__name__: {} for job in JOBS}
    for file in sorted(folder.glob("*.pt")):
        out = torch.load(file, weights_only=True)
        assert "traceback" not in out, f"{file.stem}: {out['traceback']}"
        written[file.stem.split("-")[0]] |= out
    return written


# --- checks of the outputs ------------------------------------------------------------------------


def test_equal_to_one_process(outputs):
    outputs = outputs["every_case"]
    for case in CASES:
        x, dy = batch(case)
        want = result(make(case), x, dy)
        for first in (2, 4):
            one, two = outputs[case, first, 0], outputs[case, first, 1]
            for key, exact in want.items():
                got = torch.cat([one[key], two[key]]) if key in ("y", "dx") else one[key]
                if exact.dtype == torch.int64:
                    assert torch.equal(got, exact)
                    continue
                if key not in ("y", "dx"):
                    assert torch.equal(one[key], two[key]), key
                error = (got - exact).norm() / exact.norm()
                # The channel of mean 1e4 costs four digits of float64's sixteen.
                assert error <= 1e-9, (case, first, key, error)


def test_number_of_collectives(outputs):
    outputs = outputs["collective_calls"]
    for rank in range(2):
        assert outputs["forward", rank] == ["all_gather"] * 4
        assert outputs["backward", rank] == ["all_reduce"] * 3  # bn3 and downsample's norm in one
        assert outputs["eval", rank] == []


def test_process_groups(outputs):
    outputs = outputs["groups"]
    x, dy = batch("basic", 4)
    for rank in range(2):
        mine = slice(2 * rank, 2 * rank + 2)
        want = result(make("basic"), x[mine], dy[mine])
        assert all(torch.equal(outputs["single", rank][k], want[k]) for k in want)
    y = torch.cat([outputs["mixed", rank]["y"] for rank in range(2)])
    block = make("basic")
    halves = [x[:2], x[2:]]
    h = torch.relu(block.bn1(block.conv1(x)))  # synchronised, then per process
    want = [torch.relu(block.bn2(block.conv2(h[2 * r : 2 * r + 2])) + halves[r]) for r in range(2)]
    torch.testing.assert_close(y, torch.cat(want).detach(), rtol=1e-9, atol=1e-9)


def test_unfused_blocks_are_explained(outputs):
    outputs = outputs["explained"]
    for rank in range(2):
        assert outputs["whole", rank] == (True, "training", "batch statistics")
        for name in ("bias", "frozen", "two"):
            fused, path, reason = outputs[name, rank]
            assert (fused, path) == (False, "stock")
            assert "with synchronised norms a block is fused as a whole" in reason


def close(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got, want) or (got - want).norm() <= 1e-9 * want.norm()


def test_process_without_images(outputs):
    outputs = outputs["empty_batch"]
    for case in CASES:
        x, dy = batch(case)
        block = make(case)
        want = result(block, x, dy)
        parameters = {f"d{n}" for n, _ in block.named_parameters()}
        for level in ("full", "low", "lower", "minimal"):
            some, none = outputs[case, level, 0], outputs[case, level, 1]
            assert all(close(some[k], want[k]) for k in want), (case, level)
            for key in want:
                if key in ("y", "dx"):
                    assert none[key].shape == (0, *want[key].shape[1:])
                elif key in parameters:
                    assert none[key].shape == want[key].shape and not none[key].any()
                else:
                    assert torch.equal(none[key], some[key]), key
        some, none = outputs[case, "no_grad", 0], outputs[case, "no_grad", 1]
        for name, _ in block.named_buffers():
            assert torch.equal(some[name], none[name]), name
        assert none["y"].shape == (0, *want["y"].shape[1:])
    for name in ("ResNet", "CifarResNet"):
        for level in ("full", "minimal"):
            some, none = outputs[name, level, 0], outputs[name, level, 1]
            assert all(torch.equal(some[k], none[k]) for k in some)  # averaged by DDP
            assert all(v.isfinite().all() for v in some.values())
            assert all(close(v, outputs[name, "full", 0][k]) for k, v in some.items())
    for rank in range(2):
        assert (
            "x must hold an image on at least one process, got none on all"
            in (outputs["error", rank])
        )


def test_preactivation_in_a_process_without_images(outputs):
    outputs = outputs["preact"]
    for planes in (16, 32):
        want, some, none = outputs[planes, "want"], outputs[planes, 0], outputs[planes, 1]
        assert all(close(some[k], want[k]) for k in want), planes
        for name in want:
            if "running" in name:
                assert torch.equal(some[name], none[name])
            elif name.startswith("d") and "." in name:
                assert not none[name].any()


def test_standalone_norm(outputs):
    outputs = outputs["standalone"]
    x, dy = batch("basic")
    for first in (4, 5):
        for affine in (True, False):
            want = result(nn.BatchNorm2d(16, affine=affine).double(), x, dy)
            a, b = outputs[first, affine, 0], outputs[first, affine, 1]
            for key in want:
                if key in ("y", "dx"):
                    mine = torch.cat([a[key], b[key]])
                elif key.startswith("d"):
                    mine = a[key] + b[key]
                else:
                    mine = a[key]
                    assert torch.equal(a[key], b[key]), key
                torch.testing.assert_close(mine, want[key], rtol=1e-9, atol=1e-9, msg=key)


def test_whole_networks(outputs):
    outputs = outputs["whole_networks"]
    model = fr.cifar_resnet(20, num_classes=3, block="preact").double().train()
    model.load_state_dict(outputs["preact state"])
    g = torch.Generator().manual_seed(2)
    x = torch.randn(6, 3, 8, 8, generator=g, dtype=torch.float64)
    (model(x).square().sum() / 6).backward()
    for name, p in model.named_parameters():
        assert close(outputs["preact", 0][name], p.grad), name
    left_out = [n for n, grad in outputs["stochastic", 0].items() if not grad.any()]
    assert 0 < len(left_out) < len(outputs["stochastic", 0])
    assert all(
        torch.equal(v, outputs["stochastic", 1][n]) for n, v in outputs["stochastic", 0].items()
    )


def test_a_network_under_ddp(outputs):
    outputs = outputs["network"]
    model = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=3).double().train()
    model.load_state_dict(outputs["model", 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    g = torch.Generator().manual_seed(2)
    for _ in range(3):
        x = torch.randn(4, 3, 33, 33, generator=g, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        one, two = outputs["trained", 0][name], outputs["trained", 1][name]
        assert torch.equal(one, two), name
        torch.testing.assert_close(one, value, rtol=1e-8, atol=1e-9, msg=name)


def test_double_backward_raises(outputs):
    outputs = outputs["double_backward"]
    for rank in range(2):
        assert "synchronised batch norm is not differentiable twice" in outputs["error", rank]


def test_under_autocast(outputs):
    outputs = outputs["autocast"]
    block = make("bottleneck", torch.float32)
    x, dy = batch("bottleneck", 4, torch.float32)
    x[:, 0] -= 1e4
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    y.backward(dy.bfloat16())
    for name, p in block.named_parameters():
        # Statistics differ in the last bit, which sometimes changes the rounding to bfloat16.
        assert (outputs["grads", 0][name] - p.grad).norm() <= 0.02 * p.grad.norm(), name


def test_processes_left_and_joined(outputs):
    outputs = outputs["left_and_joined"]
    assert len(outputs) == 6 and all(outputs.values()), outputs


def test_exited_process_raises(outputs):
    outputs = outputs["peer_exited"]
    assert outputs["error", 0]


def test_without_other_processes():
    """Without a process group it is batch norm, as in PyTorch's module."""
    for case in CASES:
        x, dy = batch(case, 3)
        got, want = result(_convert(make(case)), x, dy), result(make(case), x, dy)
        assert all(torch.equal(got[k], want[k]) for k in want)
    model = _convert(fr.resnet18(num_classes=3)).eval()
    plain = fr.resnet18(num_classes=3).eval()
    plain.load_state_dict(model.state_dict())
    assert all(e.fused for e in fr.explain(model))
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(model(x), plain(x))


def test_conversion_keeps_parameters_and_settings():
    model = fr.resnet18(num_classes=3)
    parameters, state = list(model.parameters()), model.state_dict()
    model.bn1.momentum, model.bn1.eps = None, 1e-3
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    converted = fr.convert_sync_batchnorm(model)
    assert converted is model
    assert {n for n, m in model.named_modules() if type(m) is fr.SyncBatchNorm} == norms
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    assert model.bn1.momentum is None and model.bn1.eps == 1e-3
    assert {type(m) for m in copy.deepcopy(model).modules() if "Norm" in type(m).__name__} == {
        fr.SyncBatchNorm
    }
    group, other = object(), object()
    reconverted = fr.convert_sync_batchnorm(fr.convert_sync_batchnorm(model, group), other)
    stock = nn.SyncBatchNorm.convert_sync_batchnorm(
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(4)), group), other
    )
    assert reconverted.bn1.process_group is stock[0].process_group is other
    assert reconverted.bn1.weight is parameters[1] and reconverted.bn1.momentum is None
    norm = fr.convert_sync_batchnorm(nn.BatchNorm2d(4))
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(norm(x), nn.BatchNorm2d(4)(x))


def test_merging_is_exact():
    """Distant means and different counts, one of them zero."""
    parts = [torch.randn(n, 3, dtype=torch.float64) + 1e6 * i for i, n in enumerate((5, 0, 7, 1))]
    stats = [
        torch.stack([p.mean(0), p.var(0, unbiased=False)]) if len(p) else torch.zeros(2, 3).double()
        for p in parts
    ]
    everything = torch.cat(parts)

    class Group:
        """Stands in for all_gather between processes."""

        @staticmethod
        def gather(gathered: list[Tensor], local: Tensor, group: object) -> None:
            for into, s, p in zip(gathered, stats, parts, strict=True):
                into.copy_(torch.cat([s.flatten(), s.new_tensor([float(len(p))])]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", Group.gather)
        patch.setattr(dist, "get_world_size", lambda group: len(parts))
        merged, total = collectives.merge(stats[0], 5, Group)
    assert float(total) == len(everything)
    torch.testing.assert_close(merged[0], everything.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(merged[1], everything.var(0, unbiased=False), rtol=1e-13, atol=0)
