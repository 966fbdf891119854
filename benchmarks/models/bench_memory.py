"""Resident memory of inference, each contender in fresh processes of its own.

    python benchmarks/models/bench_memory.py --out benchmarks/results [--model resnet50]

A process loads the libraries and runs a small model of PyTorch's, builds the model, loads a
state_dict from a file, drops it, and runs three forwards of batch x 3 x 224 x 224. Measured, above
what was resident before the model was built: the peak while it is built and loaded, the peak during
the forwards (packing included), and what stays resident afterwards. Before the forwards and
afterwards free memory is returned to the system. `fused-released` calls
`fr.inference(model, x, release_weights=True)`; `fused` calls the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import fused_resnet as fr
from fused_resnet.bench import machine
from fused_resnet.bench.harness import write_json
from fused_resnet.bench.memory import CALLS, release_free_memory, status_bytes
from fused_resnet.parity.runs import stock_model, stock_path

CONTENDERS = ("eager", "eager-channels_last", "fused", "fused-released")
IMAGE = 224


def measure(contender: str, model_name: str, batch: int, dtype: str, file: str) -> dict[str, int]:
    """Bytes of this process, which must have run nothing else."""
    with stock_path(), torch.no_grad():
        stock_model("resnet18").eval()(torch.randn(1, 3, 64, 64))
    release_free_memory()
    base = status_bytes("VmRSS")
    x = torch.randn(batch, 3, IMAGE, IMAGE, dtype=getattr(torch, dtype))
    eager = contender.startswith("eager")
    model: Any = stock_model(model_name) if eager else fr.get_model(model_name)
    model = model.to(getattr(torch, dtype)).eval()
    state = torch.load(file)
    model.load_state_dict(state)
    del state
    if contender == "eager-channels_last":
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    loading = status_bytes("VmHWM") - base
    release_free_memory()
    with torch.no_grad():
        call: Any = stock_path()(model) if eager else model
        if contender == "fused-released":
            call = fr.inference(model, x, release_weights=True)
            if call.kept:
                raise RuntimeError(f"bench_memory: weights are kept: {call.kept}")
        for _ in range(CALLS):
            call(x)
    peak = status_bytes("VmHWM") - base
    release_free_memory()
    return {
        "loading_bytes": loading, "peak_bytes": peak, "resting_bytes": status_bytes("VmRSS") - base,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results file")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        contender, model, batch, dtype, file = args.measure
        print(json.dumps(measure(contender, model, int(batch), dtype, file)))
        return
    results: dict[str, Any] = machine.provenance("memory", "cpu")
    results["memory"] = {"model": args.model, "image": IMAGE, "calls": CALLS, "cases": []}
    for dtype in args.dtype:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "weights.pt"
            net = stock_model(args.model).to(getattr(torch, dtype))
            torch.save(net.state_dict(), file)
            weights = sum(t.nbytes for t in net.parameters())
            del net
            for batch in args.batch:
                found: dict[str, dict[str, list[int]]] = {name: {} for name in CONTENDERS}
                for _ in range(args.repeats):
                    for name in CONTENDERS:
                        case = (name, args.model, str(batch), dtype, str(file))
                        command = [sys.executable, __file__, "--out", ".", "--measure", *case]
                        out = subprocess.run(command, capture_output=True, text=True, check=True)
                        for key, value in json.loads(out.stdout.splitlines()[-1]).items():
                            found[name].setdefault(key, []).append(value)
                peaks = {n: statistics.median(f["peak_bytes"]) / 2**20 for n, f in found.items()}
                print(
                    dtype, f"batch {batch}", {n: round(p, 1) for n, p in peaks.items()}, flush=True
                )
                case = {"dtype": dtype, "batch": batch, "weights_bytes": weights}
                results["memory"]["cases"].append({**case, "contenders": found})
    file = args.out / f"memory-cpu-torch{torch.__version__.split('+')[0]}.json"
    print(write_json(results, str(file)))


if __name__ == "__main__":
    main()
