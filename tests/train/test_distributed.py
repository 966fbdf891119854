"""`fused-resnet train` in two processes, replicated or sharded, equals one process.

A single launch of torchrun runs this file, which executes every job below; the tests check their
outputs.
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
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("processes"),  # a single process makes the fixture that runs torchrun
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
]

STEPS = 3
# The last test batch has one image: the second process has none.
TRAIN, BATCH, TEST = 32 * STEPS, 32, 33
BASE = Config(
    image_size=16, epochs=1, batch=BATCH, warmup=0.5, checkpoint_every=1, sync_bn=True, lr=0.05
)
MIXED = dataclasses.replace(BASE, image_size=32, clip=1.0, ema=0.7, accumulate=2)
DOUBLE = dataclasses.replace(BASE, optimizer="lamb", clip=1.0, lr=0.01)
# On the CPU only the native kernels synchronise norms.
needs_native = pytest.mark.skipif(native.load() is not None, reason="needs the native kernels")


def some_digits(name: str = "digits", root: Any = None, size: int | None = None) -> datasets.Data:
    data = datasets._digits(size or 32)
    return data._replace(
        train=(data.train[0][:TRAIN], data.train[1]), test=(data.test[0][:TEST], data.test[1])
    )


def short_resnet(name: str, **config: Any) -> fr.ResNet:
    return fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], **config)


def float64_resnet(name: str, **config: Any) -> fr.ResNet:
    return short_resnet(name, **config).double()


def float64_forward(self: Any, model: Any, x: Tensor) -> Tensor:
    return model(x.double())


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load", some_digits)
    monkeypatch.setattr(loop, "get_model", short_resnet)
    torch.set_num_threads(1)


# --- jobs: run in each process --------------------------------------------------------------------


class Stop(Exception):
    pass


def _run_until(config: Config, at: int) -> None:
    """Runs until all processes have taken `at` steps."""
    step = loop._Run.one_step

    def patched(self: Any, x: Tensor, y: Tensor) -> Any:
        if self.step == at:
            raise Stop
        return step(self, x, y)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(loop._Run, "one_step", patched)
        run(config)
    dist.barrier()  # the first process may still be writing the checkpoint


def all_options(out: Path) -> dict[str, Any]:
    """Clipping, averaged weights and accumulation, replicated and sharded."""
    lines: list[str] = []
    outputs = {}
    for sharding in distributed.SHARDINGS:
        config = dataclasses.replace(MIXED, out=str(out / sharding), sharding=sharding)
        outputs[sharding] = run(config, lines.append).test_accuracy
    return outputs | {"lines": len(lines)}


def sharded(out: Path) -> dict[str, Any]:
    """Each process's number of elements of weights, optimizer state and averages."""
    config = dataclasses.replace(MIXED, out=str(out / "sharded"), sharding="fsdp")
    outputs: dict[str, Any] = {}
    step = loop._Run.one_step

    def patched(self: Any, x: Tensor, y: Tensor) -> Any:
        done = step(self, x, y)
        tensors = [*self.model.parameters(), *self.average.parameters()]
        tensors += [s["momentum_buffer"] for s in self.optimizer.state.values()]
        outputs["local"] = sum(t.to_local().numel() for t in tensors)
        outputs["full"] = sum(t.numel() for t in tensors)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "one_step", patched)
        _run_until(config, 1)
    return outputs


def unsynchronised(out: Path) -> dict[str, Any]:
    """Unsynchronised norms: all processes test with the statistics that the first one saves."""
    outputs = {}
    test = loop._Run.test
    for sharding in distributed.SHARDINGS:

        def patched(self: Any, name: str = sharding) -> Any:
            done = test(self)
            outputs[name] = {k: b.clone() for k, b in self.model.named_buffers()}
            return done

        config = dataclasses.replace(
            BASE, out=str(out / sharding), sharding=sharding, sync_bn=False, checkpoint_every=9
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop._Run, "test", patched)
            run(config)
    return outputs


def float64(out: Path) -> dict[str, Any]:
    """float64 with LAMB, whose trust ratio uses norms of whole tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "get_model", float64_resnet)
        patch.setattr(loop._Run, "forward", float64_forward)
        run(dataclasses.replace(DOUBLE, out=str(out / "float64"), sharding="fsdp"))
    return {}


def levels(out: Path) -> dict[str, Any]:
    """Every activation memory level, under autocast."""
    for level in LEVELS:
        config = dataclasses.replace(
            BASE, out=str(out / level), sharding="fsdp", optimizer="adamw", amp="bfloat16",
            activation_memory=level, checkpoint_every=9,
        )  # fmt: skip
        _run_until(config, 2)
    return {}


def resumed(out: Path) -> dict[str, Any]:
    """Interrupted with one sharding, resumed with the other."""
    for before, after in (("fsdp", "none"), ("none", "fsdp")):
        config = dataclasses.replace(MIXED, out=str(out / f"{before}-{after}"), sharding=before)
        _run_until(config, 2)
        run(dataclasses.replace(config, sharding=after), resume=True)
    return {}


def separate_folders(out: Path) -> dict[str, Any]:
    """Folders of the same name on machines without a shared file system."""
    config = dataclasses.replace(BASE, out=str(out / "run"))
    _run_until(config, 1)
    newest = state.newest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "newest", lambda f: None if dist.get_rank() == 1 else newest(f))
        with pytest.raises(CheckpointError) as error:
            run(config, resume=True)
    return {"error": str(error.value)}


def failures(out: Path) -> dict[str, Any]:
    """Non-finite values in the second process's shard or batch only, and an out-of-memory error."""
    outputs: dict[str, Any] = {}
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
        outputs[name] = str(error.value)
    return outputs


def scaled(out: Path) -> dict[str, Any]:
    """The float16 scaler skips a step on all processes if one of them overflows."""
    torch.manual_seed(0)
    model = short_resnet("resnet18", num_classes=3)
    distributed.shard(model, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    outputs = []
    for overflow in (True, False):
        before = model.fc.weight.full_tensor().clone()
        scaler.scale(model(torch.randn(2, 3, 64, 64)).square().mean()).backward()
        if overflow and dist.get_rank() == 1:
            model.conv1.weight.grad.to_local()[0] = float("inf")
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        outputs.append(torch.equal(before, model.fc.weight.full_tensor()))
    return {"skipped": outputs}


def killed(out: Path) -> dict[str, Any]:
    """The second process is killed. It must be the last job."""
    step = loop._Run.one_step

    def patched(self: Any, x: Tensor, y: Tensor) -> Any:
        if self.step == 2 and self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, x, y)

    loop._Run.one_step = patched  # type: ignore[method-assign]
    run(dataclasses.replace(MIXED, out=str(out / "killed"), sharding="fsdp"))
    return {}


JOBS = (
    all_options,
    sharded,
    unsynchronised,
    float64,
    levels,
    resumed,
    separate_folders,
    failures,
    scaled,
    killed,
)


def main(folder: Path) -> None:
    datasets.load, loop.get_model = some_digits, short_resnet
    torch.set_num_threads(1)
    with distributed.processes(torch.device("cpu")) as (rank, _, _):
        for job in JOBS:
            try:
                outputs = job(folder / job.__name__)
            except Exception:
                outputs = {"traceback": traceback.format_exc()}
            torch.save(outputs, folder / f"{job.__name__}-{rank}.pt")
            if "traceback" in outputs:
                raise RuntimeError(outputs["traceback"])


# --- checks of the outputs ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The jobs' output folder, and torchrun's CompletedProcess."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    completed = subprocess.run(
        [*command, __file__, str(folder)], capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}, cwd=folder,
    )  # fmt: skip
    return folder, completed


@pytest.fixture
def outputs(launched: tuple[Path, Any]) -> dict[str, list[dict[str, Any]]]:
    """Each process's output of each job."""
    folder, completed = launched
    written: dict[str, list[dict[str, Any]]] = {}
    for job in JOBS[:-1]:
        files = [folder / f"{job.__name__}-{rank}.pt" for rank in range(2)]
        for file in files:
            assert file.exists(), completed.stderr[-3000:]
        written[job.__name__] = [torch.load(file, weights_only=True) for file in files]
        for one in written[job.__name__]:
            assert "traceback" not in one, one["traceback"]
    return written


def column(folder: Path, name: str) -> list[float]:
    rows = state.read_metrics(folder / "metrics.jsonl")
    return [row[name] for row in rows if name in row]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process, with the whole batch."""
    folder = tmp_path_factory.mktemp("single") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", some_digits)
        patch.setattr(loop, "get_model", short_resnet)
        run(dataclasses.replace(MIXED, out=str(folder)))
    return folder


def checkpoint(folder: Path) -> dict[str, Any]:
    return state.read(folder / state.NEWEST)


def flat(content: Any, name: str = "") -> dict[str, Any]:
    """Every leaf value, by its path."""
    if not isinstance(content, (dict, list, tuple)):
        return {name: content}
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    return {k: v for key, value in pairs for k, v in flat(value, f"{name}/{key}").items()}


def assert_near(outputs: Path, want: Path, rtol: float) -> None:
    """Checkpoints of the same keys and nearly equal values, independent of the sharding."""
    a, b = flat(checkpoint(outputs)), flat(checkpoint(want))
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
def test_two_processes_equal_one(launched, outputs, single, sharding):
    """With accumulation, clipping and averaging. The order of summation differs. Measured: 2e-7 of
    the losses, 8e-7 of the gradient norms, 2e-6 of weights, averages and momentum after 3 steps.
    """
    out = launched[0] / "all_options" / sharding
    assert len(column(out, "loss")) == STEPS
    assert column(out, "loss") == pytest.approx(column(single, "loss"), rel=2e-6)
    norms = column(out, "gradient_norm")
    assert norms == pytest.approx(column(single, "gradient_norm"), rel=8e-6)
    assert min(norms) > 10  # every step is clipped
    assert_near(out, single, 2e-5)
    one, two = outputs["all_options"]
    assert one[sharding] == two[sharding] and (one["lines"], two["lines"]) == (2, 0)
    assert column(out, "test_images") == [TEST]


@needs_native
def test_each_process_stores_its_shard(outputs):
    for one in outputs["sharded"]:
        assert one["full"] / 2 <= one["local"] < 0.501 * one["full"]


@needs_native
def test_lamb_uses_norms_of_whole_tensors(launched, outputs, tmp_path, monkeypatch):
    """Measured in float64: 1e-14 of the norms and 5e-14 of the weights; losses are summed in
    float32."""
    monkeypatch.setattr(loop, "get_model", float64_resnet)
    monkeypatch.setattr(loop._Run, "forward", float64_forward)
    out, want = launched[0] / "float64" / "float64", tmp_path / "single"
    run(dataclasses.replace(DOUBLE, out=str(want)))
    assert column(out, "loss") == pytest.approx(column(want, "loss"), rel=2e-7)
    norms = column(want, "gradient_norm")
    assert column(out, "gradient_norm") == pytest.approx(norms, rel=1e-12)
    assert_near(out, want, 1e-12)


@needs_native
def test_levels_give_the_same_losses(launched, outputs):
    losses = [column(launched[0] / "levels" / level, "loss") for level in LEVELS]
    assert len(losses[0]) == 2 and losses.count(losses[0]) == len(LEVELS)


@needs_native
@pytest.mark.parametrize("way", ["fsdp-none", "none-fsdp"])
def test_resumed_with_another_sharding(launched, outputs, single, way):
    out = launched[0] / "resumed" / way
    assert column(out, "loss") == pytest.approx(column(single, "loss"), rel=2e-6)
    assert_near(out, single, 2e-5)


@needs_native
def test_a_folder_that_is_not_shared(outputs):
    for one in outputs["separate_folders"]:
        assert "read steps [1, None]; it must be a folder shared by all processes" in one["error"]


@needs_native
def test_after_a_killed_process_one_process_resumes(launched, outputs, single, tmp_path):
    """FAULTS 46: torchrun exits with an error; the checkpoint is complete and one process without
    sharding can resume from it."""
    folder, completed = launched
    out = folder / "killed" / "killed"
    assert completed.returncode != 0 and "SIGKILL" in completed.stderr, completed.stderr[-2000:]
    newest = state.newest(out)  # step 1 if the kill interrupted the writing of step 2
    assert newest is not None and newest["step"] in (1, 2)
    assert run(dataclasses.replace(MIXED, out=str(out)), resume=True).steps == STEPS
    assert column(out, "loss") == pytest.approx(column(single, "loss"), rel=2e-6)
    assert_near(out, single, 2e-5)


@needs_native
def test_all_processes_report_the_failure(launched, outputs):
    """Also if it is in one process's shard only; the state before that step is saved."""
    one, two = outputs["failures"]
    assert one == two
    assert "step 2: the loss is nan; layer2.0.conv1 is the first" in one["weight"]
    assert "step 1: the loss is 2." in one["gradient"]
    assert "the gradient of layer3.0.bn2.weight is the first" in one["gradient"]
    assert "step 1: the loss is nan; the input is the first" in one["images"]
    assert "step 1 ran out of memory" in one["memory"] and "--accumulate 2" in one["memory"]
    for name, step in (("weight", 1), ("gradient", 0), ("images", 0)):
        content = flat(checkpoint(launched[0] / "failures" / name))
        assert content["/step"] == step and content["/model/bn1.num_batches_tracked"] == step
        statistics = [v for k, v in content.items() if "running" in k]
        assert len(statistics) > 10 and all(v.isfinite().all() for v in statistics)


def test_unsynchronised_statistics_are_those_of_the_first_process(launched, outputs):
    one, two = outputs["unsynchronised"]
    for sharding in distributed.SHARDINGS:
        written = checkpoint(launched[0] / "unsynchronised" / sharding)["model"]
        for name, value in one[sharding].items():
            assert torch.equal(value, two[sharding][name]) and torch.equal(value, written[name])
    folders = [launched[0] / "unsynchronised" / sharding for sharding in distributed.SHARDINGS]
    # Bitwise equal: a sum of two terms does not depend on their order.
    assert column(folders[0], "loss") == column(folders[1], "loss")


def test_all_processes_skip_an_overflow(outputs):
    assert [one["skipped"] for one in outputs["scaled"]] == [[True, False]] * 2


@pytest.mark.parametrize("under_torchrun", [False, True])
def test_sharding_needs_several_processes(tmp_path, monkeypatch, under_torchrun):
    if under_torchrun:
        names = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        for name, value in names.items():
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--sharding fsdp needs more than one process"):
        run(dataclasses.replace(BASE, out=str(tmp_path / "run"), sharding="fsdp"))
    with pytest.raises(ValueError, match="--sharding must be one of none, fsdp, got 'zero'"):
        run(dataclasses.replace(BASE, out=str(tmp_path / "run"), sharding="zero"))
    assert not (tmp_path / "run").exists() and not dist.is_initialized()


def test_first_of_the_processes_layers():
    model = short_resnet("resnet18", num_classes=3)
    assert first_of(model, [None, "layer2.0.bn1", "layer1.0.conv1", "fc"]) == "layer1.0.conv1"
    assert first_of(model, ["conv1", "the input"]) == "the input"
    assert first_of(model, [None, None]) is None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
