"""Predicted cost of the Triton convolution on an H200, without a GPU: a model, no measurement.

    python benchmarks/kernels/triton/triton_cost.py [--batch 1 32 256] [--out DIR]

For each distinct convolution of ResNet-50 in bfloat16: the chosen configuration, its tiles and
waves over the multiprocessors, the minimum bytes and operations, and the predicted share of the
max(compute, memory) time. The predicted time is that of whole waves at the rate of the matrix
product, or of the bytes at the rate of the copy, whichever is longer. Launches, pipeline prologues,
residuals and the last-level cache are not modeled. A measurement far below the prediction has a
cause other than the tiles.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fused_resnet.bench.harness import save
from fused_resnet.bench.layers import layers_of
from fused_resnet.bench.machine import provenance
from fused_resnet.kernels.problem import Problem
from fused_resnet.kernels.target import Target
from fused_resnet.kernels.triton import configs, convolution

# One H200, measured: dense bfloat16 products and copies; multiprocessors.
GPU = {"flops": 790e12, "bytes_per_s": 4.3e12, "multiprocessors": 132}
TARGET = Target("nvidia", "sm_90")
SIZE = 2  # bytes of bfloat16


def floor_s(layer: Problem, flops: float, bytes_per_s: float) -> tuple[float, str, int, int]:
    """Lower bound of the time of a layer, what limits it, its operations and bytes."""
    K, C, R, S = layer.weight_shape
    N, _, P, Q = layer.y_shape
    operations = 2 * N * P * Q * K * C * R * S
    moved = SIZE * sum(map(math.prod, (layer.x_shape, layer.weight_shape, layer.y_shape)))
    by_compute, by_memory = operations / flops, moved / bytes_per_s
    limit = "compute" if by_compute >= by_memory else "memory"
    return max(by_compute, by_memory), limit, operations, moved


def title(layer: Problem) -> str:
    K, _, R, S = layer.weight_shape
    _, C, H, W = layer.x_shape
    g = layer.geometry
    groups = f", {g.groups} groups" if g.groups > 1 else ""
    return f"{C}x{H}x{W} -> {K}, {R}x{S}/{g.stride[0]}{groups}"


def estimate(layer: Problem) -> dict[str, Any]:
    gemm = convolution.kernel_gemm(layer.gemm())
    processors = GPU["multiprocessors"]
    config = configs.choose(gemm, TARGET, processors)
    tiles = configs.tiles(config, gemm) * config.splits
    waves = tiles / processors
    floor, limit, operations, moved = floor_s(layer, GPU["flops"], GPU["bytes_per_s"])
    steps = math.ceil(configs.steps(config, gemm) / config.splits)
    in_tile = 2 * config.block_m * config.block_n * config.block_k * steps
    in_tiles = in_tile * math.ceil(waves) * processors
    expected = max(in_tiles / GPU["flops"], moved / GPU["bytes_per_s"])
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return {
        "layer": title(layer),
        "batch": layer.x_shape[0],
        "configuration": tile + (f", {config.splits} splits" if config.splits > 1 else ""),
        "tiles": tiles,
        "waves": waves,
        "MB": moved / 1e6,
        "GFLOP": operations / 1e9,
        "floor us": floor * 1e6,
        "limit": limit,
        "share of the floor": floor / expected,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted cost of the Triton convolution.")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--out", type=Path, help="write a results file into this folder")
    args = parser.parse_args()
    rows = []
    for batch in args.batch:
        for layer, times in Counter(layers_of("resnet50", batch, torch.bfloat16)).items():
            rows.append({**estimate(layer), "times": times})
    print(" | ".join(rows[0]))
    for row in rows:
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
        print(" | ".join(cells))
    for batch in args.batch:
        of_batch = [row for row in rows if row["batch"] == batch]
        mean = math.exp(
            sum(math.log(row["share of the floor"]) for row in of_batch) / len(of_batch)
        )
        floor = sum(row["floor us"] * row["times"] for row in of_batch)
        print(f"batch {batch}: share {mean:.2f} (geometric mean), total floor {floor:.0f} us")
    if args.out:
        head = provenance("triton_cost", "cpu")
        print(save({**head, "gpu": GPU, "layers": rows}, args.out))


if __name__ == "__main__":
    main()
