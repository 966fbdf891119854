"""Test accuracy of ResNet-20 on scikit-learn's digits for several seeds, fused and stock.

    python benchmarks/models/accuracy.py --out benchmarks/results [--seeds 3]

Both are trained by the loop of `fused-resnet train` with the same settings, order of images and
augmentation; stock uses PyTorch's operations (`use_backend("reference")`). They differ only by
rounding, which training amplifies, so differences are compared with the spread between seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch

import fused_resnet as fr
from fused_resnet.bench import machine
from fused_resnet.bench.harness import write_json
from fused_resnet.train import Config, run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results file")
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    results: dict[str, Any] = machine.provenance("accuracy", "cpu")
    results["accuracy"] = {"model": args.model, "epochs": args.epochs, "stock": [], "fused": []}
    for seed in range(args.seeds):
        for kind in ("stock", "fused"):
            stock = kind == "stock"
            with (
                tempfile.TemporaryDirectory() as folder,
                fr.use_backend("reference") if stock else contextlib.nullcontext(),
            ):
                config = Config(model=args.model, epochs=args.epochs, seed=seed, lr=0.1, out=folder)
                accuracy = run(config).test_accuracy
            results["accuracy"][kind].append(accuracy)
            print(f"seed {seed}, {kind}: {accuracy:.2%}", flush=True)
    file = args.out / f"accuracy-cpu-torch{torch.__version__.split('+')[0]}.json"
    print(write_json(results, str(file)))


if __name__ == "__main__":
    main()
