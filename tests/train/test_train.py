"""`fused-resnet train`: learning, resuming after a kill at any moment, and error messages."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import multiprocessing as mp

import fused_resnet as fr
from fused_resnet.parity.checkpoint import CheckpointError
from fused_resnet.train import Config, NonFinite, OutOfMemory, loop, optim, run, state
from fused_resnet.train import data as datasets
from fused_resnet.train.diagnose import first_non_finite

for package in ("torchvision", "torchmetrics", "sklearn", "matplotlib", "typer"):
    pytest.importorskip(package, reason="training needs the train extra")

OPTIONS: dict[str, Any] = {"replaced": False, "device": torch.device("cpu")}  # of a loader
SMALL = Config(image_size=16, epochs=2, batch=32, warmup=0.5, checkpoint_every=2)


def some_digits(name: str = "digits", root: Any = None, size: int | None = None) -> datasets.Data:
    """The first of the real digits, few enough for a test."""
    data = datasets._digits(size or 16)
    return data._replace(
        train=(data.train[0][:160], data.train[1]), test=(data.test[0][:50], data.test[1])
    )


def short_resnet(name: str, **config: Any) -> fr.ResNet:
    return fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], **config)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load", some_digits)
    monkeypatch.setattr(loop, "get_model", short_resnet)
    torch.set_num_threads(1)


def small(tmp_path: Path, **changes: Any) -> Config:
    return dataclasses.replace(SMALL, out=str(tmp_path / "run"), **changes)


def losses(config: Config) -> list[float]:
    rows = state.read_metrics(Path(str(config.out)) / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
def test_it_learns(tmp_path):
    lines: list[str] = []
    config = small(tmp_path, epochs=6, label_smoothing=0.1, lr=0.05)
    result = run(config, lines.append)
    assert result.steps == 30 and len(lines) == 6
    assert result.test_accuracy >= 0.2  # ten classes, 160 images; chance is 0.1
    values = losses(config)
    assert len(values) == 30 and sum(values[-5:]) < 0.7 * sum(values[:5])
    files = {p.name for p in result.folder.iterdir()}
    assert files == {"checkpoint.pt", "checkpoint-before.pt", "config.json", "metrics.jsonl"}
    assert json.loads((result.folder / "config.json").read_text())["epochs"] == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "amp": "bfloat16"}, {"optimizer": "lamb", "clip": 1.0},
        {"ema": 0.9, "accumulate": 2}, {"channels_last": False, "activation_memory": "minimal"},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_trains(tmp_path, changes):
    config = small(tmp_path, epochs=1, **changes)
    result = run(config)
    assert result.steps == 5 and all(map(_finite, losses(config)))


def _finite(x: float) -> bool:
    return x == x and abs(x) != float("inf")


# --- interrupted ----------------------------------------------------------------------------------


def _train_until(config: Config, step: int, where: str, resume: bool) -> None:
    datasets.load, loop.get_model = some_digits, short_resnet
    torch.set_num_threads(1)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "writing":
        save = torch.save

        def write_partly(content: Any, file: Any) -> None:
            if content["step"] >= step:
                file.write(b"half of a checkpoint")
                file.flush()
                die()
            save(content, file)

        torch.save = write_partly
    if where == "renaming":
        replace = os.replace

        def die_after_first(a: Any, b: Any) -> None:
            replace(a, b)
            if Path(b).name == state.BEFORE:
                die()

        os.replace = die_after_first
    run(
        config,
        resume=resume,
        progress=lambda at, *_: die() if where == "step" and at == step else None,
    )


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    """Losses and weights are bitwise equal to those of an uninterrupted run."""
    whole = dataclasses.replace(SMALL, out=str(tmp_path / "whole"), ema=0.8)
    run(whole)
    killed = dataclasses.replace(whole, out=str(tmp_path / "killed"), workers=0)
    context = mp.get_context("spawn")
    moments = [(3, "step"), (4, "writing"), (6, "renaming"), (99, "none")]
    for i, (step, where) in enumerate(moments):
        process = context.Process(target=_train_until, args=(killed, step, where, i > 0))
        process.start()
        process.join(120)
        assert process.exitcode == (0 if where == "none" else -signal.SIGKILL), (step, where)
    assert losses(killed) == losses(whole)
    a, b = (state.read(Path(str(c.out)) / state.NEWEST) for c in (whole, killed))
    for key in ("model", "average"):
        assert all(torch.equal(a[key][k], b[key][k]) for k in a[key])
    assert a["accuracy"] == b["accuracy"]


@pytest.mark.slow
def test_workers_change_nothing(tmp_path):
    one = dataclasses.replace(SMALL, out=str(tmp_path / "one"), epochs=1)
    two = dataclasses.replace(one, out=str(tmp_path / "two"), workers=1)
    run(one)
    run(two)
    assert losses(one) == losses(two)


def test_a_finished_run_stays_finished(tmp_path):
    config = small(tmp_path, epochs=1)
    first = run(config)
    lines: list[str] = []
    resumed = run(config, lines.append, resume=True)
    assert resumed == first and any("already finished" in line for line in lines)
    with pytest.raises(ValueError, match=r"contains a run of 5 steps; continue it with --resume"):
        run(config)
    with pytest.raises(CheckpointError, match="contains a run with --seed 0, not 1"):
        run(dataclasses.replace(config, seed=1), resume=True)
    with pytest.raises(ValueError, match="contains no checkpoint"):
        run(dataclasses.replace(config, out=str(tmp_path / "new")), resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut short", "empty", "noise", "payload", "something else"])
def test_damaged_checkpoints(tmp_path, damage):
    config = small(tmp_path, epochs=1)
    run(config)
    folder = Path(str(config.out))
    newest, marker = folder / state.NEWEST, tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {marker}",))

    def damage_file(path: Path) -> None:
        content = path.read_bytes()
        if damage == "payload":
            torch.save({"model": Payload(), "config": {}, "step": 1}, path)
        elif damage == "something else":
            torch.save({"weights": torch.ones(2)}, path)
        else:
            path.write_bytes(
                {
                    "cut short": content[: len(content) // 2],
                    "empty": b"",
                    "noise": b"\x80\x02x" * 99,
                }[damage]
            )

    damage_file(newest)
    with pytest.warns(UserWarning, match=rf"{state.NEWEST}.*resuming from {state.BEFORE}"):
        result = run(config, resume=True)
    assert result.steps == 5 and state.read(folder / state.BEFORE)["step"] == 4
    assert not newest.exists() or state.read(newest)["step"] == 5
    assert (folder / "checkpoint.damaged").exists()
    for name in (state.NEWEST, state.BEFORE):
        damage_file(folder / name)
    with (
        pytest.warns(UserWarning, match="resuming"),
        pytest.raises(CheckpointError, match=state.BEFORE),
    ):
        run(config, resume=True)
    assert not marker.exists()


# --- failures -------------------------------------------------------------------------------------


def test_non_finite_loss_names_step_and_layer(tmp_path, monkeypatch):
    config = small(tmp_path)
    step = loop._Run.one_step

    def poisoned(self, x, y):
        if self.step == 3:
            with torch.no_grad():
                self.model.layer2[0].conv1.weight[0, 0, 0, 0] = float("nan")
        return step(self, x, y)

    monkeypatch.setattr(loop._Run, "one_step", poisoned)
    with pytest.raises(NonFinite, match=r"step 4: the loss is nan; layer2\.0\.conv1 is the first"):
        run(config)
    saved = state.read(Path(str(config.out)) / state.NEWEST)
    assert saved["step"] == 3
    statistics = {k: v for k, v in saved["model"].items() if "running" in k or "tracked" in k}
    assert all(v.isfinite().all() for v in statistics.values())
    assert saved["model"]["bn1.num_batches_tracked"] == 3
    assert len(losses(config)) == 3


def test_non_finite_gradient_is_named(tmp_path, monkeypatch):
    config = small(tmp_path)
    backward = loop._Run.backward

    def poisoned(self: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = backward(self, x, y)
        self.model.layer3[0].bn2.weight.grad[0] = float("inf")
        return loss

    monkeypatch.setattr(loop._Run, "backward", poisoned)
    with pytest.raises(NonFinite, match=r"step 1: .*the gradient of layer3\.0\.bn2\.weight is the"):
        run(config)


def test_first_non_finite():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU())
    x = torch.ones(3, 2)
    before = model[1].running_mean.clone()
    assert first_non_finite(model, x) is None
    assert torch.equal(model[1].running_mean, before)
    assert first_non_finite(model, x * float("inf")) == "the input"
    model[1].weight.data[0] = float("inf")
    model.eval()
    assert first_non_finite(model, x + torch.randn(3, 2)) == "1"


def test_out_of_memory_and_after(tmp_path, monkeypatch):
    """FAULTS 45: the error lists options that need less memory; a smaller batch then trains."""
    config = small(tmp_path, epochs=1, batch=64)

    def forward(self, model, x):
        if len(x) > 32:
            torch.empty(1 << 60)
        return plain(self, model, x)

    plain = loop._Run.forward
    monkeypatch.setattr(loop._Run, "forward", forward)
    with pytest.raises(
        OutOfMemory, match=r"--activation-memory low.*--accumulate 2.*--batch below"
    ):
        run(config)
    result = run(dataclasses.replace(config, batch=32, out=str(tmp_path / "smaller")))
    assert result.steps == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "vgg16"}, "--model must be one of resnet18, .* got 'vgg16'"),
        ({"data": "mnist"}, "--data must be one of digits, cifar10, folder, got 'mnist'"),
        ({"optimizer": "adam"}, "--optimizer must be one of sgd, adamw, lamb, got 'adam'"),
        ({"amp": "fp8"}, "--amp must be one of no, bfloat16, float16, got 'fp8'"),
        ({"amp": "float16"}, "--amp float16 needs a GPU"),
        ({"activation_memory": "less"}, "--activation-memory must be one of auto"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"batch": 1}, "--batch must be at least 2, got 1"),
        ({"batch": 33, "accumulate": 2}, "--batch must be a multiple of processes x --accumulate"),
        ({"batch": 500}, "--batch must be at most the 160 images, got 500"),
        ({"sharding": "zero"}, "--sharding must be one of none, fsdp, got 'zero'"),
        ({"ema": 1.5}, "--ema must be between 0 and 1, got 1.5"),
    ],
    ids=str,
)
def test_invalid_options(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        run(small(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


# --- the parts ------------------------------------------------------------------------------------


def test_batches_are_distributed_and_resumed():
    def batches(**changes: Any) -> list[list[tuple[int, int]]]:
        return list(datasets.Batches(22, 4, **{"seed": 3, "epoch": 1, **changes}))

    whole = batches()
    assert len(whole) == len(datasets.Batches(22, 4, seed=3, epoch=1)) == 5
    seen = [i for batch in whole for _, i in batch]
    assert len(set(seen)) == 20 and {e for batch in whole for e, _ in batch} == {1}
    assert batches() == whole and batches(epoch=2) != whole and batches(seed=4) != whole
    assert batches(first=3) == whole[3:]
    by_rank = [batches(rank=r, processes=2) for r in range(2)]
    for batch, *parts in zip(whole, *by_rank, strict=True):
        assert sorted(batch) == sorted(parts[0] + parts[1]) and len(parts[0]) == len(parts[1])
    tested = batches(shuffled=False)
    assert [i for batch in tested for _, i in batch] == list(range(22))


def test_lamb_matches_its_formula():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    zero = nn.Parameter(torch.zeros(4, dtype=torch.float64))  # norm 0: trust ratio 1
    lamb = optim.Lamb([w, zero], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.02)
    want = [w.detach().clone(), zero.detach().clone()]
    m, v = [[torch.zeros_like(t) for t in want] for _ in range(2)]
    for t in range(1, 5):
        for i, p in enumerate((w, zero)):
            p.grad = torch.randn_like(p)
            m[i] = 0.8 * m[i] + 0.2 * p.grad
            v[i] = 0.9 * v[i] + 0.1 * p.grad**2
            r = m[i] / (1 - 0.8**t) / ((v[i] / (1 - 0.9**t)).sqrt() + 1e-3) + 0.02 * want[i]
            size = want[i].norm()
            want[i] = want[i] - 0.1 * (size / r.norm() if size > 0 else 1.0) * r
        lamb.step()
    for p, expected in zip((w, zero), want, strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)


def test_schedule_and_decay():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    sgd = optim.make_optimizer("sgd", model, 1.0, 0.9, 0.1)
    decayed = {id(p) for g in sgd.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(model[0].weight)}
    schedule = optim.make_schedule(sgd, 20, 5)
    rates = []
    for _ in range(20):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.01) and max(rates) == rates[5] == pytest.approx(1.0)
    assert rates[5:] == sorted(rates[5:], reverse=True) and 0 < rates[-1] < 0.02


def test_a_folder_with_broken_images(tmp_path, monkeypatch):
    """FAULTS 48: unreadable files are named and skipped."""
    from PIL import Image

    monkeypatch.undo()
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(6):
            mode = ("RGB", "L", "RGBA", "CMYK", "I;16", "P")[i]
            kind = "tiff" if mode in ("CMYK", "I;16") else "png"
            Image.new(mode, (20 + i, 17)).save(tmp_path / name / f"{i}.{kind}")
    (tmp_path / "cat" / "7.png").write_bytes((tmp_path / "cat" / "0.png").read_bytes()[:40])
    data = datasets.load("folder", str(tmp_path), 16)
    assert data.classes == ["cat", "dog"]
    files = data.train[0] + data.test[0]
    assert len(files) == 13
    images = datasets._Images(files, data.test[1], seed=0, replaced=True)
    with pytest.warns(UserWarning, match=r"skipped: .*7\.png"):
        shapes = {images[0, i][0].shape for i in range(13)}
    assert shapes == {(3, 16, 16)}
    batches = datasets.Batches(13, 4, seed=0, epoch=0, shuffled=False)
    with pytest.warns(UserWarning, match=r"skipped: .*7\.png"):
        loaded = list(datasets.loader((files, data.test[1]), batches, 0, 0, **OPTIONS))
    assert sorted(len(y) for _, y in loaded) == [1, 3, 4, 4]
    broken = [i for i, (path, _) in enumerate(files) if path.endswith("7.png")]
    single = datasets.Batches(1, 1, seed=0, epoch=0, shuffled=False)
    part = ([files[broken[0]]], data.test[1])
    with pytest.warns(UserWarning, match="skipped"):
        assert list(datasets.loader(part, single, 0, 0, **OPTIONS)) == [None]
    with pytest.raises(ValueError, match="--root must be a folder"):
        datasets.load("folder", str(tmp_path / "nowhere"), None)
    with pytest.raises(ValueError, match="CIFAR-10 is missing"):
        datasets.load("cifar10", str(tmp_path), None)


def test_unreadable_test_images_are_not_counted(tmp_path, monkeypatch):
    """No other image is counted in their place: the accuracy is that of the readable images."""
    from PIL import Image

    monkeypatch.undo()
    for part, name in ((p, n) for p in ("train", "val") for n in ("cat", "dog")):
        (tmp_path / part / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), (250, 0, 0)).save(tmp_path / part / name / f"{i}.png")
    for i in range(3):
        (tmp_path / "val" / "dog" / f"{i}.png").write_bytes(b"no image")
    monkeypatch.setattr(loop, "get_model", short_resnet)
    monkeypatch.setattr(
        loop._Run, "forward", lambda self, model, x: torch.tensor([[1.0, 0.0]]).repeat(len(x), 1)
    )
    monkeypatch.setattr(loop._Run, "one_step", lambda self, x, y: (_step(self), 1.0))
    lines: list[str] = []
    config = small(tmp_path, data="folder", root=str(tmp_path), epochs=1, batch=4)
    with pytest.warns(UserWarning, match="skipped: .*dog"):
        result = run(config, lines.append)
    assert result.test_accuracy == pytest.approx(4 / 5)  # 4 cats and 1 dog, all classified as cats
    assert "test accuracy 80.00% of 5 images, 3 unreadable skipped" in lines[-1]
    rows = state.read_metrics(result.folder / "metrics.jsonl")
    assert rows[-1]["test_images"] == 5
    for path in (tmp_path / "val").glob("*/*"):
        path.write_bytes(b"no image")
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ValueError, match="contains no readable test image"),
    ):
        run(dataclasses.replace(config, out=str(tmp_path / "none")))


def _step(self: Any) -> float:
    self.optimizer.step()  # without gradients
    self.step += 1
    return 1.0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_is_pinned_for_gpus_alone(device, monkeypatch):
    """On a machine with a GPU too: pinning makes a CUDA context."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    batches = datasets.Batches(32, 8, seed=0, epoch=0)
    options = {**OPTIONS, "device": torch.device(device, None if device == "cpu" else 0)}
    loader = datasets.loader(some_digits().train, batches, 0, 0, **options)
    assert loader.pin_memory == (device == "cuda")


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_keeps_the_global_random_state(workers):
    data = some_digits()
    batches = datasets.Batches(32, 8, seed=0, epoch=0)
    before = torch.get_rng_state()
    assert len(list(datasets.loader(data.train, batches, 0, workers, **OPTIONS))) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_depends_on_seed_epoch_and_image():
    data = some_digits()
    images = datasets._Images(*data.train, seed=7, replaced=True)
    torch.manual_seed(1)
    first = images[3, 5][0]
    after = torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2), after)  # the global random state is unchanged
    torch.rand(5)
    assert torch.equal(images[3, 5][0], first)
    assert not torch.equal(images[4, 5][0], first)


# --- the command, and averages -------------------------------------------------------------------


def test_the_command(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from fused_resnet.cli import application
    from fused_resnet.cli import train as train_command

    words = ["train", "--image-size", "16", "--batch", "32", "--epochs", "1", "--threads", "1"]
    words += ["--out", str(tmp_path / "run")]
    done = CliRunner().invoke(application(), words)
    assert done.exit_code == 0, done.output
    assert "test accuracy" in done.output and "after 5 steps" in done.output
    picture = tmp_path / "run" / "metrics.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    second = CliRunner().invoke(application(), words)
    assert second.exit_code == 2 and "--resume" in second.output
    wrong = CliRunner().invoke(application(), [*words, "--optimizer", "adam"])
    assert wrong.exit_code == 2 and "--optimizer must be one of" in wrong.output
    sharded = CliRunner().invoke(application(), [*words, "--sharding", "fsdp"])
    assert sharded.exit_code == 2 and "needs more than one process" in sharded.output
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in train_command.plot_metrics([], tmp_path / "none.png")


def test_average_of_the_weights(tmp_path):
    """average = decay * average + (1 - decay) * weights, from the second step."""
    config = small(tmp_path, epochs=1, ema=0.75)
    seen: list[dict[str, Tensor]] = []
    step = loop._Run.one_step

    def patched(self: Any, x: Tensor, y: Tensor) -> Any:
        outcome = step(self, x, y)
        seen.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "one_step", patched)
        patch.setattr(datasets, "load", some_digits)
        run(config)
    average = state.read(Path(str(config.out)) / state.NEWEST)["average"]
    for key in ("conv1.weight", "layer3.0.bn1.running_var", "fc.bias"):
        want = seen[0][key]
        for weights in seen[1:]:
            want = 0.75 * want + 0.25 * weights[key]
        torch.testing.assert_close(average[f"module.{key}"], want, rtol=1e-4, atol=1e-6)
