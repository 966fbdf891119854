"""Bitwise repeatability: every CUDA op, run repeatedly, in the emulator and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.emulator import emulation
from tests.kernels.cuda import machines
from tests.ops.op_cases import randn

if emulation.unavailable() is not None:
    pytest.skip(emulation.unavailable(), allow_module_level=True)

from tests.kernels.cuda import gemm_cases

pytestmark = [pytest.mark.usefixtures("kernels"), pytest.mark.slow]

REPEATS = 250  # on a GPU; the emulator changes the order of threads between repeats
TILES = [*gemm_cases.tiles(80), *gemm_cases.tiles(90)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def last(shape: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    t = randn(shape, dtype).contiguous(memory_format=torch.channels_last)
    return machines.to_device(t)


def size(small: tuple[int, ...], large: tuple[int, ...]) -> tuple[int, ...]:
    """Many blocks for each multiprocessor of a GPU, few for the emulator."""
    return small if machines.emulated() else large


def check(run: Callable[[], Sequence[Tensor]]) -> None:
    first = [t.clone() for t in run()]
    assert all(t.isfinite().all() for t in first)
    for number in range(2 if machines.emulated() else REPEATS):
        machines.seed(number)
        assert machines.equal(run(), first), f"repeat {number} differs"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_relu(dtype):
    shape = size((2, 33, 9, 9), (32, 256, 56, 56))
    x, residual, out = (last(shape, dtype) for _ in range(3))
    ops = machines.ops()

    def run() -> list[Tensor]:
        y = ops.add_relu(x, residual)
        ops.add_relu_out(x, residual, out)
        return [y, out, ops.add_relu_backward(x, y)]

    check(run)


# One block per slab, values cached in shared memory, values read twice: see test_emulated.py.
BN_SIZES = {
    "one block a slab": ((4, 64, 7, 7), (32, 2048, 7, 7)),
    "one launch": ((2, 16, 24, 24), (32, 64, 56, 56)),
    "two launches": ((2, 16, 40, 40), (128, 256, 56, 56)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("sizes", BN_SIZES)
def test_bn_add_relu(sizes, channels_last, dtype):
    shape = size(*BN_SIZES[sizes])
    x, residual, dy = (last(shape, dtype) for _ in range(3))
    if not channels_last:
        x, residual, dy = (t.contiguous() for t in (x, residual, dy))
    weight, bias = (machines.to_device(t) for t in torch.rand(2, shape[1]).unbind())
    ops = machines.ops()

    def run() -> list[Tensor]:
        y, mean, var = ops.bn_add_relu(x, weight, bias, residual, 1e-5, True)
        back = ops.bn_add_relu_backward(dy, x, y, weight, mean, var, 1e-5, True, True, True)
        return [y, mean, var, *back]

    check(run)


@pytest.mark.parametrize("kernel", [1, 3], ids=["1x1", "3x3"])
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"sm_{t.architecture} {t}")
def test_implicit_gemm(tile, kernel):
    if (reason := machines.skip_reason(tile.architecture)) is not None:
        pytest.skip(reason)
    N, C, H, W = size((1, 72, 13, 11), (32, 256, 28, 28))
    K, splits = size((136, 1, 3), (512, 1, 3))[0], (1, 3) if tile.architecture == 80 else (1,)
    x, residual = last((N, C, H, W)), last((N, K, H, W))
    weight = machines.to_device(
        randn((K, kernel, kernel, C), torch.bfloat16) / (C * kernel**2) ** 0.5
    )
    scale, shift = (machines.to_device(t) for t in torch.randn(2, K).unbind())
    geometry = ([1, 1], [kernel // 2] * 2, [1, 1], 1)
    for parts in splits:
        y = torch.empty_like(residual)

        def run(parts: int = parts, y: Tensor = y) -> list[Tensor]:
            machines.ops().implicit_gemm(
                x, weight, scale, shift, residual, y, True, *geometry, tile.number, parts
            )
            return [y]

        check(run)


@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"sm_{t.architecture} {t}")
def test_convolution_statistics(tile):
    if (reason := machines.skip_reason(tile.architecture)) is not None:
        pytest.skip(reason)
    N, C, H, W = size((2, 72, 13, 11), (32, 256, 28, 28))
    (K,) = size((136,), (512,))
    x, z = last((N, C, H, W)), last((N, K, H, W))
    weight = machines.to_device(randn((K, 1, 1, C), torch.bfloat16) / C**0.5)
    for splits in (1, 3) if tile.architecture == 80 else (1,):

        def run(splits: int = splits) -> list[Tensor]:
            geometry = ([1, 1], [0, 0], [1, 1], 1)
            ops = machines.ops()
            parts, pixels = ops.convolution_statistics(x, weight, z, *geometry, tile.number, splits)
            return [z, parts, *ops.bn_merge_statistics(parts, N * H * W, pixels)]

        check(run)


@pytest.mark.parametrize(
    "tile",
    [tile for tile in TILES if min(tile.block_m, tile.block_n) >= 64],
    ids=lambda t: f"sm_{t.architecture} {t}",
)
def test_normalised_convolution_statistics(tile):
    if (reason := machines.skip_reason(tile.architecture)) is not None:
        pytest.skip(reason)
    N, C, H, W = size((1, 72, 9, 8), (32, 256, 28, 28))
    (K,) = size((72,), (512,))
    x, z = last((N, C, H, W)), last((N, K, H, W))
    weight = machines.to_device(randn((K, 1, 1, C), torch.bfloat16) / C**0.5)
    vectors = [machines.to_device(t) for t in torch.rand(5, C).unbind()]

    def run() -> list[Tensor]:
        parts, _ = machines.ops().normalised_convolution_statistics(
            x, *vectors, 1e-5, weight, z, tile.number
        )
        return [z, parts]

    check(run)


@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"sm_{t.architecture} {t}")
def test_convolution_gradient_sums(tile):
    if (reason := machines.skip_reason(tile.architecture)) is not None:
        pytest.skip(reason)
    N, K, H, W = size((2, 72, 13, 11), (32, 512, 28, 28))
    (C,) = size((136,), (256,))
    dy, g, x = last((N, K, H, W)), last((N, C, H, W)), last((N, C, H, W))
    weight = machines.to_device(randn((C, 1, 1, K), torch.bfloat16) / K**0.5)
    norm = [machines.to_device(t) for t in torch.rand(5, C).unbind()]
    for splits in (1, 3) if tile.architecture == 80 else (1,):

        def run(splits: int = splits) -> list[Tensor]:
            geometry, ops = ([0, 0], [1, 1], 1), machines.ops()
            sums = ops.convolution_gradient_sums(
                dy, weight, g, x, *norm, 1e-5, *geometry, tile.number, splits
            )
            mean, var, _, scale, _ = norm
            return [g, sums, *ops.bn_gradient_by_sums(g, x, sums, scale, mean, var, 1e-5)]

        check(run)


@pytest.mark.parametrize("pool", [True, False], ids=["pooled", "not pooled"])
def test_stem(pool):
    x = last(size((2, 3, 45, 71), (32, 3, 224, 224)))
    weight = F.pad(randn((64, 3, 7, 7), torch.bfloat16) / 12, (0, 1, 0, 0, 0, 1))
    weight = machines.to_device(weight.permute(0, 2, 3, 1).contiguous())
    scale, shift = (machines.to_device(t) for t in torch.randn(2, 64).unbind())
    check(lambda: [machines.ops().stem(x, weight, scale, shift, pool)])
