"""A run of `fused-resnet train` interrupted before the modules moved into folders can be resumed:
tests/train/data/checkpoint-0.1.pt was written at commit d27e6e5 by step 5 of
`fused-resnet train --model cifar_resnet8 --epochs 2 --batch 256 --checkpoint-every 5`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parent / "data" / "checkpoint-0.1.pt"

for package in ("torchvision", "torchmetrics", "sklearn"):
    pytest.importorskip(package, reason="training needs the train extra")

from fused_resnet import cifar_resnet  # noqa: E402
from fused_resnet.train import Config, run, state  # noqa: E402


def test_a_run_of_version_0_1_resumes(tmp_path):
    shutil.copy(FILE, tmp_path / "checkpoint.pt")
    before = state.read(FILE)
    assert before["step"] == 5
    model = cifar_resnet(8, before["model"]["fc.bias"].numel())
    model.load_state_dict(before["model"])
    out = str(tmp_path)
    config = Config(model="cifar_resnet8", epochs=2, batch=256, checkpoint_every=5, out=out)
    run(config, resume=True)
    after = state.read(tmp_path / "checkpoint.pt")
    assert after["step"] == 10
    assert after["model"].keys() == before["model"].keys()
    counters = [key for key in before["model"] if key.endswith("num_batches_tracked")]
    assert counters and all(after["model"][k] == before["model"][k] + 5 for k in counters)
    assert not torch.equal(after["model"]["conv1.weight"], before["model"]["conv1.weight"])
