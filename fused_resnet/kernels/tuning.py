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

import contextlib
import functools
import importlib
import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
# The labels of all measured configurations, also of those that failed.
Measured = dict[Gemm, dict[str, list[str]]]


def load(path: Path) -> tuple[Winners, Measured]:
    """The contents of a file; nothing, with a one-line warning, if they are invalid."""
    loaded: Winners = {}
    measured: Measured = {}
    try:
        content = json.loads(path.read_text())
        for row in content["winners"]:
            backend = row["backend"]
            config = gpu_convolution(backend).CONFIG(**row["config"])
            if config.label() != row["label"]:
                continue  # written by a version with other tile indices
            choice = Choice(backend, config, float(row["time_s"]))
            loaded.setdefault(Gemm(**row["problem"]), {})[backend] = choice
        for row in content.get("measured", []):
            measured[Gemm(**row["problem"])] = row["labels"]
        return loaded, measured
    except (FileNotFoundError, NotADirectoryError):
        return {}, {}
    except Exception as error:  # unreadable, truncated, or from another version
        warnings.warn(
            f"fused_resnet: {path} is ignored ({type(error).__name__}: {error}); "
            "`fused-resnet tune` rewrites it",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}, {}


def read(path: Path) -> Winners:
    """The winners in a file."""
    return load(path)[0]


def write(path: Path, winners: Winners, measured: Measured | None = None) -> str | None:
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
    done = [
        {"problem": gemm._asdict(), "labels": labels}
        for gemm, labels in sorted((measured or {}).items())
    ]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"winners": rows, "measured": done}, indent=1) + "\n")
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


class Wrong(Exception):
    """The output of a configuration is wrong; the message says by how much."""


class Broken(RuntimeError):
    """A configuration left the GPU unusable for the rest of this process."""


class Tuned(NamedTuple):
    """winners: also those that an earlier run had measured. complete: whether every configuration
    is measured. wrong: one line for each configuration whose output was wrong. write_error: why the
    winners could not be written, or None."""

    winners: Winners
    complete: bool
    wrong: list[str]
    write_error: str | None


def tune(
    problems: Iterable[Problem],
    device: torch.device,
    backends: Sequence[Provider],
    measure: Callable[[Problem, str, Any], float],
    on_progress: Callable[[Problem, str, Any, float], None] | None = None,
    *,
    seconds: float | None = None,
    again: bool = False,
) -> Tuned:
    """Finds the fastest configuration per problem, of different `Gemm`s, and backend.

    measure: returns seconds; raises `Wrong` if the output is wrong, anything else if the
    configuration does not run on this device. Neither wins; a problem of which no configuration
    runs has no winners. seconds: after this time no further configuration is begun. again: measure
    what an earlier run has measured too.

    Configurations that need no compilation are measured first, for all problems; the others are
    compiled by other threads meanwhile. After each problem and backend the winners and the list of
    what was measured are written to the cache folder, from which a later run continues. Raises
    `Broken` if the device does not work after a configuration failed, which a later run skips.
    """
    path, end = cache_folder() / file_name(device), math.inf
    if seconds is not None:
        end = time.monotonic() + seconds
    known, before = ({}, {}) if again else load(path)
    tuned: Winners = {}
    labels: Measured = {}
    problems = list(problems)
    for problem in problems:
        gemm = problem.gemm()
        labels[gemm] = {backend: [*done] for backend, done in before.get(gemm, {}).items()}
        tuned[gemm] = {b: c for b, c in known.get(gemm, {}).items() if b in labels[gemm]}
    work = _in_order(problems, device, backends)
    complete, wrong, write_error = True, list[str](), None
    with _compiling(work, device, labels) as compiled:
        for problem, p, configs in work:
            gemm = problem.gemm()
            best, done = tuned[gemm], labels[gemm].setdefault(p.name, [])
            at_first = len(done)
            try:
                for config in configs:
                    time_s, label = math.inf, config.label()
                    if label not in done:
                        if time.monotonic() >= end:
                            complete = False
                            break
                        compiled(gemm, config)
                        try:
                            time_s = measure(problem, p.name, config)
                        except Wrong as error:  # not noted as done: every run reports it
                            wrong.append(f"{p.name} {label} is wrong for {gemm}: {error}")
                        except torch.OutOfMemoryError:
                            complete = False  # nor is one for which others left no memory
                        except Exception as error:  # too much shared memory or too many registers
                            done.append(label)
                            _require_working(device, f"{p.name} {label} for {gemm}", error, path)
                        else:
                            done.append(label)
                    if time_s < (best[p.name].time_s if p.name in best else math.inf):
                        best[p.name] = Choice(p.name, config, time_s)
                    if on_progress is not None:
                        on_progress(problem, p.name, config, time_s)
            finally:
                if len(done) > at_first:
                    write_error = _save(path, gemm, best, labels[gemm])
    _winners[path.name] = merged(winners(device), tuned)
    choice.cache_clear()
    return Tuned(tuned, complete, wrong, write_error)


def _in_order(
    problems: Sequence[Problem], device: torch.device, backends: Sequence[Provider]
) -> list[tuple[Problem, Provider, list[Any]]]:
    """Every problem, backend and its configurations: first those that need no compilation."""
    ready: list[tuple[Problem, Provider, list[Any]]] = []
    rest = list(ready)
    for problem in problems:
        for p in backends:
            configs = [config for _, config in configurations(problem, device, (p,))]
            compiles = hasattr(p.gpu_convolution(), "compile_ahead")
            (rest if compiles else ready).append((problem, p, configs))
    return ready + rest


@contextlib.contextmanager
def _compiling(
    work: Sequence[tuple[Problem, Provider, list[Any]]], device: torch.device, done: Measured
) -> Iterator[Callable[[Gemm, Any], None]]:
    """Compiles in other threads, in the order of `work`, what is not done. Yields a function that
    waits for one configuration; its errors are those of its first launch too."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    futures = {}
    # One core is left to the thread that measures.
    with ThreadPoolExecutor(max(1, (cores or 1) - 1)) as pool:
        for problem, p, configs in work:
            gemm, module = problem.gemm(), p.gpu_convolution()
            for config in configs if hasattr(module, "compile_ahead") else ():
                if config.label() not in done[gemm].get(p.name, ()):
                    futures[gemm, config] = pool.submit(
                        module.compile_ahead, problem, config, device
                    )

        def wait(gemm: Gemm, config: Any) -> None:
            if (gemm, config) in futures:
                futures[gemm, config].exception()

        try:
            yield wait
        finally:
            pool.shutdown(cancel_futures=True)


def _require_working(device: torch.device, what: str, error: Exception, path: Path) -> None:
    """Raises `Broken` if a failure has corrupted the context of a GPU: every later configuration
    would fail too, and appear not to run on this device."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as second:
        line = (str(error).strip() or "no message").splitlines()[0]
        raise Broken(
            f"tune: the GPU does not work any more after {what} failed ({type(error).__name__}: "
            f"{line}). The winners so far are in {path}; a new run skips this configuration"
        ) from second


def _save(path: Path, gemm: Gemm, best: dict[str, Choice], labels: dict[str, list[str]]) -> Any:
    """Replaces what the file holds of one problem's measured backends; see `write`."""
    stored, measured = load(path)
    others = {b: c for b, c in stored.get(gemm, {}).items() if b not in labels}
    return write(path, stored | {gemm: others | best}, measured | {gemm: labels})
