"""Checkpoints that are truncated, of another model or contain code raise and execute nothing."""

from __future__ import annotations

import os

import pytest
import torch

import fused_resnet as fr
from fused_resnet.parity.checkpoint import CheckpointError, load_checkpoint, load_into


@pytest.fixture
def model():
    return fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=4)


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "module."])
def test_common_formats_load(model, tmp_path, wrap):
    state = model.state_dict()
    content = {"plain": state, "module.": {f"module.{k}": v for k, v in state.items()}}.get(
        wrap, {wrap: state, "epoch": 3}
    )
    torch.save(content, tmp_path / "c.pt")
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert list(loaded) == list(state)
    other = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=4)
    load_into(other, loaded, "resnet", tmp_path / "c.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(other.state_dict().values(), state.values(), strict=True)
    )


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.999])
def test_truncated(model, tmp_path, fraction):
    path = tmp_path / "c.pt"
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(CheckpointError, match=r"c\.pt"):
        load_checkpoint(path)


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_code_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol in (True, False):
        torch.save({"x": Payload()}, "c.pt", _use_new_zipfile_serialization=protocol)
        with pytest.raises(CheckpointError, match=r"c\.pt"):
            load_checkpoint("c.pt")
    assert not os.path.exists("executed")


def test_of_another_model(model, tmp_path):
    path = tmp_path / "c.pt"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for state, words in (
        (fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=9).state_dict(), "fc"),
        (fr.ResNet(fr.BasicBlock, [2, 1, 1, 1], num_classes=4).state_dict(), r"layer1\.1"),
        ({k: v for k, v in before.items() if k != "bn1.bias"}, r"bn1\.bias"),
    ):
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=words):
            load_into(model, load_checkpoint(path), "resnet", path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(3), {}, None], ids=str)
def test_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"c\.pt"):
        load_checkpoint(tmp_path / "c.pt")


def test_missing_file(tmp_path):
    with pytest.raises((CheckpointError, FileNotFoundError), match="nothing"):
        load_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises((CheckpointError, OSError)):
        load_checkpoint(tmp_path)
