"""Benchmark of another checkout of this project against this one: whole models, interleaved.

    python benchmarks/models/compare_checkouts.py DIR [--model resnet18 resnet50] [--batch 1 8]
        [--dtype float32 bfloat16] [--mode infer train] [--rounds 15] [--size 32] [--out FOLDER]

DIR: the other checkout, with its extension built in place. Each side is the contender "fused" of
its `fused-resnet bench`, in a separate process with the same number of threads; with --size, small
images and CIFAR's networks, as small_worker.py runs them in both checkouts. Every round times
both in alternating order. Prints the ratio of the times, this over other, per round with half its
interquartile range, and the medians; --out writes checkouts-cpu-torch<version>.json, with --size
small_checkouts-cpu-torch<version>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fused_resnet.bench import pair_ratio, save
from fused_resnet.bench.machine import provenance

HERE = Path(__file__).resolve().parents[2]


class Side:
    """The worker process of one checkout for one case."""

    def __init__(self, checkout: Path, case: dict[str, Any], threads: int) -> None:
        package = checkout / "fused_resnet"
        module = "bench.worker" if (package / "bench" / "worker.py").exists() else "bench_worker"
        worker = ["-m", f"fused_resnet.{module}"]
        if "size" in case:
            worker = [str(HERE / "benchmarks" / "models" / "small_worker.py")]
        request = json.dumps({"name": "fused", "case": case, "threads": threads})
        self._process = subprocess.Popen(
            [sys.executable, *worker, request],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            cwd=checkout,
        )
        self.times_s: list[float] = []
        self.entry = self.ask("enter")

    def ask(self, question: str) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        print(question, file=stdin, flush=True)
        return json.loads(stdout.readline())

    def sample(self) -> None:
        self.times_s.append(self.ask("sample"))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def compare(other: Path, case: dict[str, Any], rounds: int) -> dict[str, Any]:
    threads = torch.get_num_threads()
    sides = [Side(HERE, case, threads), Side(other, case, threads)]
    try:
        for i in range(rounds):
            for side in sides if i % 2 else sides[::-1]:
                side.sample()
    finally:
        for side in sides:
            side.close()
    ratio, spread = pair_ratio(sides[0].times_s, sides[1].times_s)
    outputs = [torch.tensor(side.entry["output"]) for side in sides]
    return {
        **case,
        "ratio": ratio,
        "half_iqr": spread / 2,
        "this_ms": statistics.median(sides[0].times_s) * 1e3,
        "other_ms": statistics.median(sides[1].times_s) * 1e3,
        "rounds": rounds,
        "equal_outputs": torch.equal(*outputs),
    }


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Another checkout against this one.")
    parser.add_argument("other", type=Path)
    parser.add_argument("--model", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--mode", nargs="+", default=["infer", "train"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, help="pixels, instead of 224")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = []
    for mode in args.mode:
        for model in args.model:
            for batch in args.batch if mode == "infer" else args.batch[-1:]:
                for dtype in args.dtype:
                    case = {"model": model, "batch": batch, "dtype": dtype, "mode": mode}
                    if args.size:
                        case["size"] = args.size
                    row = compare(args.other.resolve(), {**case, "device": "cpu"}, args.rounds)
                    results.append(row)
                    print(
                        f"{mode:6s} {model:9s} batch {batch} {dtype:9s} {row['ratio']:.3f} "
                        f"± {row['half_iqr']:.3f}   {row['this_ms']:8.2f} and "
                        f"{row['other_ms']:8.2f} ms"
                        + ("" if row["equal_outputs"] else "   other outputs"),
                        flush=True,
                    )
    if args.out:
        head = provenance("small_checkouts" if args.size else "checkouts", "cpu")
        print(save({**head, "other commit": commit_of(args.other), "cases": results}, args.out))


if __name__ == "__main__":
    main()
