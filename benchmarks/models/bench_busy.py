"""Inference beside other work: time per image on a quiet machine, beside a process that spins, by
two processes at once, and with both threads on one core.

    python benchmarks/models/bench_busy.py --out benchmarks/results [--model resnet18 resnet50]

Every contender of `fused-resnet bench` runs in processes of its own, with two threads, on images of
224 x 224. Processes take turns; those whose turn it is not sleep. A turn is a pause, one call that
is not timed and then calls for about 0.4 s; its time per image is their mean, since what waits for
others has a long tail. Ratios are medians over the turns' pairs.

    quiet    nothing else runs
    spin     one other process spins, on whichever core the system gives it
    twins    two processes of the same contender call at once; time per image of both together
    pinned   the process may use one core, as in a container; PyTorch is still set to two threads
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fused_resnet.bench import contenders, machine
from fused_resnet.bench.harness import pair_ratio, write_json

CONDITIONS = ("quiet", "spin", "twins", "pinned")
THREADS = 2
TURN_S = 0.4


def work(name: str, case: contenders.Case) -> None:
    """Answers each line of standard input, a number of calls, with their seconds; 0 is the first:
    builds the contender and answers the seconds of a call."""
    torch.set_num_threads(THREADS)
    try:
        step = contenders.build(name, case, contenders.make_data(case))
        for _ in range(3):
            step()
    except contenders.Unavailable as error:
        print(json.dumps(str(error)), flush=True)
        return
    print(json.dumps(0), flush=True)
    for line in sys.stdin:
        step()
        begin = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(json.dumps(time.perf_counter() - begin), flush=True)


class Worker:
    """A process in which a contender is ready."""

    def __init__(self, name: str, case: contenders.Case, cpus: set[int] | None = None) -> None:
        values = [name, case.model, str(case.batch), case.dtype]
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *values], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            preexec_fn=None if cpus is None else lambda: os.sched_setaffinity(0, cpus),
        )  # fmt: skip

    def ask(self, calls: int) -> None:
        assert self.process.stdin is not None
        print(calls, file=self.process.stdin, flush=True)

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else "the process ended"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def spinning() -> Iterator[None]:
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def measure(names: list[str], case: contenders.Case, condition: str, turns: int) -> dict[str, Any]:
    copies = 2 if condition == "twins" else 1
    cpus = {min(os.sched_getaffinity(0))} if condition == "pinned" else None
    workers: dict[str, list[Worker]] = {}
    missing: dict[str, str] = {}
    for name in names:
        workers[name] = [Worker(name, case, cpus) for _ in range(copies)]
    for name in names:
        problems = [worker.answer() for worker in workers[name]]
        if any(problems):
            missing[name] = str(next(filter(None, problems)))
            for worker in workers.pop(name):
                worker.close()
    times: dict[str, list[float]] = {name: [] for name in workers}
    calls = dict.fromkeys(workers, 1)
    try:
        with spinning() if condition == "spin" else contextlib.nullcontext():
            for turn in range(turns + 1):  # the first finds the number of calls
                for name, group in workers.items():
                    time.sleep(0.05)
                    for worker in group:
                        worker.ask(calls[name])
                    seconds = statistics.fmean(worker.answer() for worker in group)
                    if turn:
                        images = calls[name] * case.batch * len(group)
                        times[name].append(1e3 * seconds / images)
                    else:
                        calls[name] = max(1, round(TURN_S / seconds))
    finally:
        for worker in (w for group in workers.values() for w in group):
            worker.close()
    return {"model": case.model, "batch": case.batch, "dtype": case.dtype, "condition": condition,
            "ms_per_image": times, "missing": missing}  # fmt: skip


def shown(result: dict[str, Any]) -> str:
    times = result["ms_per_image"]
    parts = [f"{result['model']} b{result['batch']} {result['dtype']} {result['condition']:7s}"]
    for name, values in times.items():
        text = f"{name} {statistics.median(values):.2f} ms"
        if name != "fused" and "fused" in times:
            ratio, spread = pair_ratio(times["fused"], values)
            text += f" ({ratio:.2f} ± {spread:.2f})"
        parts.append(text)
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results file")
    parser.add_argument("--model", nargs="*", default=["resnet18", "resnet50"])
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--condition", nargs="*", default=list(CONDITIONS), choices=CONDITIONS)
    parser.add_argument("--contender", nargs="*", default=[
        "fused", "eager-channels_last", "eager", "compile", "onnxruntime", "openvino"])  # fmt: skip
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, model, batch, dtype = args.worker
        work(name, contenders.Case(model, int(batch), dtype))
        return
    results = {"schema": 1, **machine.provenance("busy", "cpu"), "threads": THREADS, "busy": []}
    for model in args.model:
        for dtype in args.dtype:
            for batch in args.batch:
                for condition in args.condition:
                    case = contenders.Case(model, batch, dtype)
                    found = measure(args.contender, case, condition, args.turns)
                    results["busy"].append(found)
                    print(shown(found), flush=True)
                    if args.out:
                        file = f"busy-cpu-torch{torch.__version__.split('+')[0]}.json"
                        write_json(results, args.out / file)


if __name__ == "__main__":
    main()
