"""`fused-resnet predict` and `explain`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import fused_resnet as fr
from tests.cli.commands import run

pytest.importorskip("typer", reason="the command line needs typer and rich")
pytest.importorskip("torchvision", reason="the transforms are torchvision's")
image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven images, of which one is cut short, one is text and one has transparency; a checkpoint
    of three classes; their names."""
    folder = tmp_path_factory.mktemp("predict")
    torch.manual_seed(0)
    (folder / "images" / "inner").mkdir(parents=True)
    for i in range(5):
        pixels = torch.randint(0, 256, (60 + i, 80, 3), dtype=torch.uint8).numpy()
        image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    image.new("RGBA", (50, 50), (200, 10, 10, 128)).save(folder / "images" / "inner" / "clear.png")
    whole = (folder / "images" / "0.png").read_bytes()
    (folder / "images" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "images" / "text.jpg").write_text("not an image")
    model = fr.resnet18(num_classes=3)
    torch.save(model.state_dict(), folder / "weights.pt")
    (folder / "names.txt").write_text("cat\ndog\nhorse\n")
    return folder


def invoke(*arguments: str):
    """As `run`, in this process."""
    from typer.testing import CliRunner

    from fused_resnet.cli import application

    return CliRunner().invoke(application(), arguments, env={"COLUMNS": "160"})


def options(folder) -> list[str]:
    checkpoint, labels = str(folder / "weights.pt"), str(folder / "names.txt")
    return ["--model", "resnet18", "--checkpoint", checkpoint, "--labels", labels, "--top", "2"]


def test_a_folder(folder):
    result = run("predict", str(folder / "images"), *options(folder), "--batch", "2", "--json", "-")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    names = [row["image"].rpartition("images/")[2] for row in rows]
    assert names == ["0.png", "1.png", "2.png", "3.png", "4.png", "inner/clear.png"]
    for name in ("cut.png", "text.jpg"):
        assert any(name in line for line in result.stderr.splitlines() if "skipped" in line)

    from torchvision.transforms._presets import ImageClassification

    model = fr.resnet18(num_classes=3).eval()
    model.load_state_dict(fr.load_checkpoint(folder / "weights.pt"))
    for row in rows[:2]:
        with image.open(row["image"]) as opened, torch.no_grad():
            x = ImageClassification(crop_size=224)(opened.convert("RGB"))[None]
            best = model(x).softmax(1)[0].topk(2)
        assert [e["class"] for e in row["top"]] == best.indices.tolist()
        assert [e["label"] for e in row["top"]] == [
            ("cat", "dog", "horse")[k] for k in best.indices.tolist()
        ]
        assert [e["probability"] for e in row["top"]] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )


@pytest.mark.slow
def test_processes_share_the_images(folder, tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command += ["-m", "fused_resnet.cli", "predict", str(folder / "images"), *options(folder)]
    shared = subprocess.run(
        [*command, "--json", str(out)], capture_output=True, text=True, timeout=300
    )
    assert shared.returncode == 0, shared.stderr
    alone = run("predict", str(folder / "images"), *options(folder), "--json", "-")
    mine, want = out.read_text().splitlines(), alone.stdout.splitlines()
    assert [json.loads(a)["image"] for a in mine] == [json.loads(b)["image"] for b in want]
    assert shared.stderr.count("skipped:") == 2


def test_a_table_and_errors(folder):
    result = invoke("predict", str(folder / "images" / "1.png"), *options(folder))
    assert result.exit_code == 0 and "1.png" in result.stdout and "%" in result.stdout
    for arguments, words in (
        ((str(folder / "none"), *options(folder)), "none does not exist"),
        ((str(folder / "images"),), "pass --weights NAME or --checkpoint FILE"),
        ((str(folder / "images"), "--model", "keras:x", "--weights", "a"), "torchvision:NAME"),
        ((str(folder / "images" / "text.jpg"), *options(folder)), "no image could be read"),
    ):
        result = invoke("predict", *arguments)
        assert result.exit_code == 2 and words in result.stderr, result.stderr
        assert "Traceback" not in result.stderr


def test_explain():
    name = "torchvision:fcn_resnet50"
    result = invoke("explain", "--model", name, "--size", "64", "--json", "-")
    assert result.exit_code == 0, result.stderr
    parts = json.loads(result.stdout)
    assert sum(part["share"] for part in parts) == pytest.approx(1)
    result = invoke("explain", "--model", "resnet18", "--size", "64")
    assert result.exit_code == 0 and "layer4.1" in result.stdout
    result = invoke("explain", "--model", "torchvision:nothing")
    assert result.exit_code == 2 and "nothing" in result.stderr


def test_torchvision_s_registry():
    import torchvision

    names = fr.register_with_torchvision()
    assert names == fr.register_with_torchvision() and "fused_resnet50" in names
    model = torchvision.models.get_model("fused_resnet18", num_classes=5)
    assert isinstance(model, fr.ResNet) and model.fc.out_features == 5
    assert "fused_resnet18" in torchvision.models.list_models()
    weights = torchvision.models.get_model_weights("fused_resnet50")
    assert weights is torchvision.models.ResNet50_Weights


def test_timm_s_registry():
    timm = pytest.importorskip("timm")
    names = fr.register_with_timm()
    assert names == fr.register_with_timm() and "fused_resnet50" in names
    torch.manual_seed(0)
    model = timm.create_model("fused_resnet18", num_classes=5, in_chans=1).eval()
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(y, fr.unfuse(model)(x), rtol=1e-4, atol=1e-5)
    assert y.shape == (1, 5)
