"""Who computes a convolution on a GPU, and how: measured winners, kept on disk.

Contenders are modules that each know one backend's convolution: this package's CUDA kernels
(cuda_conv), its Triton kernels, and what cuDNN fuses (cudnn_conv). A contender says which problems
it covers, which configurations are worth measuring, and which one it would take unmeasured.

`choice` is asked at every call and never measures anything: the fastest of what was measured for
this problem, else the first backend in the order of `backends` with its own heuristic. `tune`
measures, and is called by `fused-resnet tune` alone.

Two places hold winners: `tuned/` in this package (those of GPUs we have measured) and the user's
cache folder, which wins. A file there that cannot be read is ignored with one line, one that cannot
be written leaves the winners to this process alone; it is written beside and renamed, so that a
reader never sees half of it and nobody waits for anybody.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_resnet.kernels.target import capability, multiprocessors

from .problem import Problem
from .registry import gpu_convolution

SHIPPED = Path(__file__).parent / "tuned"


class Choice(NamedTuple):
    """A backend, how it is to run a problem, and the time that took, in seconds; infinite where
    nobody has measured it here."""

    backend: str
    config: Any
    time_s: float = math.inf


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fused_resnet, by default ~/.cache/fused_resnet."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fused_resnet"


@functools.cache
def file_name(device: torch.device) -> str:
    """<GPU>-driver<version>-torch<version>-triton<version>.json: what a time depends on."""
    try:
        triton = importlib.import_module("triton").__version__
    except Exception:  # broken installs raise anything at all
        triton = "none"
    name = re.sub(r"[^A-Za-z0-9.]+", "_", torch.cuda.get_device_name(device)).strip("_")
    driver = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else 0
    return f"{name}-driver{driver}-torch{torch.__version__.split('+')[0]}-triton{triton}.json"


# Per problem, the best that each backend reached.
Winners = dict[Problem, dict[str, Choice]]


def read(path: Path) -> Winners:
    """The winners in a file; none, with one line of warning, where it is not what was written."""
    found: Winners = {}
    try:
        for row in json.loads(path.read_text())["winners"]:
            backend = row["backend"]
            config = gpu_convolution(backend).CONFIG(**row["config"])
            if config.label() != row["label"]:
                continue  # tiles were numbered otherwise then
            choice = Choice(backend, config, float(row["time_s"]))
            found.setdefault(Problem(**row["problem"]), {})[backend] = choice
        return found
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except Exception as error:  # unreadable, cut short, of another version: measured again some day
        warnings.warn(
            f"fused_resnet: {path} is ignored ({type(error).__name__}: {error}); "
            "`fused-resnet tune` writes it anew",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


def write(path: Path, winners: Winners) -> str | None:
    """None when written, else why not, in one line."""
    rows = [
        {
            "problem": problem._asdict(),
            "backend": choice.backend,
            "config": asdict(choice.config),
            "label": choice.config.label(),
            "time_s": choice.time_s,
        }
        for problem, by_backend in sorted(winners.items())
        for choice in by_backend.values()
    ]
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps({"winners": rows}, indent=1) + "\n")
        beside.replace(path)
    except OSError as error:
        return f"{path} cannot be written ({error.strerror or error})"
    return None


def merged(older: Winners, newer: Winners) -> Winners:
    return {p: older.get(p, {}) | newer.get(p, {}) for p in older | newer}


_winners: dict[str, Winners] = {}


def winners(device: torch.device) -> Winners:
    """Every measured winner for such devices, read once per process: "cuda" and "cuda:0" share
    them, as do two GPUs of one make."""
    name = file_name(device) if device.type == "cuda" else device.type
    if name not in _winners:
        found: Winners = {}
        if device.type == "cuda":
            for folder in (SHIPPED, cache_folder()):
                found = merged(found, read(folder / name))
        _winners[name] = found
    return _winners[name]


@functools.lru_cache(maxsize=4096)
def choice(problem: Problem, device: torch.device, allowed: tuple[str, ...]) -> Choice | None:
    """Who computes `problem` on `device`, of the `allowed` backends, which are in order of
    preference; None where none of them covers it."""
    measured = winners(device).get(problem, {})
    known = [measured[backend] for backend in allowed if backend in measured]
    if known:
        return min(known, key=lambda c: c.time_s)
    for backend in allowed:
        module = gpu_convolution(backend)
        if module.covers(problem, capability(device)):
            config = module.choose(problem, capability(device), multiprocessors(device))
            return Choice(backend, config)
    return None


def candidates(
    problem: Problem, device: torch.device, backends: Sequence[str]
) -> list[tuple[str, Any]]:
    """Every backend and configuration worth measuring for this problem."""
    return [
        (backend, config)
        for backend in backends
        if gpu_convolution(backend).covers(problem, capability(device))
        for config in gpu_convolution(backend).candidates(problem, capability(device))
    ]


def tune(
    problems: Iterable[Problem],
    device: torch.device,
    backends: Sequence[str],
    measure: Callable[[Problem, str, Any], float],
    on_progress: Callable[[Problem, str, Any, float], None] | None = None,
) -> tuple[Winners, str | None]:
    """The fastest configuration of every problem on every backend by `measure`, seconds; kept in
    the cache folder, each as soon as it is known, so that a run cut short has not been in vain.

    Returns the winners found now, and why they could not be written, or None. A configuration that
    does not run on this device is passed over; a problem of which none runs has no winners.
    """
    found: Winners = {}
    name = file_name(device) if device.type == "cuda" else device.type
    path, not_kept = cache_folder() / name, None
    for problem in problems:
        best = found.setdefault(problem, {})
        for backend, config in candidates(problem, device, backends):
            try:
                time_s = measure(problem, backend, config)
            except Exception:  # too much shared memory, too many registers: not for this device
                time_s = math.inf
            if time_s < (best[backend].time_s if backend in best else math.inf):
                best[backend] = Choice(backend, config, time_s)
            if on_progress is not None:
                on_progress(problem, backend, config, time_s)
        not_kept = write(path, merged(read(path), {problem: best}))
    _winners[name] = merged(winners(device), found)
    choice.cache_clear()
    return found, not_kept
