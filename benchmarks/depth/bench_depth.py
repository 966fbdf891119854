"""Benchmark of training steps of CIFAR ResNets: fused and eager, interleaved.

    python benchmarks/depth/bench_depth.py --out benchmarks/results [--case DEPTH,BATCH,SIZE ...]

Each contender runs in its own process, because the state of the allocator after one contender
affects the next (fused_resnet/bench/worker.py). A step is forward, cross entropy, backward and SGD
on random images. Bytes saved for backward are counted once per contender.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import fused_resnet as fr
from fused_resnet.bench import machine
from fused_resnet.bench.contenders import Step
from fused_resnet.bench.harness import write_json
from fused_resnet.bench.memory import saved_bytes

CONTENDERS = ("eager", "eager-channels_last", "fused", "fused-full", "fused-minimal")
# (depth, batch, image size): the setting of the paper, and scikit-learn's digits.
CASES = ((20, 128, 32), (110, 128, 32), (110, 64, 8), (1202, 64, 8))


def work(contender: str, depth: int, batch: int, size: int) -> None:
    """Print the milliseconds of one step for every line on standard input."""
    torch.manual_seed(0)
    plain = contender == "eager"
    layout = torch.contiguous_format if plain else torch.channels_last
    model = fr.cifar_resnet(depth).to(memory_format=layout).train()
    level = contender.removeprefix("fused").removeprefix("-")
    if level and contender.startswith("fused"):
        fr.set_activation_memory(model, level)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=layout)
    y = torch.randint(0, 10, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    stock = contender.startswith("eager")

    def forward() -> torch.Tensor:
        return cross_entropy(model(x), y)

    def step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        forward().backward()
        optimizer.step()
        return (time.perf_counter() - began) * 1e3

    with fr.use_backend("reference") if stock else contextlib.nullcontext():
        step()
        print(json.dumps({"saved_bytes": saved_bytes(Step(forward, model))}), flush=True)
        for _ in sys.stdin:
            step()  # untimed: refill caches and memory that other processes used meanwhile
            print(step(), flush=True)


def measure(case: tuple[int, int, int], rounds: int, threads: int) -> dict[str, Any]:
    numbers = [str(n) for n in case]
    workers = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--threads", str(threads), "--worker", name, *numbers],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name in CONTENDERS
    }  # fmt: skip
    contenders: dict[str, dict[str, Any]] = {}
    try:
        for name, worker in workers.items():
            contenders[name] = {**json.loads(_read_line(name, worker)), "times_ms": []}
        for i in range(rounds + 1):
            for name, worker in workers.items():
                assert worker.stdin is not None
                print("step", file=worker.stdin, flush=True)
                elapsed = float(_read_line(name, worker))
                if i:
                    contenders[name]["times_ms"].append(elapsed)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return {"depth": case[0], "batch": case[1], "size": case[2], "contenders": contenders}


def _read_line(name: str, worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"bench_depth: {name} ended with status {worker.wait()}")
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results file")
    parser.add_argument("--case", nargs="+", help="DEPTH,BATCH,SIZE", default=None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    cases = [tuple(map(int, c.split(","))) for c in args.case] if args.case else CASES
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = machine.provenance("depth_steps", "cpu")
    results["limits"] = machine.measure_limits(["float32"])
    results["steps"] = []
    for case in cases:
        row = measure(case, args.rounds, args.threads)  # type: ignore[arg-type]
        results["steps"].append(row)
        medians = {n: statistics.median(c["times_ms"]) for n, c in row["contenders"].items()}
        print(case, {name: f"{ms:.1f} ms" for name, ms in medians.items()}, flush=True)
    file = args.out / f"depth_steps-cpu-torch{torch.__version__.split('+')[0]}.json"
    print(write_json(results, str(file)))


if __name__ == "__main__":
    if "--worker" in sys.argv:
        at = sys.argv.index("--worker")
        torch.set_num_threads(int(sys.argv[sys.argv.index("--threads") + 1]))
        name, *case = sys.argv[at + 1 :]
        work(name, *map(int, case))
    else:
        main()
