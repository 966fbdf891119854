"""The whole-model benchmark: times all contenders interleaved, in one run.

    from fused_resnet import bench
    results = bench.collect(bench.run(["resnet50"], [1, 8], ["float32", "bfloat16"]))
    bench.save(results, "benchmarks/results")

In every round each contender is timed once, starting with another one each time, so that a busy
machine slows all of them alike. In training on the CPU each runs in its own process (worker.py says
why). Results are medians with the interquartile range. A ratio is the median of the ratios within
the rounds.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fused_resnet.checks import at_least, one_of
from fused_resnet.models.resnet import list_models

from . import machine, memory
from .contenders import CONTENDERS, EAGER, Case, Step, Unavailable, flops, make_data
from .entry import Entry, enter
from .worker import Worker

__all__ = ["Event", "collect", "pair_ratio", "run", "save"]

MAX_ROUNDS = 60


@dataclass
class Event:
    """Progress of a run. fraction: 0 to 1; text: the current activity.

    case: set when a case is finished; results: set on the last event only.
    """

    fraction: float
    text: str
    case: dict[str, Any] | None = None
    results: dict[str, Any] | None = None


@dataclass
class _Remote(Entry):
    """A contender in its own process."""

    worker: Worker = field(kw_only=True)

    def sample(self) -> None:
        self.times_s.append(self.worker.ask("sample"))


def run(
    models: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    *,
    modes: Sequence[str] = ("infer",),
    device: str = "cpu",
    contenders: Sequence[str] = CONTENDERS,
    threads: int | None = None,
    seconds: float = 15.0,
    rounds: int = 7,
    with_memory: bool = False,
    name: str = "resnet",
) -> Iterator[Event]:
    """Measure every model x batch x dtype x mode; yields progress, and the results at the end.

    Arguments are checked in this call (ValueError), everything else runs during iteration.

    dtypes:      "float32", "bfloat16", "float16"; in training 16-bit means autocast
    threads:     of PyTorch and the other engines, default PyTorch's current number
    seconds:     target duration of the timed rounds of one case
    rounds:      minimum number of rounds (the maximum is 60)
    with_memory: also measure peak memory; on the CPU in one fresh process per contender
    """
    cases = [
        Case(model, batch, dtype, mode, device)
        for mode in modes
        for model in models
        for batch in batches
        for dtype in dtypes
    ]
    for case in cases:
        one_of("bench: model", case.model, list_models())
        one_of("bench: dtype", case.dtype, ("float32", "bfloat16", "float16"))
        one_of("bench: mode", case.mode, ("infer", "train"))
        at_least("bench: batch", case.batch, 1)
    if not cases or not contenders:
        raise ValueError("bench: at least one model, batch, dtype, mode and contender are needed")
    machine.use_device(device)
    for contender in contenders:
        one_of("bench: contender", contender, CONTENDERS)

    def events() -> Iterator[Event]:
        # On the CPU the limit of any dtype includes float32's.
        first = ["float32"] if device == "cpu" else []
        names = list(dict.fromkeys([*first, *dtypes]))
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            yield Event(0.0, "the machine's limits")
            results = machine.provenance(name, device)
            results["other_load_cores"] = machine.other_load()
            limits = machine.measure_limits(names, device)
            results["limits"], results["cases"] = limits, []
            for index, case in enumerate(cases):
                with contextlib.ExitStack() as workers:
                    options = (seconds, rounds, with_memory, workers)
                    for event in _run_case(case, contenders, *options):
                        event.fraction = (index + event.fraction) / len(cases)
                        if event.case is not None:
                            results["cases"].append(event.case)
                        yield event
            yield Event(1.0, "the machine's limits again")
            results["other_load_cores"] = max(
                results["other_load_cores"] or 0, machine.other_load() or 0
            )
            results["limits"] = machine.larger_limits(limits, machine.measure_limits(names, device))
            for finished in results["cases"]:
                _add_share_of_limit(finished, results["limits"])
            yield Event(1.0, "done", results=results)
        finally:
            torch.set_num_threads(before)

    return events()


def collect(
    events: Iterable[Event], on_event: Callable[[Event], None] | None = None
) -> dict[str, Any]:
    """Consume `events` and return the results; `on_event` is called with each one."""
    results: dict[str, Any] = {}
    for event in events:
        if on_event is not None:
            on_event(event)
        if event.results is not None:
            results = event.results
    return results


def save(results: dict[str, Any], folder: str | Path) -> Path:
    """Write <bench>-<device>-torch<version>.json into `folder`, atomically."""
    version = results["torch"].split("+")[0]
    path = Path(folder) / f"{results['bench']}-{results['device']}-torch{version}.json"
    return write_json(results, path)


def write_json(value: Any, path: str | Path) -> Path:
    """Write JSON to a temporary file and rename it to `path`, so that no reader sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
    return path


def pair_ratio(times: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """(median, interquartile range) of times / other, computed per round."""
    ratios = [a / b for a, b in zip(times, other, strict=True)]
    return statistics.median(ratios), _iqr(ratios)


# --- one case -------------------------------------------------------------------------------------


def _run_case(
    case: Case, contenders: Sequence[str], seconds: float, rounds: int, with_memory: bool,
    workers: contextlib.ExitStack,
) -> Iterator[Event]:  # fmt: skip
    """Yields events whose fractions refer to this case; building is the first half."""
    separate = case.mode == "train" and torch.device(case.device).type == "cpu"
    data = None if separate else make_data(case)
    entries: list[Entry] = []
    skipped: dict[str, str] = {}
    for index, name in enumerate(contenders):
        yield Event(0.5 * index / len(contenders), f"{case.label}: first call of {name}")
        try:
            if data is None:
                entries.append(_enter_in_worker(name, case, workers))
            else:
                entries.append(enter(name, case, data))
        except Unavailable as error:
            skipped[name] = str(error)
        except Exception as error:
            # A failure of another engine is noted in the results; one of stock PyTorch or this
            # package is raised.
            if name in (*EAGER, "fused"):
                raise
            lines = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
            skipped[name] = f"failed: {type(error).__name__}: {lines[0][:200]}"
    per_round = sum(e.sample_s for e in entries)
    target = int(seconds / per_round) if per_round > 0 else rounds
    count = max(rounds, min(MAX_ROUNDS, target))
    for index in range(count):
        yield Event(0.5 + 0.5 * index / count, f"{case.label}: round {index + 1} of {count}")
        _one_round(entries, index)
    peaks: dict[str, dict[str, int]] = {}
    for entry in entries:
        if with_memory or case.mode == "train" or torch.device(case.device).type == "cuda":
            yield Event(0.99, f"{case.label}: memory of {entry.name}")
            peaks[entry.name] = _memory(entry, case, with_memory)
    summary = _summary(case, entries, skipped, peaks)
    torch.compiler.reset()
    yield Event(1.0, case.label, case=summary)


def _enter_in_worker(name: str, case: Case, workers: contextlib.ExitStack) -> _Remote:
    """As `enter`, in a new process that `workers` closes."""
    worker = Worker(name, case, torch.get_num_threads())
    workers.callback(worker.close)
    answer = worker.ask("enter")
    output = torch.tensor(answer["output"])
    no_step = Step(lambda: output)  # the worker process runs the steps
    return _Remote(
        name, no_step, torch.device(case.device), answer["construct_s"], answer["first_call_s"],
        answer["call_s"], output, 0, worker=worker,
    )  # fmt: skip


def _one_round(entries: list[Entry], index: int) -> None:
    """Samples every contender once, starting at another one each round; disables gc meanwhile."""
    start = index % max(1, len(entries))
    gc.collect()
    gc.disable()
    try:
        for entry in entries[start:] + entries[:start]:
            entry.sample()
    finally:
        gc.enable()


def _memory(entry: Entry, case: Case, with_memory: bool) -> dict[str, int]:
    sizes: dict[str, int] = {}
    if isinstance(entry, _Remote):
        sizes |= entry.worker.ask("saved")
    elif case.mode == "train" and entry.step.model is not None:
        sizes["saved_bytes"] = memory.saved_bytes(entry.step)
    if torch.device(case.device).type == "cuda":
        if entry.step.model is not None:
            sizes["peak_bytes"] = memory.cuda_peak_bytes(entry.step, entry.owned_bytes, case.device)
    elif with_memory:
        sizes["peak_bytes"] = _fresh_process_peak_bytes(entry.name, case)
    return sizes


def _fresh_process_peak_bytes(name: str, case: Case) -> int:
    """`memory.process_peak_bytes` of a new process."""
    worker = Worker(name, case, torch.get_num_threads())
    try:
        return worker.ask("peak")
    except RuntimeError as error:
        raise RuntimeError(f"memory: {name} on {case.label} failed: {error}") from None
    finally:
        worker.close()


def _iqr(values: Sequence[float]) -> float:
    """The interquartile range; quartiles are interpolated linearly, as in torch.utils.benchmark."""
    quarters = torch.tensor([0.25, 0.75], dtype=torch.float64)
    low, high = torch.tensor(values, dtype=torch.float64).quantile(quarters).tolist()
    return high - low


def _summary(
    case: Case,
    entries: Sequence[Entry],
    skipped: dict[str, str],
    peaks: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """The case's entry in the results file."""
    medians = {e.name: statistics.median(e.times_s) for e in entries}
    best = min((e for e in entries if e.name in EAGER), key=lambda e: medians[e.name], default=None)
    rows: dict[str, Any] = {}
    for e in entries:
        ratio: tuple[float | None, float | None] = (None, None)
        difference = None
        if best:
            ratio = pair_ratio(e.times_s, best.times_s)
            # Relative rms difference of the first outputs (logits, or the loss): a sanity check.
            difference = ((e.output - best.output).norm() / best.output.norm()).item()
        rows[e.name] = {
            "median_ms": medians[e.name] * 1e3,
            "iqr_ms": _iqr(e.times_s) * 1e3,
            "images_per_s": case.batch / medians[e.name],
            "ratio_to_eager": ratio[0],
            "ratio_iqr": ratio[1],
            "construct_s": e.construct_s,
            "first_call_s": e.first_call_s,
            "difference_to_eager": difference,
            "peak_bytes": peaks.get(e.name, {}).get("peak_bytes"),
            "saved_bytes": peaks.get(e.name, {}).get("saved_bytes"),
            "activation_peak_bytes": peaks.get(e.name, {}).get("activation_peak_bytes"),
            "times_ms": [round(t * 1e3, 4) for t in e.times_s],
        }
    return {
        "model": case.model,
        "batch": case.batch,
        "dtype": case.dtype,
        "mode": case.mode,
        "rounds": len(entries[0].times_s) if entries else 0,
        "better_eager": best.name if best else None,
        "contenders": rows,
        "skipped": skipped,
    }


def _add_share_of_limit(case: dict[str, Any], limits: dict[str, Any]) -> None:
    """share_of_limit = FLOP/s reached / FLOP/s of the best large matrix product in the case's dtype
    or in float32, since 16-bit values can also be multiplied in float32."""
    work = flops(case["model"], case["mode"])
    rates = limits["flops"]
    limit = max(rates[case["dtype"]], rates.get("float32", 0.0))
    for row in case["contenders"].values():
        row["share_of_limit"] = row["images_per_s"] * work / limit
