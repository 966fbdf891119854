"""Files of a training run: atomically written checkpoints, and metrics consistent with them."""

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


def write_whole(path: Path, content: Any) -> None:
    """Write `path` atomically: a temporary file in the same folder is synced to disk and renamed.
    content: text, or a function that fills a binary file."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode()) if isinstance(content, str) else content(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write the newest checkpoint; the previous one is kept."""
    if (folder / NEWEST).exists():
        os.replace(folder / NEWEST, folder / BEFORE)
    write_whole(folder / NEWEST, lambda file: torch.save(state, file))


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint of `save`; only tensors and plain values are read, no code is executed.

    Raises CheckpointError naming the file and the reason if it is invalid.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = str(error).splitlines()[0]
        raise CheckpointError(
            f"checkpoint: {path} contains more than tensors and plain values: refused, no code was "
            f"executed ({what})"
        ) from None
    except Exception as error:  # the unpickler may raise anything for arbitrary bytes
        what = (str(error).splitlines() or ["unexpected end of file"])[0]
        raise CheckpointError(f"checkpoint: {path} is truncated or damaged: {what}") from None
    if not isinstance(state, dict) or not {"model", "config", "step"} <= state.keys():
        raise CheckpointError(f"checkpoint: {path} was not written by fused-resnet train")
    return state


def newest(folder: Path) -> dict[str, Any] | None:
    """The newest complete checkpoint in `folder`, with a warning if it is not the last one written;
    None if there is no checkpoint."""
    paths = [folder / name for name in (NEWEST, BEFORE) if (folder / name).exists()]
    for i, path in enumerate(paths):
        try:
            return read(path)
        except CheckpointError as error:
            if i + 1 == len(paths):
                raise
            warnings.warn(f"{error}; resuming from {paths[i + 1].name}", stacklevel=2)
            # Renamed, or the next save would replace the complete checkpoint with it.
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, path.with_suffix(".damaged"))
    return None


class Metrics:
    """metrics.jsonl: a line per step and per epoch. Lines of steps after `step` are removed first:
    a resumed run repeats them."""

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / "metrics.jsonl"
        rows = [row for row in read_metrics(path) if row["step"] <= step] if step else []
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = open(path, "a")  # noqa: SIM115 - closed by close()

    def add(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, without a truncated last line of a killed run."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
