"""The ops on a GPU at ResNet-50's shapes, each against what PyTorch runs and against the limits.

    python benchmarks/bench_gpu_ops.py --out DIR [--batch 256] [--dtype bfloat16] [--backend triton]

add_relu, bn_add_relu (forward, and with backward), conv_bn_relu and the convolution's gradients for
every distinct layer. The peer is cuDNN's convolution, eager batch norm, addition and ReLU,
channels_last. The limit is what
this machine reaches in the same run: a large copy for bytes, a large matrix product for operations;
`share of the limit` is max(operations / product rate, bytes / copy rate) over the time taken.
Contenders take turns; times are of CUDA events, caches flushed before each; medians.
On a device without CUDA (`--device cpu --size 32 --batch 1`) it shows only that the script works.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_resnet as fr
from fused_resnet.bench import pair_ratio, save
from fused_resnet.gemm import Layer, layers_of
from fused_resnet.machine import provenance

FLUSH_BYTES = 256 * 2**20  # more than any last-level cache


class Case(NamedTuple):
    name: str
    fused: Callable[[], Any]
    stock: Callable[[], Any]
    moved_bytes: int
    operations: int


class Clock:
    """Times calls on one device, with its caches flushed before each."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        size = FLUSH_BYTES if self.cuda else 1
        self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def seconds(self, call: Callable[[], Any]) -> float:
        self.flush.zero_()
        if not self.cuda:
            begin_s = time.perf_counter()
            call()
            return time.perf_counter() - begin_s
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def randn(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """channels_last, of `like`'s dtype and device."""
    x = torch.randn(shape, dtype=like.dtype, device=like.device)
    return x.contiguous(memory_format=torch.channels_last)


def add_relu_case(shape: tuple[int, ...], like: Tensor) -> Case:
    x, residual = randn(shape, like), randn(shape, like)
    return Case(
        f"add_relu {shape}",
        lambda: fr.add_relu(x, residual),
        lambda: torch.relu_(x + residual),
        3 * x.numel() * x.element_size(),
        0,
    )


def bn_case(shape: tuple[int, ...], like: Tensor, backward: bool) -> Case:
    x, residual, dy = (randn(shape, like) for _ in range(3))
    weight, bias = torch.rand(2, shape[1], device=like.device).unbind()
    inputs = [t.requires_grad_(backward) for t in (x, weight, bias, residual)]

    def stock_forward() -> Tensor:
        return torch.relu(F.batch_norm(x, None, None, weight, bias, training=True) + residual)

    def run(forward: Callable[[], Tensor]) -> None:
        y = forward()
        if backward:
            torch.autograd.grad(y, inputs, dy)

    # Forward: statistics, then x, residual and y; backward: dy, x, y, dresidual; then x, it and dx.
    tensors = 11 if backward else 4
    return Case(
        f"bn_add_relu {shape}" + (", and backward" if backward else ""),
        lambda: run(lambda: fr.bn_add_relu(x, weight, bias, residual)[0]),
        lambda: run(stock_forward),
        tensors * x.numel() * x.element_size(),
        0,
    )


def conv_case(layer: Layer, like: Tensor) -> Case:
    K, C, R, S = layer.weight_shape
    x = randn(layer.x_shape, like)
    weight = randn(layer.weight_shape, like) / math.sqrt(C * R * S)
    scale, shift, mean, var = torch.rand(4, K, device=like.device).add_(0.5).unbind()
    folded = scale / torch.sqrt(var + 1e-5)
    geometry = (*layer.geometry, layer.groups)

    def stock() -> Tensor:
        y = F.conv2d(x, weight, None, *geometry)
        return torch.relu_(F.batch_norm(y, mean, var, scale, shift))

    y_size = math.prod(layer.y_shape)
    moved = (x.numel() + weight.numel() + y_size) * x.element_size()
    return Case(
        f"conv_bn_relu {layer.x_shape} -> {K}, {R}x{S}/{layer.geometry.stride[0]}",
        lambda: fr.conv_bn_relu(x, weight, folded, shift - mean * folded, None, True, *geometry),
        stock,
        moved,
        2 * y_size * C * R * S,
    )


def conv_backward_case(layer: Layer, like: Tensor) -> Case:
    """Both gradients of the convolution: this package's Triton kernels, and the vendor's."""
    K, C, R, S = layer.weight_shape
    x, g = randn(layer.x_shape, like), randn(layer.y_shape, like)
    weight = randn(layer.weight_shape, like)
    geometry, mask = (*map(list, layer.geometry), layer.groups), [True, True, False]
    ops = torch.ops

    def stock() -> None:
        *sizes, groups = geometry
        ops.aten.convolution_backward(g, x, weight, None, *sizes, False, [0, 0], groups, mask)

    return Case(
        f"conv_backward {layer.x_shape} -> {K}, {R}x{S}/{layer.geometry.stride[0]}",
        lambda: ops.fused_resnet.convolution_backward_triton(g, x, weight, *geometry, mask),
        stock,
        2 * (x.numel() + weight.numel() + g.numel()) * x.element_size(),
        4 * g.numel() * C * R * S,
    )


def cases(model: str, batch: int, size: int, like: Tensor) -> Iterator[Case]:
    layers = list(dict.fromkeys(layers_of(model, batch, size)))
    shapes = list(dict.fromkeys(layer.y_shape for layer in layers if layer.weight_shape[2] == 1))
    ends = [shape for shape in shapes if shape[1] >= 4 * 64]
    for shape in ends:
        yield add_relu_case(shape, like)
    for shape in shapes:
        yield bn_case(shape, like, backward=False)
        yield bn_case(shape, like, backward=True)
    for layer in layers:
        yield conv_case(layer, like)
    for layer in layers:
        yield conv_backward_case(layer, like)


def limits(clock: Clock, like: Tensor) -> tuple[float, float]:
    """(operations/s of a large matrix product, bytes/s of a large copy): the best of several."""
    n = 8192 if clock.cuda else 256
    a, b = (torch.randn(n, n, dtype=like.dtype, device=like.device) for _ in range(2))
    big = torch.empty(2**28 if clock.cuda else 2**20, dtype=like.dtype, device=like.device)
    other = torch.empty_like(big)
    product = min(clock.seconds(lambda: a @ b) for _ in range(10))
    copy = min(clock.seconds(lambda: other.copy_(big)) for _ in range(10))
    return 2 * n**3 / product, 2 * big.numel() * big.element_size() / copy


def measure(case: Case, clock: Clock, rounds: int, flops: float, rate: float) -> dict[str, Any]:
    for call in (case.fused, case.stock):
        for _ in range(3 if clock.cuda else 1):
            call()
    times = [[clock.seconds(call) for call in (case.fused, case.stock)] for _ in range(rounds)]
    fused, stock = ([row[i] for row in times] for i in range(2))
    median = statistics.median(fused)
    ratio, spread = pair_ratio(fused, stock)
    lower, _, upper = statistics.quantiles(fused, n=4)
    limit_s = max(case.operations / flops, case.moved_bytes / rate)
    figures = {
        "GB/s": case.moved_bytes / median / 1e9,
        "TFLOP/s": case.operations / median / 1e12,
        "share of the limit": limit_s / median,
        "stock ms": statistics.median(stock) * 1e3,
        "fused/stock": ratio,
        "± of it": spread / 2,
    }
    return {
        "name": case.name,
        "stats": {"median": median, "iqr": upper - lower, "rounds": rounds},
        "extra_info": figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of the ops on a GPU.")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path, help="write a results file into this folder")
    args = parser.parse_args()
    device = torch.device(args.device)
    like = torch.empty(0, dtype=getattr(torch, args.dtype), device=device)
    clock, results = Clock(device), []
    flops, rate = limits(clock, like)
    print(f"matrix product {flops / 1e12:.1f} TFLOP/s, copy {rate / 1e9:.0f} GB/s", flush=True)
    with fr.use_backend(args.backend):
        for case in cases(args.model, args.batch, args.size, like):
            if args.only not in case.name:
                continue
            entry = measure(case, clock, args.rounds, flops, rate)
            results.append(entry)
            figures = " ".join(f"{k} {v:.3g}" for k, v in entry["extra_info"].items())
            print(
                f"{entry['name']}: {entry['stats']['median'] * 1e3:.4f} ms, {figures}", flush=True
            )
    for op in ("add_relu", "bn_add_relu", "conv_bn_relu", "conv_backward"):
        shares = [
            r["extra_info"]["share of the limit"] for r in results if r["name"].startswith(op)
        ]
        if shares:
            mean = math.exp(statistics.fmean(map(math.log, shares)))
            print(f"{op}: share of the limit {mean:.2f} (geometric mean), least {min(shares):.2f}")
    if args.out:
        head = provenance(f"gpu_ops_{args.backend}", args.device)
        head["limits"] = {"flops": flops, "copy_bytes_per_s": rate}
        machine = head["machine"].get("gpu") or head["machine"]["cpu"]
        head["machine_info"] = {"cpu": {"brand_raw": machine}}
        print(save({**head, "benchmarks": results}, args.out))


if __name__ == "__main__":
    main()
