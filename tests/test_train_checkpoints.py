"""A run's checkpoints: whole whenever it dies, trusted by nobody, and going on with the same bits."""

from __future__ import annotations

import os
import pickle
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from train_helpers import config, losses, rows, start  # isort: skip - it skips what cannot run

from fused_resnet.checkpoint import CheckpointError
from fused_resnet.train import checkpointing, run
from fused_resnet.train.checkpointing import Metrics, read_metrics, save, write_whole


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of one epoch: checkpoints after steps 8 and 11."""
    folder = tmp_path_factory.mktemp("finished")
    run(config(folder, epochs=1))
    return folder


def copied(finished: Path, folder: Path) -> Path:
    for path in finished.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


# --- one file -------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def half(file) -> None:
        file.write(b"half of")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_whole(path, half)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_the_file_is_on_the_disk_before_it_is_renamed_and_the_name_after(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(fd: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        fsync(fd)

    def renamed(a, b) -> None:
        assert Path(a).parent == Path(b).parent and Path(a).read_bytes() == b"whole"
        done.append("rename")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_whole(tmp_path / "file", lambda file: file.write(b"whole"))
    assert done == ["file", "rename", "folder"]


def test_the_last_few_are_kept(tmp_path):
    (tmp_path / ".checkpoint-00000002.pt.123").write_text("half, by a process that was killed")
    (tmp_path / "checkpoint-00000009.pt").write_text(
        "damaged, and later than where we went back to"
    )
    (tmp_path / "checkpoint-best.pt").write_text("somebody's own")
    for step in (1, 2, 3, 4):
        save(tmp_path, {"step": step}, keep=2)
    assert [p.name for p in checkpointing.files(tmp_path)] == [
        "checkpoint-00000004.pt", "checkpoint-00000003.pt",
    ]  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir())[-1] == "checkpoint-best.pt"
    assert len(list(tmp_path.iterdir())) == 3


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_payload_is_refused_and_not_executed(tmp_path, monkeypatch, finished):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint-00000011.pt"
    state = checkpointing.read(finished / path.name)
    torch.save({**state, "model": Payload()}, path)
    with pytest.raises(CheckpointError, match=r"-00000011\.pt holds more than tensors.*nothing"):
        checkpointing.read(path)
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match=r"-00000011\.pt"):
        checkpointing.read(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9999])
def test_cut_short(tmp_path, finished, share):
    path = tmp_path / "checkpoint-00000011.pt"
    whole = (finished / path.name).read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"-00000011\.pt.*(cut short|damaged)"):
        checkpointing.read(path)


@pytest.mark.parametrize("content", [{"a": 1}, [1], torch.zeros(2)], ids=str)
def test_something_else(tmp_path, content):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"c\.pt is not of a run of fused-resnet train"):
        checkpointing.read(tmp_path / "c.pt")


# --- a run that finds them ------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    if how == "cut short":
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        torch.save({**checkpointing.read(path), "extra": Payload()}, path)


@pytest.mark.parametrize("how", ["cut short", "empty", "payload"])
def test_a_damaged_one_is_named_and_the_one_before_serves(tmp_path, finished, how):
    copied(finished, tmp_path)
    damage(tmp_path / "checkpoint-00000011.pt", how)
    warned: list[str] = []
    said: list[str] = []
    run(config(tmp_path, epochs=1), said.append, resume=True, warn=warned.append)
    (line,) = warned
    assert "checkpoint-00000011.pt" in line and "going back to checkpoint-00000008.pt" in line
    assert "resuming from checkpoint-00000008.pt, after step 8 of 11" in said
    assert losses(tmp_path) == losses(finished)
    assert checkpointing.read(tmp_path / "checkpoint-00000011.pt")["step"] == 11


def test_where_all_are_damaged_all_are_named(tmp_path, finished):
    copied(finished, tmp_path)
    for path in checkpointing.files(tmp_path):
        damage(path, "cut short")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for resume in (True, False):
        with pytest.raises(CheckpointError, match=r"(?s)-00000011\.pt.*-00000008\.pt"):
            run(config(tmp_path, epochs=1), resume=resume)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_of_another_model(tmp_path, finished):
    copied(finished, tmp_path)
    words = r"checkpoint-00000011\.pt: --model resnet8, not resnet14"
    with pytest.raises(CheckpointError, match=words):
        run(config(tmp_path, epochs=1, model="resnet14"), resume=True)
    # Its configuration says what is asked for, its tensors are others.
    path = tmp_path / "checkpoint-00000011.pt"
    state = checkpointing.read(path)
    state["model"]["fc.weight"] = torch.zeros(7, 64)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"00000011\.pt is not of a resnet8: .*fc\.weight"):
        run(config(tmp_path, epochs=1), resume=True)


# --- metrics --------------------------------------------------------------------------------------


def test_what_a_checkpoint_does_not_know_of_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.add({"step": 1, "loss": 0.1})
    size = metrics.sync()
    metrics.add({"step": 2, "loss": 0.2})
    metrics.close()
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "lo')  # a kill in the middle of a line
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    again = Metrics(path, size)
    again.add({"step": 2, "loss": 0.25})
    again.close()
    assert read_metrics(path) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.25}]


def test_taken_away_metrics_are_said_to_be_missing(tmp_path, finished):
    copied(finished, tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    warned: list[str] = []
    result = run(config(tmp_path, epochs=1), resume=True, warn=warned.append)
    assert result.steps == 11 and "metrics.jsonl: rows of earlier steps are missing" in warned[0]


# --- kills ----------------------------------------------------------------------------------------

KILLED = {"epochs": 3, "checkpoint_every": 2, "ema": 0.9}


def train_in_process(folder: str) -> None:
    torch.set_num_threads(1)
    run(config(folder, **KILLED), resume=True)


def test_killed_at_any_moment_a_run_goes_on_with_the_same_losses(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(config(one, **KILLED))
    rng = random.Random(0)
    steps = len(rows(one))
    kills = sorted(rng.sample(range(1, steps), 5))
    killed = 0
    for lines in kills:
        process = start(train_in_process, str(two))
        path = two / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline:
            if path.exists() and path.read_bytes().count(b"\n") >= lines:
                break
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))  # into whatever comes then: a step, a test, a write
        process.kill()
        process.join(10)
        killed += process.exitcode == -signal.SIGKILL
        for checkpoint in checkpointing.files(two):
            checkpointing.read(checkpoint)  # each is whole
    assert killed >= 3
    process = start(train_in_process, str(two))
    process.join(60)
    assert process.exitcode == 0
    assert losses(two) == losses(one)
    a, b = (checkpointing.read(checkpointing.files(f)[0]) for f in (one, two))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert not list(two.glob(".checkpoint*"))
