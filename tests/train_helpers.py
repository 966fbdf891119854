"""What the training tests share: small configurations, and processes that start quickly.

Processes fork from a server that has imported everything already and computed nothing, so that one
costs a tenth of a second instead of five; they can be killed at any moment without harm.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision", reason="training needs torchvision's transforms")
pytest.importorskip("torchmetrics", reason="training measures with torchmetrics")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

from fused_resnet.train import Config

TIMEOUT_S = 60.0
PRELOAD = [
    "fused_resnet.train", "torchvision.transforms.v2", "torchvision.datasets",
    "torchmetrics.classification", "sklearn.datasets", "torch.distributed.fsdp",
]  # fmt: skip


def config(out: Path | str, **changes: Any) -> Config:
    """ResNet-8, eleven steps in an epoch of the digits, on one thread of the CPU."""
    defaults: dict[str, Any] = {
        "model": "resnet8", "batch": 128, "epochs": 2, "checkpoint_every": 4, "threads": 1,
        "device": "cpu",
    }  # fmt: skip
    return Config(**{**defaults, **changes}, out=str(out))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[Any, ...]]:
    """Everything in metrics.jsonl that must not depend on when a run was interrupted."""
    return [tuple(v for k, v in row.items() if k != "images_per_s") for row in rows(folder)]


@functools.cache
def context() -> Any:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    return server


def start(target: Callable[..., None], *arguments: Any) -> Any:
    process = context().Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def together(target: Callable[..., None], count: int, folder: Path, *arguments: Any) -> None:
    """target(rank, folder, *arguments) in `count` processes with torchrun's environment; fails with
    what they said where one of them fails or all take longer than TIMEOUT_S."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [
        start(_member, target, rank, count, port, folder, *arguments) for rank in range(count)
    ]
    deadline = time.monotonic() + TIMEOUT_S
    # One that fails leaves the others waiting for it.
    while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    for process in processes:
        process.join(1.0)
        if process.is_alive():
            process.kill()
            process.join()
    said = [p.read_text() for p in sorted(folder.glob("failed-*.txt"))]
    assert [p.exitcode for p in processes] == [0] * count, "\n".join(said)


def _member(
    target: Callable[..., None], rank: int, count: int, port: int, folder: Path, *arguments: Any
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    try:
        target(rank, folder, *arguments)
    except BaseException:
        (folder / f"failed-{rank}.txt").write_text(traceback.format_exc())
        raise
