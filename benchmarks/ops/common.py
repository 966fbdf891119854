"""Shared by the op benchmarks: interleaved timing of the contenders, and figures from the times.

A case has three calls: the fused op, the eager chain it replaces, and a copy of a tensor of the
same size, whose rate (one read and one write of every byte) is taken as the memory bandwidth. Every
round runs each call once, so that disturbances affect all of them; ratios are computed per round,
and figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fused_resnet.bench.harness import pair_ratio, save
from fused_resnet.bench.machine import provenance

WARM_UP = 3


@dataclass
class Case:
    name: str
    fused: Callable[[], Any]
    eager: Callable[[], Any]
    copy: Callable[[], Any]
    moved_bytes: int  # read and written by the fused kernels, as documented
    copied_bytes: int  # read and written by `copy`
    operations: int | None = None  # floating-point, 2 per multiply-add, if compute is the limit


def copy_of(x: torch.Tensor) -> tuple[Callable[[], Any], int]:
    """A copy of x into an existing tensor, and the bytes it reads and writes."""
    target = torch.empty_like(x).copy_(x)
    return lambda: target.copy_(x), 2 * x.numel() * x.element_size()


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def figures(case: Case, fused: list[float], eager: list[float], copy: list[float]) -> dict:
    """Rates in GB/s (1e9 bytes), the rate relative to the copy, and the ratio to eager."""
    rate = case.moved_bytes / statistics.median(fused)
    share, _ = pair_ratio(
        [case.moved_bytes / t for t in fused], [case.copied_bytes / t for t in copy]
    )
    ratio, spread = pair_ratio(fused, eager)
    operations = {}
    if case.operations is not None:
        operations = {"GFLOP/s": case.operations / statistics.median(fused) / 1e9}
    return {
        **operations,
        "GB/s": rate / 1e9,
        "copy GB/s": case.copied_bytes / statistics.median(copy) / 1e9,
        "share of copy": share,
        "eager ms": statistics.median(eager) * 1e3,
        "fused/eager": ratio,
        "± of it": spread / 2,
    }


def under_pytest(benchmark: Any, case: Case, rounds: int = 15) -> None:
    """Time `case.fused` with pytest-benchmark; eager and copy run between the rounds."""
    eager: list[float] = []
    copy: list[float] = []

    def run_others() -> None:
        eager.append(seconds(case.eager))
        copy.append(seconds(case.copy))

    benchmark.pedantic(case.fused, setup=run_others, rounds=rounds, warmup_rounds=WARM_UP)
    fused = list(benchmark.stats.stats.data)
    benchmark.extra_info |= figures(case, fused, eager[-len(fused) :], copy[-len(fused) :])


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Time the case without pytest; returns an entry of a pytest-benchmark file."""
    calls = (case.fused, case.eager, case.copy)
    for _ in range(WARM_UP):
        for call in calls:
            call()
    times = [[seconds(call) for call in calls] for _ in range(rounds)]
    fused, eager, copy = ([row[i] for row in times] for i in range(3))
    lower, _, upper = statistics.quantiles(fused, n=4)
    return {
        "name": case.name,
        "stats": {"median": statistics.median(fused), "iqr": upper - lower, "rounds": rounds},
        "extra_info": figures(case, fused, eager, copy),
    }


def main(bench: str, cases: Callable[[], Iterator[Case]]) -> None:
    """Command line: print a table; with --out also write a file that plot.py reads."""
    parser = argparse.ArgumentParser(description=f"Benchmark of {bench}.")
    parser.add_argument("--out", type=Path, help="write <bench>-<device>-torch<version>.json here")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    results = []
    for case in cases():
        entry = measure(case, args.rounds)
        results.append(entry)
        extra = entry["extra_info"]
        if len(results) == 1:
            print(f"{'case':44s} {'ms':>9s} " + " ".join(f"{key:>13s}" for key in extra))
        values = " ".join(f"{value:13.3f}" for value in extra.values())
        print(f"{entry['name']:44s} {entry['stats']['median'] * 1e3:9.3f} {values}", flush=True)
    if args.out:
        head = provenance(bench, "cpu")
        head["machine_info"] = {"cpu": {"brand_raw": head["machine"]["cpu"]}}
        print(save({**head, "benchmarks": results}, args.out))
