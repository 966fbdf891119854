"""Runs every CUDA kernel once or twice at small sizes, under compute-sanitizer.

    compute-sanitizer --tool memcheck python -m tests.kernels.cuda.sanitizer_list --device cuda

With --device cpu it runs in the emulator. Results are only checked to be finite.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.cuda import gemm_cases, machines
from tests.ops.op_cases import LAYOUTS, randn

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
Calls = Iterator[tuple[str, Callable[[], list[Tensor]]]]


def elementwise() -> Calls:
    for dtype, layout in itertools.product(
        (*FLOATS, torch.float64), ("contiguous", "channels_last", "odd offset, channels_last")
    ):
        x, residual, out = (
            machines.to_device(LAYOUTS[layout](randn((2, 33, 9, 7), dtype))) for _ in range(3)
        )

        def run(x: Tensor = x, residual: Tensor = residual, out: Tensor = out) -> list[Tensor]:
            ops = machines.ops()
            y = ops.add_relu(x, residual)
            ops.add_relu_out(x, residual, out)
            return [y, out, ops.add_relu_backward(residual, y)]

        yield f"add_relu {dtype} {layout}", run


def batch_norm() -> Calls:
    shapes = ((4, 64, 7, 7), (2, 16, 40, 40), (3, 5, 41, 39))
    layouts = ("contiguous", "channels_last", "odd offset, channels_last")
    for shape, layout, dtype in itertools.product(shapes, layouts, (*FLOATS, torch.float64)):
        x, residual, dy = (
            machines.to_device(LAYOUTS[layout](randn(shape, dtype))) for _ in range(3)
        )
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight, bias = (machines.to_device(t) for t in torch.rand(2, shape[1], dtype=wide).unbind())

        def run(
            x: Tensor = x,
            residual: Tensor = residual,
            dy: Tensor = dy,
            weight: Tensor = weight,
            bias: Tensor = bias,
        ) -> list[Tensor]:
            ops, results = machines.ops(), []
            for added, relu in ((residual, True), (None, False)):
                y, mean, var = ops.bn_add_relu(x, weight, bias, added, 1e-5, relu)
                saved = (y if relu else None, weight, mean, var, 1e-5, relu, True, relu)
                results += [y, *ops.bn_add_relu_backward(dy, x, *saved)]
            return results

        yield f"bn_add_relu {dtype} {shape} {layout}", run


def convolutions() -> Calls:
    # Groups, windows and partial tiles; then one tile.
    shapes = (
        ((1, 48, 9, 15), 144, (1, 3), 1, (0, 1), 1, 2),
        ((2, 72, 9, 8), 80, (3, 3), 2, 1, 1, 1),
    )
    tiles = [*gemm_cases.tiles(80), *gemm_cases.tiles(90)]
    tiles = [tile for tile in tiles if machines.skip_reason(tile.architecture) is None]
    for tile, dtype, (shape, K, kernel, *geometry) in itertools.product(tiles, FLOATS, shapes):
        if tile.architecture == 90 and dtype == torch.float32:
            continue
        x, weight = randn(shape, dtype), randn((K, shape[1] // geometry[-1], *kernel), dtype)
        scale, shift = torch.rand(2, K).unbind()
        out = F.conv2d(x.float(), weight.float(), None, *geometry).shape
        for residual, splits in ((randn(out, dtype), 1), (None, 2)):

            def run(
                operands: tuple = (x, weight, scale, shift, residual),
                geometry: tuple = tuple(geometry),
                tile: gemm_cases.Tile = tile,
                splits: int = splits if tile.architecture == 80 else 1,
            ) -> list[Tensor]:
                return [gemm_cases.run(*operands, True, *geometry, tile=tile, splits=splits)]

            yield f"implicit_gemm sm_{tile.architecture} {tile}, {dtype}, {splits} splits", run


def statistics() -> Calls:
    """From a convolution with fused statistics to the normalised output; each tile, and splits."""
    tiles = [*gemm_cases.tiles(80), *gemm_cases.tiles(90)]
    tiles = [tile for tile in tiles if machines.skip_reason(tile.architecture) is None]
    for tile, dtype in itertools.product(tiles, FLOATS):
        if tile.architecture == 90 and dtype == torch.float32:
            continue
        # Hopper's kernel reads whole steps of the channels of a group.
        C = 24 if tile.architecture == 80 else 64
        x, weight = randn((2, 2 * C, 9, 15), dtype), randn((144, C, 1, 3), dtype)
        weight = machines.to_device(weight.permute(0, 2, 3, 1).contiguous())
        x = machines.to_device(x.contiguous(memory_format=torch.channels_last))
        z = torch.empty_like(x.new_empty(2, 144, 9, 15), memory_format=torch.channels_last)
        geometry = ([1, 1], [0, 1], [1, 1], 2)
        for splits in (1, 2) if tile.architecture == 80 else (1,):

            def run(
                operands: tuple = (x, weight, z, *geometry, tile.number, splits), z: Tensor = z
            ) -> list[Tensor]:
                ops = machines.ops()
                parts, pixels = ops.convolution_statistics(*operands)
                merged = ops.bn_merge_statistics(parts, 2 * 9 * 15, pixels)
                return [*merged, ops.bn_normalise(z, *merged, None, None, None, 1e-5, True)]

            name = f"convolution_statistics sm_{tile.architecture} {tile}"
            yield f"{name}, {dtype}, {splits} splits", run


def prologues() -> Calls:
    """A norm and a ReLU in the next convolution's prologue; the last step has fewer channels."""
    tiles = [*gemm_cases.tiles(80), *gemm_cases.tiles(90)]
    tiles = [tile for tile in tiles if machines.skip_reason(tile.architecture) is None]
    for tile, dtype in itertools.product(tiles, FLOATS[:2]):
        if min(tile.block_m, tile.block_n) < 64:
            continue
        x, weight = randn((2, 72, 9, 15), dtype), machines.to_device(randn((144, 1, 1, 72), dtype))
        x = machines.to_device(x.contiguous(memory_format=torch.channels_last))
        z = torch.empty_like(x.new_empty(2, 144, 9, 15), memory_format=torch.channels_last)
        vectors = [machines.to_device(t) for t in torch.rand(5, 72).unbind()]

        def run(
            operands: tuple = (x, *vectors, 1e-5, weight, z, tile.number), z: Tensor = z
        ) -> list[Tensor]:
            return [machines.ops().normalised_convolution_statistics(*operands)[0], z]

        yield f"normalised_convolution_statistics sm_{tile.architecture} {tile}, {dtype}", run


def gradients() -> Calls:
    """From a convolution's input gradient with fused sums to the norm's gradient; tiles, splits."""
    tiles = [*gemm_cases.tiles(80), *gemm_cases.tiles(90)]
    tiles = [tile for tile in tiles if machines.skip_reason(tile.architecture) is None]
    for tile, dtype in itertools.product(tiles, FLOATS[:2]):
        K = 24 if tile.architecture == 80 else 64
        dy, g, x = (
            machines.to_device(
                randn((2, C, 9, 15), dtype).contiguous(memory_format=torch.channels_last)
            )
            for C in (2 * K, 144, 144)
        )
        weight = machines.to_device(randn((144, 1, 3, K), dtype))
        norm = [machines.to_device(t) for t in torch.rand(5, 144).unbind()]
        for splits in (1, 2) if tile.architecture == 80 else (1,):

            def run(
                operands: tuple = (dy, weight, g, x, *norm, 1e-5),
                where: tuple = ([0, 1], [1, 1], 2, tile.number, splits),
            ) -> list[Tensor]:
                sums = machines.ops().convolution_gradient_sums(*operands, *where)
                _, _, g, x, mean, var, _, scale, _, eps = operands
                by_sums = machines.ops().bn_gradient_by_sums
                return [g, sums, *by_sums(g, x, sums, scale, mean, var, eps)]

            name = f"convolution_gradient_sums sm_{tile.architecture} {tile}"
            yield f"{name}, {dtype}, {splits} splits", run


def stem() -> Calls:
    for dtype, pool, wide in itertools.product(FLOATS[:2], (True, False), (True, False)):
        x = machines.to_device(randn((2, 3, 45, 71), torch.float32 if wide else dtype))
        weight = F.pad(randn((64, 3, 7, 7), dtype), (0, 1, 0, 0, 0, 1))
        weight = machines.to_device(weight.permute(0, 2, 3, 1).contiguous())
        scale, shift = (machines.to_device(t) for t in torch.rand(2, 64).unbind())

        def run(operands: tuple = (x, weight, scale, shift), pool: bool = pool) -> list[Tensor]:
            return [machines.ops().stem(*operands, pool)]

        yield f"stem {dtype}, pool {pool}, x of {x.dtype}", run


def main() -> int:
    parser = argparse.ArgumentParser(description="Every CUDA kernel, for compute-sanitizer.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", default="", help="only calls whose name contains this")
    args = parser.parse_args()
    torch.manual_seed(0)
    count = 0
    with machines.running_on(args.device):
        parts = (elementwise, batch_norm, convolutions, statistics, prologues, gradients, stem)
        for part in parts:
            for name, run in part():
                if args.only not in name:
                    continue
                print(name, flush=True)
                results = run()
                assert all(t.isfinite().all() for t in results), name
                count += 1
    print(f"{count} calls")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
