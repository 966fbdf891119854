"""A training's files: checkpoints that are whole whenever the process dies, and metrics that agree
with them."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from fused_resnet.parity.checkpoint import CheckpointError

NEWEST, BEFORE = "checkpoint.pt", "checkpoint-before.pt"


def write_whole(path: Path, write: Any) -> None:
    """write(file) into a file beside `path`, brought to the disk, then renamed to it: at any moment
    `path` is the old file or the new one, whole."""
    beside = path.with_suffix(path.suffix + ".tmp")
    with open(beside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(folder: Path, state: dict[str, Any]) -> None:
    """The newest checkpoint; the one before it is kept."""
    if (folder / NEWEST).exists():
        os.replace(folder / NEWEST, folder / BEFORE)
    write_whole(folder / NEWEST, lambda file: torch.save(state, file))


def read(path: Path) -> dict[str, Any]:
    """A checkpoint of `save`; only tensors and plain values are read, nothing is executed.

    CheckpointError that names the file and says why it is none.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = str(error).splitlines()[0]
        raise CheckpointError(
            f"checkpoint: {path} holds more than tensors and plain values: refused, and nothing in "
            f"it was executed ({what})"
        ) from None
    except Exception as error:  # whatever a stream of arbitrary bytes makes the unpickler raise
        what = (str(error).splitlines() or ["it ends too early"])[0]
        raise CheckpointError(f"checkpoint: {path} is cut short or damaged: {what}") from None
    if not isinstance(state, dict) or not {"model", "config", "step"} <= state.keys():
        raise CheckpointError(f"checkpoint: {path} is not of a training by fused-resnet train")
    return state


def newest(folder: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint in `folder`, with one warning where that is not the last one
    written; None where there is none at all."""
    found = [folder / name for name in (NEWEST, BEFORE) if (folder / name).exists()]
    for i, path in enumerate(found):
        try:
            return read(path)
        except CheckpointError as error:
            if i + 1 == len(found):
                raise
            warnings.warn(f"{error}; going on from {found[i + 1].name}", stacklevel=2)
            # Set aside, or the next save would put it in the place of the whole one.
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, path.with_suffix(".damaged"))
    return None


class Metrics:
    """metrics.jsonl: a line per step and per epoch. Lines of steps after `step`, which a resumed
    run will make again, are taken out first."""

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= step] if step else []
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_whole(path, lambda file: file.write(text.encode()))
        self._file = open(path, "a")  # noqa: SIM115 - closed by close()

    def add(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that a kill cut short is no row."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
