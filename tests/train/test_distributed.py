"""`fused-resnet train` on two processes, replicated or sharded: as one with the joined batch.

One launch of torchrun runs this file and does every job below; the tests look at what it wrote.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

import fused_resnet as fr
from fused_resnet.fusion.training.activation_memory import LEVELS
from fused_resnet.kernels import native
from fused_resnet.parity.checkpoint import CheckpointError
from fused_resnet.train import Config, NonFinite, OutOfMemory, distributed, loop, run, state
from fused_resnet.train import data as datasets
from fused_resnet.train.diagnose import first_of
from tests import ROOT

for package in ("torchvision", "torchmetrics", "sklearn"):
    pytest.importorskip(package, reason="training needs the train extra")
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)

STEPS = 3
# The last batch of the tests is of one image: the second process has none.
TRAIN, BATCH, TEST = 32 * STEPS, 32, 33
BASE = Config(
    image_size=16, epochs=1, batch=BATCH, warmup=0.5, checkpoint_every=1, sync_bn=True, lr=0.05
)
MIXED = dataclasses.replace(BASE, image_size=32, clip=1.0, ema=0.7, accumulate=2)
DOUBLE = dataclasses.replace(BASE, optimizer="lamb", clip=1.0, lr=0.01)
# Synchronised norms on the CPU are the native kernels'.
needs_native = pytest.mark.skipif(native.load() is not None, reason="needs the native kernels")


def some_digits(name: str = "digits", root: Any = None, size: int | None = None) -> datasets.Data:
    found = datasets._digits(size or 32)
    return found._replace(
        train=(found.train[0][:TRAIN], found.train[1]), test=(found.test[0][:TEST], found.test[1])
    )


def short_resnet(name: str, **config: Any) -> fr.ResNet:
    return fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], **config)


def exact_resnet(name: str, **config: Any) -> fr.ResNet:
    return short_resnet(name, **config).double()


def exact_forward(self: Any, model: Any, x: Tensor) -> Tensor:
    return model(x.double())


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load", some_digits)
    monkeypatch.setattr(loop, "get_model", short_resnet)
    torch.set_num_threads(1)


# --- what each of the two processes does ----------------------------------------------------------


class Stop(Exception):
    pass


def _stopped(config: Config, at: int) -> None:
    """A run that ends after so many steps, on all processes."""
    step = loop._Run.one_step

    def watched(self: Any, x: Tensor, y: Tensor) -> Any:
        if self.step == at:
            raise Stop
        return step(self, x, y)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(loop._Run, "one_step", watched)
        run(config)
    dist.barrier()  # the first process may still be writing what the other one goes on from


def everything(out: Path) -> dict[str, Any]:
    """Sharded with clipping, averaged weights and accumulation; and replicated."""
    lines: list[str] = []
    found = {}
    for sharding in distributed.SHARDINGS:
        config = dataclasses.replace(MIXED, out=str(out / sharding), sharding=sharding)
        found[sharding] = run(config, lines.append).test_accuracy
    return found | {"lines": len(lines)}


def sharded(out: Path) -> dict[str, Any]:
    """What each process keeps of the weights, the optimizer's state and the average."""
    config = dataclasses.replace(MIXED, out=str(out / "sharded"), sharding="fsdp")
    found: dict[str, Any] = {}
    step = loop._Run.one_step

    def watched(self: Any, x: Tensor, y: Tensor) -> Any:
        done = step(self, x, y)
        kept = [*self.model.parameters(), *self.average.parameters()]
        kept += [s["momentum_buffer"] for s in self.optimizer.state.values()]
        found["kept"] = sum(t.to_local().numel() for t in kept)
        found["whole"] = sum(t.numel() for t in kept)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "one_step", watched)
        _stopped(config, 1)
    return found


def unsynchronised(out: Path) -> dict[str, Any]:
    """Norms of each process's own: what is tested is what the first one writes."""
    found = {}
    test = loop._Run.test
    for sharding in distributed.SHARDINGS:

        def watched(self: Any, name: str = sharding) -> Any:
            done = test(self)
            found[name] = {k: b.clone() for k, b in self.model.named_buffers()}
            return done

        config = dataclasses.replace(
            BASE, out=str(out / sharding), sharding=sharding, sync_bn=False, checkpoint_every=9
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop._Run, "test", watched)
            run(config)
    return found


def exact(out: Path) -> dict[str, Any]:
    """In float64 with LAMB, whose ratio is of whole tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "get_model", exact_resnet)
        patch.setattr(loop._Run, "forward", exact_forward)
        run(dataclasses.replace(DOUBLE, out=str(out / "exact"), sharding="fsdp"))
    return {}


def levels(out: Path) -> dict[str, Any]:
    """The same losses at every level, under autocast."""
    for level in LEVELS:
        config = dataclasses.replace(
            BASE, out=str(out / level), sharding="fsdp", optimizer="adamw", amp="bfloat16",
            activation_memory=level, checkpoint_every=9,
        )  # fmt: skip
        _stopped(config, 2)
    return {}


def gone_on(out: Path) -> dict[str, Any]:
    """Stopped in one way, gone on with in the other."""
    for before, after in (("fsdp", "none"), ("none", "fsdp")):
        config = dataclasses.replace(MIXED, out=str(out / f"{before}-{after}"), sharding=before)
        _stopped(config, 2)
        run(dataclasses.replace(config, sharding=after), resume=True)
    return {}


def apart(out: Path) -> dict[str, Any]:
    """Two folders of the same name, on machines that share none."""
    config = dataclasses.replace(BASE, out=str(out / "run"))
    _stopped(config, 1)
    newest = state.newest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "newest", lambda f: None if dist.get_rank() == 1 else newest(f))
        with pytest.raises(CheckpointError) as error:
            run(config, resume=True)
    return {"error": str(error.value)}


def gone_wrong(out: Path) -> dict[str, Any]:
    """Something that is no number, in the second process's part alone."""
    found: dict[str, Any] = {}
    plain = loop._Run.backward

    def weight(self: Any, x: Tensor, y: Tensor) -> Tensor:
        if self.rank == 1 and self.step == 1:
            with torch.no_grad():
                self.model.layer2[0].conv1.weight.to_local()[0, 0, 0, 0] = float("nan")
        return plain(self, x, y)

    def gradient(self: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = plain(self, x, y)
        if self.rank == 1:
            self.model.layer3[0].bn2.weight.grad.to_local()[0] = float("inf")
        return loss

    def images(self: Any, x: Tensor, y: Tensor) -> Tensor:
        if self.rank == 1:
            x[0] = float("nan")
        return plain(self, x, y)

    def memory(self: Any, x: Tensor, y: Tensor) -> Tensor:
        self.forward(self.parallel, x)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    for change in (weight, gradient, images, memory):
        name = change.__name__
        config = dataclasses.replace(BASE, out=str(out / name), sharding="fsdp")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop._Run, "backward", change)
            with pytest.raises((NonFinite, OutOfMemory)) as error:
                run(config)
        found[name] = str(error.value)
    return found


def scaled(out: Path) -> dict[str, Any]:
    """float16's scaler leaves a step out on all processes where one of them has an overflow."""
    torch.manual_seed(0)
    model = short_resnet("resnet18", num_classes=3)
    distributed.shard(model, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    found = []
    for overflow in (True, False):
        before = model.fc.weight.full_tensor().clone()
        scaler.scale(model(torch.randn(2, 3, 64, 64)).square().mean()).backward()
        if overflow and dist.get_rank() == 1:
            model.conv1.weight.grad.to_local()[0] = float("inf")
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append(torch.equal(before, model.fc.weight.full_tensor()))
    return {"left out": found}


def killed(out: Path) -> dict[str, Any]:
    """The second process dies: the last job, since nothing comes after it."""
    step = loop._Run.one_step

    def watched(self: Any, x: Tensor, y: Tensor) -> Any:
        if self.step == 2 and self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, x, y)

    loop._Run.one_step = watched  # type: ignore[method-assign]
    run(dataclasses.replace(MIXED, out=str(out / "killed"), sharding="fsdp"))
    return {}


JOBS = (
    everything,
    sharded,
    unsynchronised,
    exact,
    levels,
    gone_on,
    apart,
    gone_wrong,
    scaled,
    killed,
)


def main(folder: Path) -> None:
    datasets.load, loop.get_model = some_digits, short_resnet
    torch.set_num_threads(1)
    with distributed.processes(torch.device("cpu")) as (rank, _, _):
        for job in JOBS:
            try:
                found = job(folder / job.__name__)
            except Exception:
                found = {"traceback": traceback.format_exc()}
            torch.save(found, folder / f"{job.__name__}-{rank}.pt")
            if "traceback" in found:
                raise RuntimeError(found["traceback"])


# --- and what must have come of it ----------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Where the jobs wrote, and how torchrun ended."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [*command, __file__, str(folder)], capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}, cwd=folder,
    )  # fmt: skip
    return folder, ended


@pytest.fixture
def found(launched: tuple[Path, Any]) -> dict[str, list[dict[str, Any]]]:
    """What each process says of each job."""
    folder, ended = launched
    written: dict[str, list[dict[str, Any]]] = {}
    for job in JOBS[:-1]:
        files = [folder / f"{job.__name__}-{rank}.pt" for rank in range(2)]
        for file in files:
            assert file.exists(), ended.stderr[-3000:]
        written[job.__name__] = [torch.load(file, weights_only=True) for file in files]
        for one in written[job.__name__]:
            assert "traceback" not in one, one["traceback"]
    return written


def column(folder: Path, name: str) -> list[float]:
    rows = state.read_metrics(folder / "metrics.jsonl")
    return [row[name] for row in rows if name in row]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with the joined batch."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", some_digits)
        patch.setattr(loop, "get_model", short_resnet)
        run(dataclasses.replace(MIXED, out=str(folder)))
    return folder


def checkpoint(folder: Path) -> dict[str, Any]:
    return state.read(folder / state.NEWEST)


def flat(content: Any, name: str = "") -> dict[str, Any]:
    """Every value in it, by its path."""
    if not isinstance(content, (dict, list, tuple)):
        return {name: content}
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    return {k: v for key, value in pairs for k, v in flat(value, f"{name}/{key}").items()}


def assert_near(found: Path, want: Path, rtol: float) -> None:
    """Two checkpoints of the same form, that every way of training can read."""
    a, b = flat(checkpoint(found)), flat(checkpoint(want))
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, Tensor):
            assert type(value) is Tensor and value.device.type == "cpu", key
            if value.is_floating_point() and value.numel() > 1:
                assert (value - b[key]).norm() <= rtol * b[key].norm(), key
                continue
        assert value == b[key] or key == "/accuracy", key


@needs_native
@pytest.mark.parametrize("sharding", distributed.SHARDINGS)
def test_two_processes_are_as_one(launched, found, alone, sharding):
    """Accumulating, clipping and averaging. Sums are in another order: of the losses 2e-7 was
    measured, of the gradient norms 8e-7, of weights, averages and momentum after three steps 2e-6.
    """
    out = launched[0] / "everything" / sharding
    assert len(column(out, "loss")) == STEPS
    assert column(out, "loss") == pytest.approx(column(alone, "loss"), rel=2e-6)
    norms = column(out, "gradient_norm")
    assert norms == pytest.approx(column(alone, "gradient_norm"), rel=8e-6)
    assert min(norms) > 10  # all of them clipped
    assert_near(out, alone, 2e-5)
    one, two = found["everything"]
    assert one[sharding] == two[sharding] and (one["lines"], two["lines"]) == (2, 0)
    assert column(out, "test_images") == [TEST]


@needs_native
def test_each_keeps_its_part(found):
    for one in found["sharded"]:
        assert one["whole"] / 2 <= one["kept"] < 0.501 * one["whole"]


@needs_native
def test_lamb_takes_norms_of_whole_tensors(launched, found, tmp_path, monkeypatch):
    """In float64: 1e-14 of the norms and 5e-14 of the weights was measured; losses are added up in
    float32."""
    monkeypatch.setattr(loop, "get_model", exact_resnet)
    monkeypatch.setattr(loop._Run, "forward", exact_forward)
    out, want = launched[0] / "exact" / "exact", tmp_path / "alone"
    run(dataclasses.replace(DOUBLE, out=str(want)))
    assert column(out, "loss") == pytest.approx(column(want, "loss"), rel=2e-7)
    norms = column(want, "gradient_norm")
    assert column(out, "gradient_norm") == pytest.approx(norms, rel=1e-12)
    assert_near(out, want, 1e-12)


@needs_native
def test_levels_give_the_same_losses(launched, found):
    losses = [column(launched[0] / "levels" / level, "loss") for level in LEVELS]
    assert len(losses[0]) == 2 and losses.count(losses[0]) == len(LEVELS)


@needs_native
@pytest.mark.parametrize("way", ["fsdp-none", "none-fsdp"])
def test_gone_on_with_the_other_way(launched, found, alone, way):
    out = launched[0] / "gone_on" / way
    assert column(out, "loss") == pytest.approx(column(alone, "loss"), rel=2e-6)
    assert_near(out, alone, 2e-5)


@needs_native
def test_a_folder_that_not_all_see(found):
    for one in found["apart"]:
        assert "of [1, None] for all; it must be a folder that all of them see" in one["error"]


@needs_native
def test_a_killed_process_is_reported_and_one_process_goes_on(launched, found, alone, tmp_path):
    """FAULTS 46: torchrun ends with an error; what was written is whole, and serves without
    sharding and with another number of processes."""
    folder, ended = launched
    out = folder / "killed" / "killed"
    assert ended.returncode != 0 and "SIGKILL" in ended.stderr, ended.stderr[-2000:]
    kept = state.newest(out)  # of step 1 where the end came while step 2's was written
    assert kept is not None and kept["step"] in (1, 2)
    assert run(dataclasses.replace(MIXED, out=str(out)), resume=True).steps == STEPS
    assert column(out, "loss") == pytest.approx(column(alone, "loss"), rel=2e-6)
    assert_near(out, alone, 2e-5)


@needs_native
def test_what_went_wrong_is_told_by_all(launched, found):
    """Also where only one process's part did, and with the state before that step written."""
    one, two = found["gone_wrong"]
    assert one == two
    assert "step 2: the loss is nan; layer2.0.conv1 is the first" in one["weight"]
    assert "step 1: the loss is 2." in one["gradient"]
    assert "the gradient of layer3.0.bn2.weight is the first" in one["gradient"]
    assert "step 1: the loss is nan; the input is the first" in one["images"]
    assert "step 1 ran out of memory" in one["memory"] and "--accumulate 2" in one["memory"]
    for name, step in (("weight", 1), ("gradient", 0), ("images", 0)):
        content = flat(checkpoint(launched[0] / "gone_wrong" / name))
        assert content["/step"] == step and content["/model/bn1.num_batches_tracked"] == step
        statistics = [v for k, v in content.items() if "running" in k]
        assert len(statistics) > 10 and all(v.isfinite().all() for v in statistics)


def test_norms_of_each_process_are_the_firsts_in_tests(launched, found):
    one, two = found["unsynchronised"]
    for sharding in distributed.SHARDINGS:
        written = checkpoint(launched[0] / "unsynchronised" / sharding)["model"]
        for name, value in one[sharding].items():
            assert torch.equal(value, two[sharding][name]) and torch.equal(value, written[name])
    folders = [launched[0] / "unsynchronised" / sharding for sharding in distributed.SHARDINGS]
    assert column(folders[0], "loss") == column(folders[1], "loss")  # of two, in any order


def test_an_overflow_is_everybodys(found):
    assert [one["left out"] for one in found["scaled"]] == [[True, False]] * 2


@pytest.mark.parametrize("under_torchrun", [False, True])
def test_one_process_has_nothing_to_share(tmp_path, monkeypatch, under_torchrun):
    if under_torchrun:
        names = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        for name, value in names.items():
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--sharding fsdp needs more than one process"):
        run(dataclasses.replace(BASE, out=str(tmp_path / "run"), sharding="fsdp"))
    with pytest.raises(ValueError, match="--sharding must be one of none, fsdp, got 'zero'"):
        run(dataclasses.replace(BASE, out=str(tmp_path / "run"), sharding="zero"))
    assert not (tmp_path / "run").exists() and not dist.is_initialized()


def test_the_first_of_what_processes_found():
    model = short_resnet("resnet18", num_classes=3)
    assert first_of(model, [None, "layer2.0.bn1", "layer1.0.conv1", "fc"]) == "layer1.0.conv1"
    assert first_of(model, ["conv1", "the input"]) == "the input"
    assert first_of(model, [None, None]) is None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
