"""Whole-model benchmark of the ResNets; writes results/resnet-<device>-torch<version>.json.

    python benchmarks/models/bench_resnet.py
    python benchmarks/models/bench_resnet.py --model resnet50 --mode train \
        --contender eager compile fused

`fused-resnet bench` measures the same and prints a table and a plot; the tables of README.md are
generated from the results of this script.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fused_resnet import bench
from fused_resnet.bench.contenders import CONTENDERS

# The models in RESULTS.md, without torch.compile, which takes 10 to 60 s per case.
MODELS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
BATCHES = (1, 8)
DTYPES = ("float32", "bfloat16")
FAMILY_CONTENDERS = ("eager", "eager-channels_last", "fused")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Whole-model benchmark of the ResNet family.")
    parser.add_argument("--model", nargs="+", default=list(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES))
    parser.add_argument("--mode", nargs="+", default=["infer"], choices=["infer", "train"])
    parser.add_argument(
        "--contender", nargs="+", default=list(FAMILY_CONTENDERS), choices=list(CONTENDERS)
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=6.0, help="for the rounds of one case")
    parser.add_argument("--rounds", type=int, default=7, help="minimum number")
    parser.add_argument("--memory", action="store_true", help="measure peak memory (CPU: slow)")
    parser.add_argument("--name", default="resnet", help="name of the benchmark in the file name")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    return parser.parse_args()


def main() -> None:
    args = parse()
    events = bench.run(
        args.model,
        args.batch,
        args.dtype,
        modes=args.mode,
        device=args.device,
        contenders=args.contender,
        threads=args.threads,
        seconds=args.seconds,
        rounds=args.rounds,
        with_memory=args.memory,
        name=args.name,
    )
    results = bench.collect(events, report)
    print(bench.save(results, args.out))


def report(event: bench.Event) -> None:
    """Print a line per finished case: time of each contender / time of the faster eager layout."""
    if event.case is None:
        return
    ratios = {
        name: row["ratio_to_eager"]
        for name, row in event.case["contenders"].items()
        if row["ratio_to_eager"] is not None
    }
    line = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    print(f"[{event.fraction:4.0%}] {event.text}: {line}", flush=True)


if __name__ == "__main__":
    main()
