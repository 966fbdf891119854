"""Models changed by `fuse` in several processes: DistributedDataParallel, FSDP2 and forks."""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
import socket
import subprocess
import sys
import traceback
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp

import fused_resnet as fr
from fused_resnet.kernels import native
from tests.fusion.regions.region_helpers import programs
from tests.models.model_helpers import agree, images, pair

pytestmark = [
    pytest.mark.xdist_group("fused processes"),  # a single process makes the fixture
    pytest.mark.skipif(native.load() is not None, reason="no native kernels"),
]
needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)
TIMEOUT = datetime.timedelta(seconds=300)
STEPS = 2
TARGET = torch.arange(4) % 10


def stock_and_fused() -> tuple[nn.Module, nn.Module]:
    stock, _ = pair("bottleneck")
    return stock.train(), fr.fuse(copy.deepcopy(stock))


def _step(model: nn.Module, optimizer: Any, x: Tensor) -> dict[str, Tensor]:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), TARGET[: len(x)]).backward()
    grads = {f"d{n}": _whole(p.grad) for n, p in model.named_parameters()}
    optimizer.step()
    weights = {n: _whole(p) for n, p in model.named_parameters()}
    return grads | weights | {n: b.clone() for n, b in model.named_buffers()}


def _whole(t: Any) -> Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def _steps(model: nn.Module, rank: int) -> list[dict[str, Tensor]]:
    # Small steps: rounding of the weights must not change later gradients.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    found = []
    for i in range(STEPS):
        found.append(_step(model, optimizer, images(4, 64, seed=10 * i + rank)))
    return [{n.replace("module.", ""): t for n, t in step.items()} for step in found]


# --- jobs: run in each process --------------------------------------------------------------------


def replicated(rank: int) -> dict[str, Any]:
    stock, mine = stock_and_fused()
    out: dict[str, Any] = {}
    for name, model in (("stock", stock), ("fused", mine)):
        out[name] = _steps(nn.parallel.DistributedDataParallel(model), rank)
    out["paths"] = {e.path for e in fr.explain(mine, images(4, 64))}
    out["programs"] = [p.differentiable for p in programs(mine)]
    # Each process's own gradients: their mean is what DDP gives.
    alone = copy.deepcopy(stock_and_fused()[1])
    out["alone"] = _step(alone, torch.optim.SGD(alone.parameters(), 0.01), images(4, 64, rank))
    return out


def sharded(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    out: dict[str, Any] = {}
    for name, model in zip(("stock", "fused"), stock_and_fused(), strict=True):
        mesh = init_device_mesh("cpu", (2,))
        for block in [m for m in model.modules() if type(m).__name__ == "Bottleneck"]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        steps = _steps(model, rank)
        model.eval()
        with torch.no_grad():
            answers = [model(images(2, 32)) for _ in range(2)]
            for p in model.parameters():  # unseen: the next forward gathers it
                # The root's stay gathered.
                (p.to_local() if hasattr(p, "to_local") else p.data).mul_(0.9)
            answers.append(model(images(2, 32)))
        out[name] = steps, answers
    return out


JOBS = (replicated, sharded)


def _entry(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=TIMEOUT
    )
    out = {}
    for job in JOBS:
        try:
            out[job.__name__] = job(rank)
        except Exception:
            out[job.__name__] = traceback.format_exc()
            break  # the other process would wait
    torch.save(out, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every job returned, by process."""
    folder = tmp_path_factory.mktemp("processes")
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    both = [context.Process(target=_entry, args=(r, port, str(folder))) for r in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(600)
    assert [p.exitcode for p in both] == [0, 0]
    found = [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(2)]
    for out in found:
        for name, value in out.items():
            assert not isinstance(value, str), f"{name}:\n{value}"
    return found


def same_steps(stock: list[dict[str, Tensor]], mine: list[dict[str, Tensor]]) -> None:
    """Gradients, weights and buffers of every step."""
    for want, got in zip(stock, mine, strict=True):
        assert want.keys() == got.keys()
        norms = [t.norm().item() for n, t in want.items() if n.startswith("d")]
        floor, errors = 1e-3 * max(norms), []
        for name, t in want.items():
            if not t.is_floating_point():
                assert torch.equal(got[name], t), name
            elif name.startswith("d") and name[1:] in want:
                errors.append(((got[name] - t).norm() / (t.norm() + floor)).item())
                assert errors[-1] <= 0.1, f"{name}: {errors[-1]}"
            else:
                torch.testing.assert_close(got[name], t, rtol=1e-2, atol=1e-3, msg=name)
        assert sorted(errors)[len(errors) // 2] <= 0.02


@pytest.mark.slow
@needs_gloo
def test_distributed_data_parallel(outputs: list[dict[str, Any]]) -> None:
    ddp = [out["replicated"] for out in outputs]
    for out in ddp:
        assert out["paths"] == {"training"} and out["programs"] and all(out["programs"])
        same_steps(out["stock"], out["fused"])
    for a, b in zip(*(out["fused"] for out in ddp), strict=True):
        for name, t in a.items():  # statistics are each process's own until the next forward
            assert "running" in name or torch.equal(t, b[name]), name
    for name, t in ddp[0]["fused"][0].items():
        if name.startswith("d"):
            mean = (ddp[0]["alone"][name] + ddp[1]["alone"][name]) / 2
            torch.testing.assert_close(t, mean, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@needs_gloo
def test_fully_sharded(outputs: list[dict[str, Any]]) -> None:
    for out in (out["sharded"] for out in outputs):
        same_steps(out["stock"][0], out["fused"][0])
        for got, want in zip(out["fused"][1], out["stock"][1], strict=True):
            agree(got, want, 1e-2)
        assert not torch.allclose(out["fused"][1][2], out["fused"][1][1])


def test_fork_after_a_fused_forward() -> None:
    """os.fork, and a DataLoader's workers, with a model that was called before."""
    code = """
import os, torch, torchvision, fused_resnet as fr
torch.set_num_threads(1)
model, x = fr.fuse(torchvision.models.resnet18(num_classes=4).eval()), torch.randn(1, 3, 32, 32)
with torch.no_grad():
    want = [model(x) for _ in range(2)][1]
assert not torch.cuda.is_initialized()
pid = os.fork()
if pid == 0:
    with torch.no_grad():
        os._exit(0 if torch.equal(model(x), want) else 1)
assert os.waitpid(pid, 0)[1] == 0
class Data(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i):
        with torch.no_grad(): return model(x)[0]
for batch in torch.utils.data.DataLoader(Data(), num_workers=2, timeout=60):
    torch.testing.assert_close(batch, want)
model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
pid = os.fork()
if pid == 0:
    model.zero_grad()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    os._exit(0 if all(p.grad.isfinite().all() for p in model.parameters()) else 1)
assert os.waitpid(pid, 0)[1] == 0
"""
    pytest.importorskip("torchvision")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env=environment
    )
    assert run.returncode == 0, run.stderr
