"""A run's files: checkpoints that are whole whenever the process dies, and metrics that agree with
them."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..checkpoint import CheckpointError, _first_sentence

METRICS, SETTINGS, PLOT = "metrics.jsonl", "config.json", "metrics.png"
_NAME = re.compile(r"checkpoint-(\d+)\.pt")
KEYS = frozenset({"config", "step", "model", "optimizer", "schedule", "scaler", "metrics_bytes"})


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """`write` into a file beside `path`, which reaches the disk and is then renamed to it: at any
    moment, whatever dies, `path` is what it was or the whole of what is written now."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, is on the disk
    finally:
        os.close(folder)


def files(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the newest first."""
    found = [(_NAME.fullmatch(p.name), p) for p in folder.glob("checkpoint-*.pt")]
    steps = [(int(match[1]), p) for match, p in found if match is not None]
    return [p for _, p in sorted(steps, reverse=True)]


def save(folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Writes checkpoint-STEP.pt and keeps it and the `keep` - 1 before it. Of later steps there are
    only damaged ones, which the run went back from; they go, and what a killed process left
    half-written."""
    path = folder / f"checkpoint-{state['step']:08d}.pt"
    write_whole(path, lambda file: torch.save(state, file))
    found = files(folder)
    here = found.index(path)
    for old in found[:here] + found[here + keep :]:
        old.unlink()
    for half in folder.glob(".checkpoint-*.pt.*"):
        half.unlink(missing_ok=True)
    return path


def read(path: Path) -> dict[str, Any]:
    """A checkpoint of `save`, on the CPU; only tensors and plain values are read, and nothing in
    the file is executed. CheckpointError names the file and says what is wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters is raised
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error) and "global" not in str(error):
            raise CheckpointError(f"checkpoint: {path} is damaged") from None
        raise CheckpointError(
            f"checkpoint: {path} holds more than tensors and plain values: refused, and nothing "
            f"in it was executed"
        ) from None
    except Exception as error:  # whatever a stream of arbitrary bytes makes the unpickler raise
        raise CheckpointError(
            f"checkpoint: {path} ({path.stat().st_size} bytes) is cut short or damaged: "
            f"{_first_sentence(error)}"
        ) from None
    if not isinstance(state, dict) or not state.keys() >= KEYS:
        raise CheckpointError(f"checkpoint: {path} is not of a run of fused-resnet train")
    return state


def newest(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint in `folder`, with one warning for each newer one that is not;
    None where there is none at all. CheckpointError where none of them is whole."""
    problems: list[str] = []
    for path in files(folder):
        try:
            state = read(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warn(f"{problem}; going back to {path.name}")
        return path, state
    if problems:
        raise CheckpointError("; ".join(problems))
    return None


class Metrics:
    """metrics.jsonl: a line of JSON per step and per epoch.

    size: bytes of it that a checkpoint knows of. What comes after them was written by a process
    that died later than its checkpoint, and is dropped: those steps will be made again.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close()
        self.missing = max(0, size - self._file.tell())  # bytes that somebody took away
        if not self.missing:
            self._file.truncate(size)
            self._file.seek(0, os.SEEK_END)

    def add(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Brings all lines to the disk; how many bytes there are."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that a kill cut short is no row."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1] if line]
