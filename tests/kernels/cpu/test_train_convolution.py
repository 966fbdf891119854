"""The CPU kernels of the convolutions of a training step: forward, input gradient and weight
gradient, in supported geometries and in those that fall back to PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fused_resnet.kernels import native
from fused_resnet.kernels.training.native import Native, sizes
from fused_resnet.kernels.training.protocol import Geometry
from fused_resnet.ops.portable import Portable
from tests.ops.op_cases import close, integers, lifted, randn, same, unchanged

LAST = torch.channels_last
# name -> x's (N, C, H, W), K, kernel (R, S), stride, padding, dilation, and groups unless 1
CASES = {
    "pointwise": ((2, 64, 9, 7), 64, (1, 1), (1, 1), (0, 0), (1, 1)),
    "pointwise, widening": ((3, 32, 13, 11), 144, (1, 1), (1, 1), (0, 0), (1, 1)),
    "pointwise, narrowing": ((3, 208, 13, 11), 16, (1, 1), (1, 1), (0, 0), (1, 1)),
    "pointwise, many pixels": ((2, 16, 61, 67), 32, (1, 1), (1, 1), (0, 0), (1, 1)),
    "pointwise, stride 2": ((2, 32, 9, 8), 80, (1, 1), (2, 2), (0, 0), (1, 1)),
    "pointwise, strides 3 and 2": ((2, 48, 10, 9), 16, (1, 1), (3, 2), (0, 0), (1, 1)),
    "pointwise, padded": ((2, 16, 5, 6), 32, (1, 1), (1, 1), (1, 2), (1, 1)),
    "3x3": ((2, 32, 9, 11), 80, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3, even": ((3, 64, 14, 14), 64, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3, odd": ((4, 48, 13, 13), 80, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3, many tiles": ((2, 32, 66, 35), 48, (3, 3), (1, 1), (1, 1), (1, 1)),
    # In 16 bits: Winograd with tiles of 4 x 4 pixels, full or partial.
    "3x3 of 64, odd": ((2, 64, 17, 15), 64, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 of 64, many tiles": ((2, 64, 66, 35), 80, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 of 64, no padding": ((3, 80, 14, 31), 64, (3, 3), (1, 1), (0, 0), (1, 1)),
    "3x3 of 128, wide padding": ((3, 128, 7, 30), 112, (3, 3), (1, 1), (2, 0), (1, 1)),
    "3x3 of 256": ((6, 256, 14, 14), 256, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3, many weights": ((2, 272, 7, 7), 256, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3, stride 2": ((2, 48, 15, 12), 64, (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3, stride 2, many rows": ((2, 16, 90, 76), 16, (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3, no padding": ((2, 16, 10, 8), 16, (3, 3), (1, 1), (0, 0), (1, 1)),
    "3x3, wide padding": ((1, 48, 7, 30), 64, (3, 3), (1, 1), (2, 0), (1, 1)),
    "3x3, one pixel": ((4, 64, 1, 1), 64, (3, 3), (1, 1), (1, 1), (1, 1)),
    # Separate Winograd kernels for 16 channels in and out: groups of 8 and 16 tiles.
    "3x3 of 16, few tiles": ((1, 16, 7, 9), 16, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 of 16, rows of 16 tiles": ((3, 16, 33, 32), 16, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 of 16, many tiles": ((2, 16, 66, 35), 16, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 of 16, wide padding": ((2, 16, 6, 31), 16, (3, 3), (1, 1), (2, 0), (1, 1)),
    "3x3 of 16, one pixel": ((4, 16, 1, 1), 16, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3, dilated": ((2, 32, 13, 12), 32, (3, 3), (1, 1), (2, 2), (2, 2)),
    "3x3, dilated, stride 2": ((2, 16, 13, 12), 32, (3, 3), (2, 2), (2, 1), (2, 3)),
    # Winograd's tiles interleave, also with 16 channels; the statistics follow rows of tiles.
    "3x3, dilated, many tiles": ((2, 32, 66, 28), 48, (3, 3), (1, 1), (2, 2), (2, 2)),
    "3x3 of 16, dilated": ((2, 16, 12, 13), 16, (3, 3), (1, 1), (1, 2), (1, 2)),
    "3x3 of 64, dilated": ((2, 64, 16, 15), 64, (3, 3), (1, 1), (2, 1), (2, 1)),
    "3x3, dilated beyond the image": ((2, 32, 6, 7), 16, (3, 3), (1, 1), (5, 9), (5, 9)),
    "3x3, stride 3": ((2, 16, 14, 17), 32, (3, 3), (3, 3), (1, 1), (1, 1)),
    # The strided layers of ResNet-50 and of the CIFAR networks.
    "128 channels, 56 to 28": ((1, 128, 56, 56), 128, (3, 3), (2, 2), (1, 1), (1, 1)),
    "256 channels, 28 to 14": ((1, 256, 28, 28), 256, (3, 3), (2, 2), (1, 1), (1, 1)),
    "512 channels, 14 to 7": ((1, 512, 14, 14), 512, (3, 3), (2, 2), (1, 1), (1, 1)),
    "16 to 32 channels, 32 to 16": ((3, 16, 32, 32), 32, (3, 3), (2, 2), (1, 1), (1, 1)),
    "16 to 32 channels, 8 to 4": ((5, 16, 8, 8), 32, (3, 3), (2, 2), (1, 1), (1, 1)),
    "32 to 64 channels, 4 to 2": ((5, 32, 4, 4), 64, (3, 3), (2, 2), (1, 1), (1, 1)),
    # Rows and columns of x that no tap reads, or outside the padded range of all taps.
    "3x3, stride 2, no padding": ((3, 48, 14, 12), 16, (3, 3), (2, 2), (0, 0), (1, 1)),
    "3x3, stride 2, wide padding": ((2, 16, 9, 12), 32, (3, 3), (2, 2), (2, 3), (1, 1)),
    "3x3, stride 2, one pixel": ((5, 16, 1, 1), 32, (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3, stride 4": ((2, 32, 15, 18), 16, (3, 3), (4, 4), (1, 1), (1, 1)),
    "3x3, strides 1 and 2": ((2, 80, 7, 10), 16, (3, 3), (1, 2), (1, 0), (1, 1)),
    "2x3, strides 3 and 5": ((2, 16, 12, 13), 48, (2, 3), (3, 5), (0, 1), (1, 1)),
    "pointwise, stride 2, padded": ((2, 16, 6, 7), 16, (1, 1), (2, 2), (1, 2), (1, 1)),
    "1x5": ((2, 32, 9, 12), 48, (1, 5), (2, 1), (0, 2), (1, 2)),
    "3x1": ((2, 32, 9, 12), 48, (3, 1), (1, 2), (1, 0), (1, 1)),
    "stem": ((2, 3, 33, 30), 64, (7, 7), (2, 2), (3, 3), (1, 1)),
    "stem of 3x3": ((2, 3, 12, 13), 16, (3, 3), (1, 1), (1, 1), (1, 1)),
    "stem, many rows": ((2, 3, 131, 70), 80, (5, 5), (1, 1), (2, 2), (1, 1)),
    "stem, one channel": ((2, 1, 20, 17), 48, (7, 9), (3, 2), (3, 0), (1, 1)),
    "padding wider than the kernel": ((2, 16, 6, 6), 16, (1, 1), (1, 1), (2, 2), (1, 1)),
    # Groups of fewer than 16 channels are merged; all of them, if there are too few for more.
    "32 groups of 4": ((2, 128, 9, 11), 128, (3, 3), (1, 1), (1, 1), (1, 1), 32),
    "32 groups of 4, stride 2": ((2, 128, 15, 12), 128, (3, 3), (2, 2), (1, 1), (1, 1), 32),
    "64 groups of 4": ((1, 256, 7, 8), 256, (3, 3), (1, 1), (1, 1), (1, 1), 64),
    "8 groups of 4, many pixels": ((2, 32, 66, 35), 32, (3, 3), (1, 1), (1, 1), (1, 1), 8),
    "4 groups of 4 to 8": ((2, 16, 13, 12), 32, (3, 3), (1, 1), (1, 1), (1, 1), 4),
    "8 groups of 12 to 4, dilated": ((2, 96, 11, 9), 32, (3, 3), (1, 1), (2, 2), (2, 2), 8),
    "32 groups of 8": ((2, 256, 7, 9), 256, (3, 3), (1, 1), (1, 1), (1, 1), 32),
    "32 groups of 8, stride 2": ((1, 256, 13, 14), 256, (3, 3), (2, 2), (1, 1), (1, 1), 32),
    "4 groups of 8, pointwise": ((2, 32, 9, 8), 32, (1, 1), (1, 1), (0, 0), (1, 1), 4),
    "32 groups of 16": ((2, 512, 7, 7), 512, (3, 3), (1, 1), (1, 1), (1, 1), 32),
    "8 groups of 16 to 32": ((2, 128, 9, 7), 256, (3, 3), (1, 1), (1, 1), (1, 1), 8),
    "8 groups of 32 to 16, stride 2": ((2, 256, 9, 7), 128, (3, 3), (2, 2), (1, 1), (1, 1), 8),
    "5 groups of 16, dilated": ((2, 80, 13, 12), 80, (3, 3), (1, 1), (2, 1), (2, 1), 5),
    "3 groups of 16, many rows": ((2, 48, 90, 76), 48, (3, 3), (2, 2), (1, 1), (1, 1), 3),
    "32 groups of 32": ((1, 1024, 7, 7), 1024, (3, 3), (1, 1), (1, 1), (1, 1), 32),
    "2 groups of 32, pointwise": ((3, 64, 61, 23), 64, (1, 1), (1, 1), (0, 0), (1, 1), 2),
    "2 groups of 80": ((2, 160, 11, 12), 160, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "2 groups of 80 to 16, wide": ((2, 160, 31, 42), 32, (1, 3), (1, 1), (0, 1), (1, 1), 2),
    # These fall back to PyTorch, in the same layout.
    "odd channels": ((2, 33, 6, 5), 18, (3, 3), (1, 1), (1, 1), (1, 1)),
    "many taps": ((2, 16, 12, 12), 16, (5, 5), (1, 1), (2, 2), (1, 1)),
    "depthwise": ((2, 32, 9, 8), 32, (3, 3), (1, 1), (1, 1), (1, 1), 32),
    "3 groups of 8": ((2, 24, 9, 8), 24, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "4 groups of 6": ((2, 24, 9, 8), 24, (3, 3), (2, 2), (1, 1), (1, 1), 4),
}
PASSES = ("y", "dx", "dweight")
# Error beyond rounding for sums of small integers by Winograd F(4x4, 3x3), whose transforms contain
# sixths; measured: 4e-3.
WINOGRAD_4X4_ERROR = 1e-2
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIANTS = ("float32", "bfloat16 by dot product", "bfloat16 in float32", "float16")


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The dtype of one of the VARIANTS, with its multiplication selected."""
    implementations()
    name, _, arithmetic = request.param.partition(" ")
    if arithmetic:
        native.widen_bfloat16(arithmetic == "in float32")
        if native.widens_bfloat16() != (arithmetic == "in float32"):
            pytest.skip("this processor has no dot product of bfloat16")
    yield getattr(torch, name)
    native.widen_bfloat16(None)


def implementations() -> tuple[Native, Portable]:
    if native.load() is not None:
        pytest.skip("no native kernels")
    return Native(), Portable()


def problem(case: str) -> tuple[tuple[int, ...], tuple[int, ...], Geometry]:
    """The shapes of x and weight, and the geometry."""
    shape, K, kernel, stride, padding, dilation, *groups = CASES[case]
    g = Geometry(stride, padding, dilation, *groups)
    return shape, (K, shape[1] // g.groups, *kernel), g


def operands(case: str, dtype: torch.dtype, make=randn) -> tuple[Tensor, Tensor, Tensor, Geometry]:
    """x, float32 weight and dy, channels_last."""
    shape, weight_shape, g = problem(case)
    x = make(shape, dtype).contiguous(memory_format=LAST)
    weight = make(weight_shape, dtype).float().contiguous(memory_format=LAST)
    out = torch.nn.functional.conv2d(x.double(), weight.double(), None, *g).shape
    return x, weight, make(out, dtype).contiguous(memory_format=LAST), g


def run(kernels: Portable, x: Tensor, weight: Tensor, dy: Tensor, g: Geometry) -> list[Tensor]:
    return [
        kernels.convolution(x, weight, g),
        kernels.input_gradient(dy, x, weight, g),
        kernels.weight_gradient(dy, x, weight, g),
    ]


def poison_pool() -> None:
    """Fills the pooled memory of outputs and scratch buffers with NaN."""
    ones, stats = torch.ones(1), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    held = []
    for elements in (300_000, 300_000, 300_000, 900_000, 900_000, 2_000_000):
        x = torch.full((1, 1, 1, elements), float("nan"))
        held.append(
            torch.ops.fused_resnet_native.bn_apply(
                x, stats, ones, ones, 1e-5, None, None, None, None, 0.0, False
            )
        )
    assert all(t.isnan().all() for t in held)


@pytest.mark.pairwise
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", VARIANTS, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: str, dtype: torch.dtype, threads: int) -> None:
    mine, stock = implementations()
    x, weight, dy, g = operands(case, dtype)
    torch.set_num_threads(threads)
    poison_pool()
    check = unchanged(x, weight, dy)
    results = run(mine, x, weight, dy, g)
    check()
    exact = run(stock, lifted(x), lifted(weight), lifted(dy), g)
    theirs = run(stock, x, weight, dy, g)
    close(PASSES, results, theirs, exact, dtype)
    assert [t.dtype for t in results] == [dtype, dtype, torch.float32]
    for t in results[:2]:
        assert t.is_contiguous(memory_format=LAST)


@pytest.mark.pairwise
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", VARIANTS, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_contiguous_weights(case: str, dtype: torch.dtype, threads: int) -> None:
    """The results of channels_last weights bit by bit, and a gradient in the weight's layout."""
    mine, _ = implementations()
    x, weight, dy, g = operands(case, dtype)
    torch.set_num_threads(threads)
    want = run(mine, x, weight, dy, g)
    weight = weight.contiguous()
    poison_pool()
    check = unchanged(weight)
    results = run(mine, x, weight, dy, g)
    check()
    assert all(map(torch.equal, results, want))
    if mine.supports(weight, dtype, g, "weight_gradient"):
        assert results[2].is_contiguous()
    assert all(t.is_contiguous(memory_format=LAST) for t in results[:2])


@pytest.mark.parametrize("dtype", VARIANTS, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_integers_are_exact(case: str, dtype: torch.dtype) -> None:
    """One wrong index changes the result. dweight and, in float32, all sums are exact in any order,
    as are the halves and quarters of Winograd F(2x2, 3x3). The sixths of F(4x4, 3x3) are not exact
    and may change the rounding. Fallbacks equal PyTorch, which without AVX-512 rounds intermediate
    sums of bfloat16."""
    mine, stock = implementations()
    x, weight, dy, g = operands(case, dtype, integers)
    exact = run(stock, lifted(x), lifted(weight), lifted(dy), g)
    theirs = run(stock, x, weight, dy, g)
    results = run(mine, x, weight, dy, g)
    for name, t, e, stocks in zip(PASSES, results, exact, theirs, strict=True):
        sixths = dtype != torch.float32 and "3x3" in case and min(weight.shape[:2]) >= 64
        if sixths and not torch.equal(t, stocks):
            error = (t.double() - e).abs() - (e.to(t.dtype).double() - e).abs()
            assert error.max() <= WINOGRAD_4X4_ERROR, name
        else:
            assert torch.equal(t, e.to(t.dtype)) or torch.equal(t, stocks), name


@pytest.mark.parametrize("dtype", VARIANTS, indirect=True)
@pytest.mark.parametrize(
    "case",
    ["pointwise", "3x3", "3x3, many weights", "pointwise, stride 2", "odd channels",
     "3x3 of 16, few tiles", "3x3 of 64, odd", "3x3, stride 2", "3x3, stride 2, no padding",
     "3x3, stride 4", "32 groups of 4", "32 groups of 8, stride 2", "5 groups of 16, dilated"],
)  # fmt: skip
def test_added_tensors(case: str, dtype: torch.dtype) -> None:
    """conv + residual with one rounding, in the residual's memory; likewise the input gradient."""
    mine, stock = implementations()
    x, weight, dy, g = operands(case, dtype)
    residual, added = randn(dy.shape, dtype), randn(x.shape, dtype)
    residual, added = (t.contiguous(memory_format=LAST) for t in (residual, added))
    exact = [
        stock.convolution(lifted(x), lifted(weight), g) + lifted(residual),
        stock.input_gradient(lifted(dy), lifted(x), lifted(weight), g) + lifted(added),
    ]
    theirs = [
        stock.convolution(x, weight, g, residual.clone(memory_format=torch.preserve_format)),
        stock.input_gradient(dy, x, weight, g, added.clone(memory_format=torch.preserve_format)),
    ]
    results = [
        mine.convolution(x, weight, g, residual), mine.input_gradient(dy, x, weight, g, added)
    ]  # fmt: skip
    close(PASSES[:2], results, theirs, exact, dtype)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", VARIANTS, indirect=True)
@pytest.mark.parametrize(
    "case",
    ["pointwise", "pointwise, many pixels", "3x3, many tiles", "3x3 of 16, many tiles",
     "3x3 of 64, many tiles", "8 groups of 4, many pixels", "2 groups of 32, pointwise"],
)  # fmt: skip
def test_memory_beyond_tensors_is_not_read(case: str, dtype: torch.dtype, threads: int) -> None:
    """x and dy are surrounded by NaN."""
    mine, _ = implementations()
    torch.set_num_threads(threads)
    x, weight, dy, g = operands(case, dtype)
    expected = run(mine, x, weight, dy, g)
    views = []
    for t in (x, dy):
        around = torch.full((len(t) + 2, *t.shape[1:]), float("nan"), dtype=dtype)
        around = around.contiguous(memory_format=LAST)
        around[1:-1] = t
        views.append(around[1:-1])
    for name, a, b in zip(PASSES, run(mine, views[0], weight, views[1], g), expected, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("weights", ["contiguous", "bfloat16", "sliced"])
def test_weight_layouts_and_dtypes(weights: str) -> None:
    mine, _ = implementations()
    x, weight, dy, g = operands("3x3, even", torch.float32)
    if weights == "contiguous":
        other = weight.contiguous()
    elif weights == "bfloat16":
        x, dy = x.bfloat16(), dy.bfloat16()
        other = weight = weight.bfloat16()
        weight = weight.float()
    else:
        other = torch.cat([weight * 7, weight], 1)[:, weight.shape[1] :]
    for a, b in zip(run(mine, x, other, dy, g), run(mine, x, weight, dy, g), strict=True):
        same(a.float(), b.to(a.dtype).float())


@pytest.mark.parametrize(
    "case",
    ["3x3", "3x3 of 64, odd", "pointwise, many pixels", "stem", "3x3, stride 2",
     "8 groups of 4, many pixels"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", VARIANTS, indirect=True)
def test_bitwise_repeatable(case: str, dtype: torch.dtype) -> None:
    mine, _ = implementations()
    x, weight, dy, g = operands(case, dtype)
    first = run(mine, x, weight, dy, g)
    for _ in range(20):
        for a, b in zip(first, run(mine, x, weight, dy, g), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "case",
    ["3x3, many tiles", "3x3 of 16, rows of 16 tiles", "3x3", "3x3 of 64, many tiles",
     "3x3, stride 2, many rows", "8 groups of 4, many pixels", "32 groups of 8, stride 2"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", VARIANTS, indirect=True)
def test_result_does_not_depend_on_thread_count(case: str, dtype: torch.dtype) -> None:
    """y and dx do not depend on the distribution of tiles over threads."""
    mine, _ = implementations()
    x, weight, dy, g = operands(case, dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(run(mine, x, weight, dy, g)[:2])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", VARIANTS, indirect=True)
@pytest.mark.parametrize(
    "case",
    ["3x3, even", "3x3 of 64, odd", "pointwise", "3x3, stride 2", "3x3 of 16, few tiles",
     "32 groups of 4", "32 groups of 4, stride 2", "4 groups of 4 to 8", "4 groups of 8, pointwise",
     "8 groups of 16 to 32", "8 groups of 12 to 4, dilated"],
)  # fmt: skip
def test_non_finite_values(case: str, dtype: torch.dtype, value: float) -> None:
    """Forward and both gradients are non-finite exactly where stock is."""
    mine, stock = implementations()
    for which in range(3):
        x, weight, dy, g = operands(case, dtype)
        t = (x, weight, dy)[which]
        t[tuple(n // 2 for n in t.shape)] = value
        for name, a, b in zip(
            PASSES, run(mine, x, weight, dy, g), run(stock, x, weight, dy, g), strict=True
        ):
            assert torch.equal(a.isfinite(), b.isfinite()), (name, which)


@pytest.mark.parametrize("dtype", VARIANTS, indirect=True)
@pytest.mark.parametrize("case", ["3x3, even", "3x3 of 64, odd", "3x3 of 16, few tiles"])
def test_sums_that_overflow_in_winograd(case: str, dtype: torch.dtype) -> None:
    """Winograd sums of several values may overflow where the result does not."""
    mine, stock = implementations()
    x, weight, dy, g = operands(case, dtype)
    x = torch.full_like(x, 0.6 * torch.finfo(dtype).max)
    weight, dy = weight * 1e-3, dy * 1e-6
    exact = run(stock, lifted(x), lifted(weight), lifted(dy), g)
    theirs = run(stock, x, weight, dy, g)
    results = run(mine, x, weight, dy, g)
    assert all(t.isfinite().all() for t in theirs)
    for name, a, s, e in zip(PASSES, results, theirs, exact, strict=True):
        assert a.isfinite().all(), name
        scale = (lifted(x).abs().max() * lifted(weight).abs().sum()).item() if name == "y" else 0
        terms = {name: scale} if scale else {name: e.abs().max().item() * 100}
        close([name], [a], [s], [e], dtype, terms)


def test_errors_name_the_argument() -> None:
    implementations()
    ops = torch.ops.fused_resnet_native
    x, weight, dy, _ = operands("3x3", torch.float32)
    ones = [1] * 7
    with pytest.raises(RuntimeError, match="convolution: x must be channels_last"):
        ops.convolution(x.contiguous(), weight, None, ones)
    with pytest.raises(RuntimeError, match="convolution: x must have 32 channels, got 16"):
        ops.convolution(x[:, :16].contiguous(memory_format=LAST), weight, None, ones)
    with pytest.raises(RuntimeError, match="convolution: geometry must be stride, padding and"):
        ops.convolution(x, weight, None, [1])
    with pytest.raises(RuntimeError, match="groups that divide 80 outputs, got 3"):
        ops.convolution(x, weight, None, [1] * 6 + [3])
    with pytest.raises(RuntimeError, match="convolution: x must have 64 channels, got 32"):
        ops.convolution(x, weight, None, [1] * 6 + [2])
    with pytest.raises(RuntimeError, match="weight_gradient: x must have a multiple of 5 channels"):
        ops.weight_gradient(dy, x, 3, 3, [1] * 6 + [5], False)
    with pytest.raises(RuntimeError, match=r"no kernel for groups .* and weight of shape"):
        ops.convolution(x, weight[:32, :1].contiguous(), None, [1] * 6 + [32])
    with pytest.raises(RuntimeError, match=r"residual must be float32 of shape \(2, 80, 9, 11\)"):
        ops.convolution(x, weight, x, ones)
    with pytest.raises(RuntimeError, match="smaller than the kernel"):
        ops.convolution(x, weight, None, [1, 1, 0, 0, 9, 9, 1])
    with pytest.raises(RuntimeError, match="input_gradient: dy must be channels_last"):
        ops.input_gradient(dy.contiguous(), weight, 9, 11, None, ones)
    with pytest.raises(RuntimeError, match="does not match a 9 x 12 image"):
        ops.input_gradient(dy, weight, 9, 12, None, ones)
    with pytest.raises(RuntimeError, match=r"added must be float32 of shape \(2, 32, 9, 11\)"):
        ops.input_gradient(dy, weight, 9, 11, dy, ones)
    for op, t, size in ((ops.convolution, x, ()), (ops.input_gradient, dy, (9, 11))):
        with pytest.raises(RuntimeError, match="weight must be float32 of shape"):
            op(t, weight.double(), *size, None, ones)
        with pytest.raises(RuntimeError, match="weight must be contiguous or channels_last"):
            op(t, weight.transpose(2, 3), *size, None, ones)
    square = torch.randn(32, 32, 3, 3)
    for other in (square, square.contiguous(memory_format=LAST)):
        with pytest.raises(RuntimeError, match="weight must be contiguous or channels_last"):
            ops.convolution(x, other.transpose(0, 1), None, ones)
        with pytest.raises(RuntimeError, match=r"no kernel for this dtype .* got float64"):
            op(t.double(), weight, *size, None, ones)
    with pytest.raises(RuntimeError, match=r"weight_gradient: dy of shape .* does not match x of"):
        ops.weight_gradient(dy[:1], x, 3, 3, ones, False)
    for outputs, inputs in ((9, 32), (16, 18), (9, 3)):
        few = [t[:, :n].contiguous(memory_format=LAST) for t, n in ((dy, outputs), (x, inputs))]
        with pytest.raises(RuntimeError, match="channels must be multiples of 16"):
            ops.weight_gradient(*few, 3, 3, ones, False)


@pytest.mark.parametrize("work", ["convolution", "input_gradient", "weight_gradient"])
def test_which_passes_are_computed(work: str) -> None:
    implementations()
    reasons = {
        case: native.training_reason(work, weight, torch.float32, sizes(g))
        for case, (_, weight, g) in {case: problem(case) for case in CASES}.items()
    }
    refused = {case for case, reason in reasons.items() if reason is not None}
    stems = {case for case in CASES if case.startswith("stem")}
    by_pytorch = {"odd channels", "many taps", "depthwise", "3 groups of 8", "4 groups of 6"}
    if work == "input_gradient":
        by_pytorch |= {"3x3, dilated, stride 2", "1x5"}
    assert refused == (by_pytorch if work == "weight_gradient" else by_pytorch | stems)
    for dtype, groups in ((torch.float64, 1), (torch.int64, 1), (torch.float32, 32)):
        reason = native.training_reason(work, (32, 32 // groups, 3, 3), dtype, [1] * 6 + [groups])
        assert reason is not None and "no kernel for" in reason


def test_empty_batch() -> None:
    mine, _ = implementations()
    cases = ("3x3", "3x3, stride 2", "pointwise", "stem", "32 groups of 4", "32 groups of 16")
    for dtype, case in itertools.product(DTYPES, cases):
        x, weight, dy, g = operands(case, dtype)
        y, dx, dweight = run(mine, x[:0], weight, dy[:0], g)
        assert y.shape[0] == dx.shape[0] == 0
        assert torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", VARIANTS[1:], indirect=True)
@pytest.mark.parametrize(
    "case",
    ["pointwise", "3x3", "3x3 of 64, odd", "3x3, stride 2", "3x3 of 16, few tiles",
     "32 groups of 4"],
)  # fmt: skip
def test_weights_are_rounded(case: str, dtype: torch.dtype) -> None:
    """Weights are rounded to the dtype of x, as in autocast."""
    mine, _ = implementations()
    x, weight, dy, g = operands(case, dtype)
    weight = weight * 1.001
    rounded = weight.to(dtype).float()
    assert not torch.equal(weight, rounded)
    for a, b in zip(run(mine, x, weight, dy, g), run(mine, x, rounded, dy, g), strict=True):
        same(a, b)


def statistics_of(z: Tensor) -> Tensor:
    """Mean and biased variance, (2, K), computed in float64."""
    wide = lifted(z)
    return torch.stack([wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)])


@pytest.mark.pairwise
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", VARIANTS, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_fused_statistics(case: str, dtype: torch.dtype, threads: int) -> None:
    """z is bitwise equal to z without statistics; mean and variance are those of the rounded z. A
    missing or duplicated pixel would change them by a thousandth or more."""
    mine, _ = implementations()
    torch.set_num_threads(threads)
    x, weight, _, g = operands(case, dtype)
    x = (x + 3).contiguous(memory_format=LAST)  # means far from zero
    poison_pool()
    z, state = mine.convolve(x, weight, g)
    assert torch.equal(z, mine.convolution(x, weight, g))
    if state is None:
        assert not mine.supports(weight, dtype, g)
        return
    (statistics,) = state
    exact = statistics_of(z)
    spread = exact[1].sqrt().max()
    # Measured: at most 2e-7 and 2.1e-6.
    assert (statistics[0] - exact[0]).abs().max() <= 1e-6 * spread
    assert (statistics[1] - exact[1]).abs().max() <= 1e-5 * spread**2


@pytest.mark.parametrize(
    "case",
    ["3x3, even", "3x3 of 16, rows of 16 tiles", "pointwise, many pixels", "3x3",
     "8 groups of 4, many pixels"],
)  # fmt: skip
def test_fused_statistics_of_non_finite_values(case: str) -> None:
    """With overflowing squares, Inf and NaN, the statistics equal those of bn_statistics."""
    mine, _ = implementations()
    x, weight, _, g = operands(case, torch.float32)
    for value in (1e25, float("inf"), float("nan")):
        other = x.clone(memory_format=torch.preserve_format)
        other[-1, :, -1, -1] = value
        z, state = mine.convolve(other, weight, g)
        assert state is not None
        same(state[0], mine.statistics(z)[0])
        finite = z.isfinite().all(dim=0).flatten(1).all(1)
        assert torch.equal(state[0][0].isfinite(), finite)


def test_constant_channel_has_zero_variance() -> None:
    mine, _ = implementations()
    for dtype, case in itertools.product(DTYPES, ("pointwise, many pixels", "3x3, no padding")):
        x, weight, _, g = operands(case, dtype)
        x = torch.full_like(x, 1.7)
        z, state = mine.convolve(x, weight, g)
        assert state is not None
        assert torch.equal(state[0][1], torch.zeros(z.shape[1], dtype=torch.float64))
        same(state[0][0], z[0, :, 0, 0].double())
