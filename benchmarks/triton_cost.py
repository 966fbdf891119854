"""What the Triton convolution should take on a GPU that is not at hand: a model, not a measurement.

    python benchmarks/triton_cost.py [--batch 1 32 256] [--out DIR]

For each distinct convolution of ResNet-50 in bfloat16: the configuration that would be chosen, its
tiles and their waves over the multiprocessors, the bytes and operations it cannot do without, and
the share of max(compute, memory) time that the waves leave: whole waves at the matrix product's
rate, or the bytes at the copy's, whichever takes longer. A measurement far below it has another
reason than the tiles.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fused_resnet.resnet import resnet50
from fused_resnet.triton_kernels import configs

# One H200, measured: dense bfloat16 products and copies; multiprocessors.
FLOPS, BYTES_PER_S, PROCESSORS, CAPABILITY = 790e12, 4.3e12, 132, (9, 0)
SIZE = 2  # bytes of bfloat16


def layers() -> Counter[tuple[Any, ...]]:
    """(C, H, K, R, stride, groups) of ResNet-50's convolutions, and how often each occurs."""
    found: Counter[tuple[Any, ...]] = Counter()

    def see(conv: torch.nn.Conv2d, inputs: Any, output: Any) -> None:
        H = inputs[0].shape[2]
        found[conv.in_channels, H, conv.out_channels, conv.kernel_size[0], conv.stride[0], 1] += 1

    with torch.device("meta"), torch.no_grad():
        model = resnet50().eval()
        for m in model.modules():
            if isinstance(m, torch.nn.Conv2d):
                m.register_forward_hook(see)
        model(torch.empty(1, 3, 224, 224))
    return found


def estimate(layer: tuple[Any, ...], batch: int) -> dict[str, Any]:
    C, H, K, R, stride, groups = layer
    P = (H + 2 * (R // 2) - R) // stride + 1
    M = batch * P * P
    runs = C < 16  # as convolution.in_runs sees the stem
    channels, S = (R * 4, 1) if runs else (C, R)
    problem = configs.Problem(M, K, channels, R, S, groups, stride, "bfloat16")
    config = configs.choose(problem, CAPABILITY, PROCESSORS)
    tiles = configs.tiles(config, problem) * config.splits
    waves = math.ceil(tiles / PROCESSORS)
    operations = 2 * M * K * C * R * R
    moved = SIZE * (batch * C * H * H + K * C * R * R + M * K)
    steps = math.ceil(configs.steps(config, problem) / config.splits)
    in_tiles = 2 * config.block_m * config.block_n * config.block_k * steps * waves * PROCESSORS
    floor_s = max(operations / FLOPS, moved / BYTES_PER_S)
    expected_s = max(in_tiles / FLOPS, moved / BYTES_PER_S)
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return {
        "layer": f"{C}x{H}x{H} -> {K}, {R}x{R}/{stride}",
        "batch": batch,
        "config": tile + (f", {config.splits} splits" if config.splits > 1 else ""),
        "tiles": tiles,
        "waves": round(tiles / PROCESSORS, 2),
        "MB": moved / 1e6,
        "GFLOP": operations / 1e9,
        "floor_us": floor_s * 1e6,
        "limit": "compute" if operations / FLOPS >= moved / BYTES_PER_S else "memory",
        "share": floor_s / expected_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted cost of the Triton convolution.")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--out", type=Path, help="write triton_cost.json into this folder")
    args = parser.parse_args()
    rows = []
    for batch in args.batch:
        for layer, count in layers().items():
            rows.append({**estimate(layer, batch), "times": count})
    keys = list(rows[0])
    print(" | ".join(keys))
    for row in rows:
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
        print(" | ".join(cells))
    for batch in args.batch:
        mine = [row for row in rows if row["batch"] == batch]
        mean = math.exp(sum(math.log(row["share"]) for row in mine) / len(mine))
        floor = sum(row["floor_us"] * row["times"] for row in mine)
        print(f"batch {batch}: share {mean:.2f} (geometric mean), floor {floor:.0f} us in all")
    if args.out:
        head = {"flops": FLOPS, "bytes_per_s": BYTES_PER_S, "multiprocessors": PROCESSORS}
        text = json.dumps({**head, "layers": rows}, indent=1)
        (args.out / "triton_cost.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
