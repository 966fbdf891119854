"""Chooses the backend and configuration of a GPU convolution, from measurements cached on disk.

A provider's convolution module (`registry.gpu_convolution`) implements one backend's convolution:
cuda/implicit_gemm.py, triton/convolution.py and cuda/cudnn.py. It states which convolutions it
supports, which configurations are worth measuring, and which one its heuristic chooses without
measurements.

`choice` runs at every call and never measures: it returns the fastest measured configuration of the
problem, else the first backend in order of preference with its heuristic. `tune` measures; only
`fused-resnet tune` calls it.

Winners are read from `tuned/` in this package (GPUs that we have measured) and from the user's
cache folder, which takes precedence. An unreadable file is ignored with a one-line warning. If the
file cannot be written, the winners apply to this process only. It is written under a temporary name
and renamed, so that readers never see a partial file and need no lock.
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

from .problem import Gemm, Problem
from .registry import Provider, candidates, gpu_convolution, provider
from .target import multiprocessors

SHIPPED = Path(__file__).parent / "tuned"
MAX_SPLIT_ROWS = 64


class Choice(NamedTuple):
    """A backend, its configuration for a problem, and the measured time in seconds; infinite
    without a measurement."""

    backend: str
    config: Any
    time_s: float = math.inf


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fused_resnet, by default ~/.cache/fused_resnet."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fused_resnet"


@functools.cache
def file_name(device: torch.device) -> str:
    """<GPU>-driver<version>-torch<version>-triton<version>.json: all that times depend on. The type
    of a device that is no GPU."""
    if device.type != "cuda":
        return device.type
    try:
        triton = importlib.import_module("triton").__version__
    except Exception:  # broken installations raise arbitrary exceptions
        triton = "none"
    name = re.sub(r"[^A-Za-z0-9.]+", "_", torch.cuda.get_device_name(device)).strip("_")
    driver = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else 0
    return f"{name}-driver{driver}-torch{torch.__version__.split('+')[0]}-triton{triton}.json"


# The fastest configuration per problem and backend.
Winners = dict[Gemm, dict[str, Choice]]


def read(path: Path) -> Winners:
    """The winners in a file; none, with a one-line warning, if its contents are invalid."""
    loaded: Winners = {}
    try:
        for row in json.loads(path.read_text())["winners"]:
            backend = row["backend"]
            config = gpu_convolution(backend).CONFIG(**row["config"])
            if config.label() != row["label"]:
                continue  # written by a version with other tile indices
            choice = Choice(backend, config, float(row["time_s"]))
            loaded.setdefault(Gemm(**row["problem"]), {})[backend] = choice
        return loaded
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except Exception as error:  # unreadable, truncated, or from another version
        warnings.warn(
            f"fused_resnet: {path} is ignored ({type(error).__name__}: {error}); "
            "`fused-resnet tune` rewrites it",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


def write(path: Path, winners: Winners) -> str | None:
    """None if written, else the reason in one line."""
    rows = [
        {
            "problem": gemm._asdict(),
            "backend": choice.backend,
            "config": asdict(choice.config),
            "label": choice.config.label(),
            "time_s": choice.time_s,
        }
        for gemm, by_backend in sorted(winners.items())
        for choice in by_backend.values()
    ]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"winners": rows}, indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        return f"{path} cannot be written ({error.strerror or error})"
    return None


def merged(older: Winners, newer: Winners) -> Winners:
    return {p: older.get(p, {}) | newer.get(p, {}) for p in older | newer}


_winners: dict[str, Winners] = {}


def winners(device: torch.device) -> Winners:
    """All measured winners for a device, read once per process. "cuda" and "cuda:0" share them, as
    do two GPUs of the same model."""
    name = file_name(device)
    if name not in _winners:
        loaded: Winners = {}
        if device.type == "cuda":
            for folder in (SHIPPED, cache_folder()):
                loaded = merged(loaded, read(folder / name))
        _winners[name] = loaded
    return _winners[name]


def choice_for(problem: Problem, device: torch.device) -> Choice:
    """The backend and configuration for a convolution on `device`, by the providers that support
    it."""
    names = candidates(problem, device.type)
    return choice(problem.gemm(), device, tuple(provider(b, device.type) for b in names))


@functools.lru_cache(maxsize=4096)
def choice(gemm: Gemm, device: torch.device, allowed: tuple[Provider, ...]) -> Choice:
    """The fastest measured backend and configuration among the `allowed` providers; without
    measurements the first of them, in order of preference."""
    measured = winners(device).get(gemm, {})
    known = [measured[p.name] for p in allowed if p.name in measured]
    if known:
        return min(known, key=lambda c: c.time_s)
    first = allowed[0]
    module = first.gpu_convolution()
    if module is None:
        return Choice("reference", None)
    return Choice(first.name, module.choose(gemm, first.target(device), multiprocessors(device)))


def splits(block_m: int, steps: int) -> list[int]:
    """The numbers of programs among which a tile of block_m rows may be split: 1, and more where
    each has at least four of its steps. With too few tiles, smaller ones are preferred to splits of
    more than 64 rows."""
    return [s for s in (1, 2, 4, 8) if s == 1 or (block_m <= MAX_SPLIT_ROWS and steps >= 4 * s)]


def configurations(
    problem: Problem, device: torch.device, backends: Sequence[Provider]
) -> list[tuple[str, Any]]:
    """Every backend and configuration worth measuring for a convolution."""
    gemm = problem.gemm()
    return [
        (p.name, config)
        for p in backends
        if p.supports(problem, p.target(device)) is None
        for config in p.gpu_convolution().candidates(gemm, p.target(device))
    ]


def tune(
    problems: Iterable[Problem],
    device: torch.device,
    backends: Sequence[Provider],
    measure: Callable[[Problem, str, Any], float],
    on_progress: Callable[[Problem, str, Any, float], None] | None = None,
) -> tuple[Winners, str | None]:
    """Finds the fastest configuration per problem, of different `Gemm`s, and backend; `measure`
    returns seconds.

    Each problem's winners are written to the cache folder at once, so that an interrupted run keeps
    its results. Returns the new winners, and the reason why they could not be written, or None. A
    configuration that does not run on this device is skipped; a problem without any that runs has
    no winners.
    """
    tuned: Winners = {}
    path, write_error = cache_folder() / file_name(device), None
    for problem in problems:
        best = tuned.setdefault(problem.gemm(), {})
        for backend, config in configurations(problem, device, backends):
            try:
                time_s = measure(problem, backend, config)
            except Exception:  # too much shared memory or too many registers for this device
                time_s = math.inf
            if time_s < (best[backend].time_s if backend in best else math.inf):
                best[backend] = Choice(backend, config, time_s)
            if on_progress is not None:
                on_progress(problem, backend, config, time_s)
        write_error = write(path, merged(read(path), {problem.gemm(): best}))
    _winners[path.name] = merged(winners(device), tuned)
    choice.cache_clear()
    return tuned, write_error
