"""A tiny data set in CIFAR-10's file format: reading, augmentation, and training by
`fused-resnet depth`, with the settings of He et al. 2015 (1512.03385), section 4.2, and by
`fused-resnet train`."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision", reason="it reads CIFAR-10")
pytest.importorskip("torchmetrics", reason="needs the train extra")
pytest.importorskip("typer", reason="the commands need typer and rich")

from torchvision.datasets import CIFAR10
from typer.testing import CliRunner

from fused_resnet.cli import application
from fused_resnet.depth.experiment import Experiment
from fused_resnet.depth.setting import Config
from fused_resnet.depth.steps import Steps, paper_factor
from fused_resnet.train import data as datasets

TRAIN, TEST = 130, 40  # images
NAMES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that contains cifar-10-batches-py."""
    root = tmp_path_factory.mktemp("cifar10")
    folder = root / CIFAR10.base_folder
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def write(name: str, content: Any) -> str:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    def batch(images: int) -> dict[str, Any]:
        """The brightness determines the class."""
        labels = torch.randint(10, (images,), generator=generator)
        noise = torch.randint(56, (images, 3072), generator=generator)
        data = (noise + 20 * labels[:, None]).to(torch.uint8).numpy()
        return {"data": data, "labels": labels.tolist()}

    parts = [f"data_batch_{i}" for i in range(1, 6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, "train_list", [[p, write(p, batch(TRAIN // 5))] for p in parts])
        patch.setattr(CIFAR10, "test_list", [["test_batch", write("test_batch", batch(TEST))]])
        md5 = write(str(CIFAR10.meta["filename"]), {CIFAR10.meta["key"]: NAMES})
        patch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5})
        yield root


def fused_resnet(*arguments: Any) -> Any:
    result = CliRunner().invoke(application(), list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result


def test_images_and_augmentation(root):
    """Training: zero-padded by 4 pixels, random 32 x 32 crop and flip. Test: neither."""
    data = datasets.load("cifar10", str(root), None)
    assert data.classes == NAMES
    train, test = data.train[0], data.test[0]
    assert len(train) == TRAIN and len(test) == TEST
    stored = pickle.loads((root / CIFAR10.base_folder / "data_batch_2").read_bytes())
    image, label = train[TRAIN // 5 + 3]  # the second file's fourth
    assert torch.equal(image, torch.from_numpy(stored["data"][3]).view(3, 32, 32))
    assert label == stored["labels"][3]

    def normalised(x: Tensor) -> Tensor:
        mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
        return (x / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    torch.testing.assert_close(data.test[1](test[0][0]), normalised(test[0][0]))
    padded = nn.functional.pad(image, (4, 4, 4, 4))
    crops = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    expected = normalised(torch.cat([crops, crops.flip(-1)]))
    seen = set()
    for _ in range(300):
        error = (expected - data.train[1](image)).abs().amax((1, 2, 3))
        assert error.min() < 1e-5
        seen.add(int(error.argmin()))
    corners = {0, 8, 72, 80}
    assert len(seen) > 100 and {i % 81 for i in seen} & corners  # of 162
    assert {i // 81 for i in seen} == {0, 1}


def test_a_damaged_file_raises(root):
    file = root / CIFAR10.base_folder / "test_batch"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + b"?")
    try:
        with pytest.raises(ValueError, match=r"--root .*: CIFAR-10 is missing or damaged"):
            datasets.load("cifar10", str(root), None)
    finally:
        file.write_bytes(raw)


@pytest.mark.slow
def test_depth(root, tmp_path):
    fused_resnet(
        "depth", "--data", "cifar10", "--root", root, "--depths", "8,14", "--epochs", 1,
        "--seeds", 1, "--deep", 20, "--deep-steps", 2, "--batch", 32, "--out", tmp_path,
    )  # fmt: skip
    summary = json.loads((tmp_path / "report.json").read_text())
    assert summary["settings"]["lr"] == 0.1
    assert {(r["kind"], r["depth"]) for r in summary["errors"]} == {
        (kind, depth) for kind in ("plain", "residual") for depth in (8, 14)
    }
    for row in summary["errors"]:
        assert row["diverged"] == {} and row["train_error"] is not None
        assert (row["test_error"]["mean"] * TEST) % 1 == pytest.approx(0)
    (deep,) = summary["deep"]
    assert deep["steps"] == 2 and None not in deep["losses"]
    assert "cifar10, basic blocks, 1 epochs, batch 32" in (tmp_path / "report.md").read_text()


def test_train(root, tmp_path):
    result = fused_resnet(
        "train", "--model", "cifar_resnet8", "--data", "cifar10", "--root", root, "--epochs", 2,
        "--batch", 16, "--lr", 0.05, "--out", tmp_path,
    )  # fmt: skip
    assert "after 16 steps" in result.output
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 16 and losses[-1] < losses[0]


# --- training as in the paper ---------------------------------------------------------------------


class Identity(nn.Module):
    """Returns x as logits; has one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.w


def rates(depth: int, errors: list[float], images: int = 40) -> list[float]:
    """The learning rate of each of 40 steps with 10 images, where step i misclassifies the fraction
    errors[i], or 0 after the end of the list."""
    config = Config(data="cifar10", epochs=10, batch=10, lr=0.1)
    stand_in: Any = SimpleNamespace(config=config, data=SimpleNamespace(x=torch.empty(images)))
    model = Identity()
    steps = Steps(stand_in, model, depth, seed=0)
    (group,) = steps.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)
    rates: list[float] = []
    steps.optimizer.register_step_pre_hook(lambda *_: rates.append(group["lr"]))
    for i in range(40):
        y = torch.arange(10)
        wrong = round(10 * errors[i]) if i < len(errors) else 0
        predicted = torch.where(torch.arange(10) < wrong, (y + 1) % 10, y)
        assert steps.step(nn.functional.one_hot(predicted, 10).float(), y)[1] == wrong
    return rates


def test_learning_rate_of_20_layers():
    """0.1, divided by 10 after 1/2 and 3/4 of the steps, independent of the error."""
    want = [0.1] * 20 + [0.01] * 10 + [0.001] * 10
    assert rates(20, [1.0] * 40) == pytest.approx(want)
    assert rates(20, []) == pytest.approx(want)


def test_learning_rate_of_110_layers():
    """0.01 until a batch's error is below 80%, 0.1 from the next step."""
    errors = [0.9, 0.9, 0.8, 0.7, 0.9, 1.0]
    want = [0.01] * 4 + [0.1] * 16 + [0.01] * 10 + [0.001] * 10
    assert rates(110, errors) == pytest.approx(want)
    assert rates(104, errors)[0] == 0.1
    never = [0.01] * 30 + [0.001] * 10
    assert rates(110, [0.8] * 40) == pytest.approx(never)


def test_schedule_lengths_of_the_paper(root, tmp_path):
    """64k steps of 128 images are 164 epochs of CIFAR-10's 50,000; drops at 32k and 48k."""
    c = Experiment(Config(data="cifar10", root=str(root), out=str(tmp_path))).config
    assert (c.epochs, c.batch, c.lr, c.stochastic_depth) == (164, 128, 0.1, 0.0)
    assert c.epochs * (50_000 // c.batch) == pytest.approx(64_000, rel=1e-3)
    at = [0, 31_999, 32_000, 47_999, 48_000, 63_999]
    factors = [paper_factor(step, 64_000, False) for step in at]
    assert factors == [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]


def test_batch_larger_than_the_data_set(root, tmp_path):
    config = Config(data="cifar10", root=str(root), batch=TRAIN + 1, out=str(tmp_path))
    with pytest.raises(ValueError, match="--batch must be at most 130, the number of images, got"):
        Experiment(config)
