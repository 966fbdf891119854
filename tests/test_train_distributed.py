"""Training over two gloo processes: as one process with the joined batch, and when one is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from train_helpers import config, losses, rows, together  # isort: skip - it skips what cannot run

import fused_resnet as fr
from fused_resnet.train import Config, Trainer, checkpointing, data, distributed, run
from fused_resnet.train.distributed import Place

pytestmark = [
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
    pytest.mark.timeout(300),
]

HERE = Place(0, 1, torch.device("cpu"))
STEPS = 3


def batches(count: int = 32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three batches; process r of p takes [r::p] of each."""
    part = data.load("digits", None, 8).train
    items = [part.items[i] for i in range(count * STEPS)]
    x = torch.stack([part.transform(image) for image, _ in items])
    return list(zip(x.split(count), torch.tensor([y for _, y in items]).split(count), strict=True))


def whole(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every process calls this."""
    return {k: v.clone() for k, v in distributed.model_state(trainer.model).items()}


# What each of two processes does for each of these, and what one process does for it alone.
CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, small buckets": {"bucket_mb": 0.01, "clip": 0.5},
    "ddp, accumulated": {"accumulate": 2},
    "ddp, lamb": {"optimizer": "lamb"},
    "ddp, minimal": {"activation_memory": "minimal", "ema": 0.5},
    "fsdp": {"parallel": "fsdp"},
    "fsdp, accumulated": {"parallel": "fsdp", "accumulate": 2, "clip": 0.5},
    "fsdp, lamb": {"parallel": "fsdp", "optimizer": "lamb"},
    "fsdp, minimal": {"parallel": "fsdp", "activation_memory": "minimal", "ema": 0.5},
}


def steps_in_processes(rank: int, folder: Path) -> None:
    with distributed.processes(config("never")) as place:
        for name, changes in CASES.items():
            trainer = Trainer(config("never", batch=32, **changes), 10, 11, place)
            found = [trainer.step(x[rank::2], y[rank::2]) for x, y in batches()]
            average = trainer.average
            content = {
                "steps": [tuple(s) for s in found], "model": whole(trainer),
                "average": None if average is None else distributed.model_state(average.module),
            }  # fmt: skip
            torch.save(content, folder / f"{name}-{rank}.pt")


@pytest.fixture(scope="module")
def stepped(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stepped")
    together(steps_in_processes, 2, folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_that_averages(stepped, name):
    """One process takes the parts of the batch one after the other, which normalise each by itself
    as in two processes, and averages their gradients.

    The sums of a gradient are taken in another order: after three steps at most 3e-7 of the largest
    weight apart was measured, SGD and LAMB alike; a tenth of an image's gradient left out is 1e-3.
    """
    changes = {**CASES[name], "parallel": "ddp"}
    made = config("never", batch=32, **{**changes, "accumulate": 2 * changes.get("accumulate", 1)})
    trainer = Trainer(made, 10, 11, HERE)
    want = []
    for x, y in batches():
        # The parts in the order in which processes and their passes take them.
        order = torch.cat([torch.arange(32)[rank::2] for rank in range(2)])
        want.append(trainer.step(x[order], y[order]))
    found = [torch.load(stepped / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
    learned = {n for n, _ in trainer.model.named_parameters()}
    for mine in found:
        for got, step in zip(mine["steps"], want, strict=True):
            assert got == pytest.approx(tuple(step), rel=2e-5)
        for key, value in trainer.model.state_dict().items():
            if key in learned:
                limit = 3e-6 * value.abs().max()
                assert (mine["model"][key] - value).abs().max() <= limit, key
        if trainer.average is not None:
            for key, value in trainer.average.module.state_dict().items():
                if key in learned:
                    assert torch.allclose(mine["average"][key], value, atol=3e-6), key
    for key in learned:
        assert torch.equal(found[0]["model"][key], found[1]["model"][key]), key


@pytest.mark.parametrize("kind", ["", ", accumulated", ", lamb", ", minimal"])
def test_sharded_parameters_are_ddps(stepped, kind):
    """fully_shard changes where parameters are, and nothing else: within rounding of DDP."""
    a, b = (torch.load(stepped / f"{p}{kind}-0.pt", weights_only=True) for p in ("fsdp", "ddp"))
    if kind == ", accumulated":  # which clips besides
        assert a["steps"][0][:2] == pytest.approx(b["steps"][0][:2], rel=1e-6)
        return
    for key, value in b["model"].items():
        assert torch.allclose(a["model"][key], value, rtol=1e-5, atol=3e-6), key


# --- tests, state and runs ------------------------------------------------------------------------


def measured_in_processes(rank: int, folder: Path, kind: str) -> None:
    made = config("never", batch=32, parallel=kind)
    with distributed.processes(made) as place:
        trainer = Trainer(made, 10, 11, place)
        for x, y in batches():
            trainer.step(x[rank::2], y[rank::2])
        part = data.load("digits", None, 8).test
        part = part._replace(items=part.items[:97])  # 32, 32, 32 and one that a process lacks
        torch.save(tuple(trainer.test(part, 10, lambda p: None)), folder / f"test-{rank}.pt")
        state = trainer.state()
        if place.first:
            torch.save(state, folder / "state.pt")
        # Somebody else's weights, then back.
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.mul_(1.5)
        ahead = [trainer.step(x[rank::2], y[rank::2]) for x, y in batches()]
        dist.barrier()
        for fresh in (False, True):
            back = Trainer(made, 10, 11, place) if fresh else trainer
            back.load(torch.load(folder / "state.pt", weights_only=True))
            again = [back.step(x[rank::2], y[rank::2]) for x, y in batches()]
            torch.save(
                {"steps": [tuple(s) for s in again], "ahead": [tuple(s) for s in ahead],
                 "model": whole(back)}, folder / f"again-{fresh}-{rank}.pt",
            )  # fmt: skip


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_tests_and_states_of_two_processes(tmp_path, kind):
    together(measured_in_processes, 2, tmp_path, kind)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(state["random"]) == 2
    # Every image once: what one process says of the same network.
    alone = Trainer(config("never", batch=32), 10, 11, HERE)
    alone.model.load_state_dict(state["model"])
    part = data.load("digits", None, 8).test
    want = alone.test(part._replace(items=part.items[:97]), 10, lambda p: None)
    for rank in range(2):
        accuracy, loss = torch.load(tmp_path / f"test-{rank}.pt", weights_only=True)
        assert accuracy == want.accuracy and loss == pytest.approx(want.loss, rel=1e-5)
    # The state brings back everything, into a used trainer and into a new one.
    used, fresh = (
        torch.load(tmp_path / f"again-{x}-0.pt", weights_only=True) for x in (False, True)
    )
    assert used["steps"] == fresh["steps"] != used["ahead"]
    assert all(torch.equal(used["model"][k], v) for k, v in fresh["model"].items())


def run_in_processes(rank: int, folder: Path, out: str, changes: dict[str, Any]) -> None:
    run(config(folder / out, **changes), resume=True)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_of_two_processes_resumes_with_the_same_losses(tmp_path, kind):
    changes = {"parallel": kind, "checkpoint_every": 4, "epochs": 1, "ema": 0.9}
    together(run_in_processes, 2, tmp_path, "one", changes)
    two = tmp_path / "two"
    two.mkdir()
    for path in (tmp_path / "one").iterdir():  # as it was after step 8
        if path.name != "checkpoint-00000011.pt":
            (two / path.name).write_bytes(path.read_bytes())
    together(run_in_processes, 2, tmp_path, "two", changes)
    assert losses(two) == losses(tmp_path / "one")
    assert [r["step"] for r in rows(two)] == [*range(1, 12), 11]  # the first process alone writes


def diverging_in_processes(rank: int, folder: Path, kind: str) -> None:
    made = config(folder / kind, parallel=kind, batch=32, lr=1e30, warmup=0.0)
    try:
        run(made)
    except RuntimeError as error:
        (folder / f"{kind}-{rank}.txt").write_text(str(error))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_loss_that_is_no_number_stops_every_process(tmp_path, kind):
    together(diverging_in_processes, 2, tmp_path, kind)
    for rank in range(2):
        text = (tmp_path / f"{kind}-{rank}.txt").read_text()
        assert re.search(r"step 2: .* \(process 0\) is the first that is not finite", text), text
    (kept,) = checkpointing.files(tmp_path / kind)
    assert checkpointing.read(kept)["step"] == 1


def synchronised_in_processes(rank: int, folder: Path) -> None:
    made = config("never", batch=32, sync_bn=True)
    with distributed.processes(made) as place:
        trainer = Trainer(made, 10, 11, place)
        assert sum(isinstance(m, fr.SyncBatchNorm) for m in trainer.model.modules()) == 7
        found = [tuple(trainer.step(x[rank::2], y[rank::2])) for x, y in batches()]
        torch.save({"steps": found, "model": whole(trainer)}, folder / f"{rank}.pt")


@pytest.mark.skipif(fr.native.load() is not None, reason="synchronised norms need native kernels")
def test_synchronised_norms_make_two_processes_one(tmp_path):
    """One process with the joined batch and plain norms; running statistics too."""
    together(synchronised_in_processes, 2, tmp_path)
    alone = Trainer(config("never", batch=32), 10, 11, HERE)
    want = [alone.step(x, y) for x, y in batches()]
    for rank in range(2):
        mine = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for got, step in zip(mine["steps"], want, strict=True):
            assert got == pytest.approx(tuple(step), rel=1e-4)
        for key, value in alone.model.state_dict().items():
            if value.is_floating_point():
                assert torch.allclose(mine["model"][key], value, rtol=1e-4, atol=1e-5), key


# --- torchrun -------------------------------------------------------------------------------------


def torchrun(out: Path, log: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
        "0", "--standalone", "-m", "fused_resnet.cli", "train", "--model", "resnet8", "--batch",
        "128", "--checkpoint-every", "2", "--device", "cpu", "--threads", "1", "--out", str(out),
        *options,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        if parent == pid:
            found.append(int(path.parent.name))
    return sorted(found)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_is_reported_and_the_run_resumes(tmp_path):
    pytest.importorskip("typer", reason="the command line needs typer and rich")
    pytest.importorskip("rich", reason="the command line needs typer and rich")
    out, log = tmp_path / "run", tmp_path / "log"
    launcher = torchrun(out, log, "--epochs", "4")
    try:
        deadline = time.monotonic() + 90
        while len(checkpointing.files(out)) < 2 and time.monotonic() < deadline:
            assert launcher.poll() is None, log.read_text()
            time.sleep(0.002)
        os.kill(children(launcher.pid)[-1], signal.SIGKILL)
        assert launcher.wait(60) != 0
    finally:
        launcher.kill()
    said = log.read_text()
    assert "SIGKILL" in said and re.search(r"exitcode *: -9", said), said
    kept = checkpointing.files(out)
    assert kept and all(checkpointing.read(path)["step"] < 44 for path in kept)

    launcher = torchrun(out, log, "--epochs", "4", "--resume")
    try:
        assert launcher.wait(120) == 0, log.read_text()
    finally:
        launcher.kill()
    said = log.read_text()
    assert said.count("resuming from checkpoint-") == 1 and said.count("test accuracy") == 1 + (
        said.count("epoch ")
    )
    whole_run = {"epochs": 4, "checkpoint_every": 2}
    together(run_in_processes, 2, tmp_path, "uninterrupted", whole_run)
    assert losses(out) == losses(tmp_path / "uninterrupted")


def test_the_two_ways_of_laying_out_need_no_more_than_their_environment(monkeypatch):
    """No torchrun, no process group: a single process, and --sync-bn is then a plain norm."""
    with distributed.processes(Config(device="cpu", sync_bn=True)) as place:
        assert place == HERE and not dist.is_initialized()
    model = distributed.prepare_distributed(fr.cifar_resnet(8), Config(sync_bn=True), HERE)
    x = torch.randn(4, 3, 8, 8)
    torch.manual_seed(0)
    y = model(x)
    y.sum().backward()
    plain = fr.cifar_resnet(8)
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(plain(x), y, atol=1e-6)
