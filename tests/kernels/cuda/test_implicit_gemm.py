"""implicit_gemm on sm_80: the kernels in the emulator and, if available, on a GPU; and their index
arithmetic."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

from fused_resnet.kernels.cuda import implicit_gemm
from fused_resnet.kernels.problem import Gemm
from fused_resnet.kernels.target import Target
from tests.emulator import emulation
from tests.kernels.cuda import machines
from tests.ops.op_cases import close, integers, randn, same
from tests.ops.test_conv_bn_relu import CASES, exact, operands, stock

if emulation.unavailable() is not None:
    pytest.skip(emulation.unavailable(), allow_module_level=True)

from tests.kernels.cuda import gemm_cases
from tests.kernels.cuda.gemm_cases import check_close, run, to_tf32

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILES = gemm_cases.tiles(80)
SMALLEST = min(TILES, key=lambda tile: tile.block_m * tile.block_n)
# More pixels and outputs than any tile, not multiples of a tile, several steps.
BEYOND_ONE_TILE = {
    "windows": ((1, 24, 13, 11), 136, (3, 3), 1, 1, 1, 1),
    "pointwise": ((1, 136, 12, 11), 136, (1, 1), 1, 0, 1, 1),
    "two groups": ((1, 48, 9, 15), 144, (1, 3), 1, (0, 1), 1, 2),
}


# Tests without it run in the emulator only, or test code that runs on the host.
also_on_gpu = pytest.mark.usefixtures("kernels")


@pytest.fixture(autouse=True)
def same_seed(request):
    if "kernels" in request.fixturenames:
        request.getfixturevalue("kernels")
    machines.seed(1)


def small_integers(case, dtype):
    """Arguments of a convolution whose products and sums are exact, and its result."""
    (x, weight, scale, shift, residual), geometry = operands(case, torch.float32, "cpu", integers)
    x, weight = x.clamp(-1, 1), weight.clamp(-1, 1)
    want = exact(x, weight, scale, shift, residual, True, *geometry).to(dtype)
    x, weight, residual = (t.to(dtype) for t in (x, weight, residual))
    return (x, weight, scale, shift, residual, True, *geometry), want


def random(case, dtype):
    tensors, geometry = operands(case, dtype)
    if dtype == torch.float32:
        tensors[:2] = map(to_tf32, tensors[:2])
    return tensors, geometry


# --- values --------------------------------------------------------------------------------------


@also_on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values(case, dtype):
    """Every case; the tiles alternate."""
    number = list(CASES).index(case) + DTYPES.index(dtype)
    (*tensors, residual), geometry = random(case, dtype)
    variants = ((residual, True), (None, True), (residual, False), (None, False))
    many = " many" in f" {case}" or CASES[case][-1] > 8  # slow here
    for i, rest in enumerate(variants[:1] if many else variants):
        arguments = (*tensors, *rest, *geometry)
        tile = SMALLEST if many else TILES[(number + i) % len(TILES)]
        check_close(arguments, run(*arguments, tile=tile))


@also_on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_small_integers_are_exact(case, dtype):
    """One wrong index changes the result."""
    number = list(CASES).index(case) + DTYPES.index(dtype)
    arguments, want = small_integers(case, dtype)
    many = " many" in f" {case}" or CASES[case][-1] > 8
    tile = SMALLEST if many else TILES[number % len(TILES)]
    same(run(*arguments, tile=tile), want)


@pytest.mark.pairwise
@also_on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", BEYOND_ONE_TILE)
def test_every_tile(monkeypatch, name, tile, dtype):
    monkeypatch.setitem(CASES, name, BEYOND_ONE_TILE[name])
    arguments, want = small_integers(name, dtype)
    splits = 1 + (TILES.index(tile) + DTYPES.index(dtype)) % 3
    same(run(*arguments, tile=tile, splits=splits), want)


@also_on_gpu
@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize("case", ["3x3", "pointwise", "groups of 24, 48 outputs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits(dtype, case, splits):
    """Some splits have no step; sums are added in a fixed order, whatever the order of blocks."""
    (*tensors, residual), geometry = random(case, dtype)
    for rest in ((residual, True), (None, False)):
        arguments = (*tensors, *rest, *geometry)
        y = run(*arguments, tile=SMALLEST, splits=splits)
        check_close(arguments, y)
        machines.seed(2)
        assert torch.equal(run(*arguments, tile=SMALLEST, splits=splits), y)


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_result_does_not_depend_on_thread_order(tile):
    for case, dtype in (("3x3, stride 2", torch.bfloat16), ("many channels", torch.float16)):
        tensors, geometry = random(case, dtype)
        first = run(*tensors, True, *geometry, tile=tile)
        for seed in (2, 3):
            emulation.seed(seed)
            assert torch.equal(run(*tensors, True, *geometry, tile=tile), first)


@also_on_gpu
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_propagate_as_in_stock(dtype, value, splits):
    (x, weight, scale, shift, residual), geometry = random("3x3, stride 2", dtype)
    for target, at in ((x, (0, -1, 2, 3)), (residual, (0, 3, 1, 1)), (x, (0, 0, -1, -1))):
        original = target[at].item()
        target[at] = value
        for rest in ((residual, True), (residual, False)):
            arguments = (x, weight, scale, shift, *rest, *geometry)
            got = run(*arguments, tile=SMALLEST, splits=splits)
            want = stock(*(t.float() for t in arguments[:5]), rest[1], *geometry)
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.isinf(), want.isinf())
            finite = want.isfinite()
            torch.testing.assert_close(got[finite].float(), want[finite], rtol=0.03, atol=0.03)
        target[at] = original


@also_on_gpu
@pytest.mark.parametrize("splits", [1, 2])
def test_parameters_stay_in_their_channel(splits):
    tensors, geometry = random("3x3", torch.bfloat16)
    tensors[2][2], tensors[3][5], tensors[3][7] = float("nan"), float("inf"), -float("inf")
    arguments = (*tensors, True, *geometry)
    got, want = run(*arguments, tile=SMALLEST, splits=splits), stock(*arguments)
    assert got[:, 2].isnan().all() and got[:, 5].isinf().all()
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


@also_on_gpu
def test_one_rounding_and_in_float32():
    """2049 is representable in float32, but not in 16 bits, where adding -2048 would give 0."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.ones(1, 64, 1, 3, dtype=dtype)
        weight = torch.full((8, 64, 1, 1), 32.0, dtype=dtype)
        weight[:, 0] += 1
        ones, less = torch.ones(8), torch.full((8,), -2048.0)
        residual = torch.full((1, 8, 1, 3), -2048.0, dtype=dtype)
        for shift, added in ((less, None), (less * 0, residual)):
            y = run(x, weight, ones, shift, added, False, 1, 0, 1, 1, tile=SMALLEST)
            same(y, torch.ones_like(y))


@also_on_gpu
def test_tf32_is_rounded_to_nearest():
    """For operands that are representable in float32, but not in TF32."""
    x, weight = (randn(shape, torch.float32) for shape in ((2, 64, 5, 5), (16, 64, 3, 3)))
    rest = (torch.ones(16), torch.zeros(16), None, False, 1, 1, 1, 1)
    want = exact(to_tf32(x), to_tf32(weight), *rest)
    y = run(x, weight, *rest, tile=SMALLEST)
    theirs = machines.stock(stock, to_tf32(x), to_tf32(weight), *rest)
    close(("y",), [y], [theirs], [want], torch.float32, {"y": 64 * 9.0})
    assert not torch.equal(to_tf32(x), x)
    x[0, 0, 0, 0] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).item()
    x[1, 0, 0, 0] = torch.finfo(torch.float32).max
    y = run(x, weight, *rest, tile=SMALLEST)
    assert y[0, :, :2, :2].isnan().all() and not y[0, :, 2:].isnan().any()
    assert not y[1].isfinite()[:, :2, :2].any()


# --- shared memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_no_bank_conflicts(tile, dtype):
    for case in ("3x3", "pointwise"):
        arguments, _ = small_integers(case, dtype)
        with emulation.wavefronts() as wavefronts:
            run(*arguments, tile=tile)
        for access in ("async_store", "ldmatrix", "store", "load"):
            needed, ideal = wavefronts[access]
            assert needed == ideal > 0, f"{access}: {needed} wavefronts for {ideal}"


# --- index arithmetic ----------------------------------------------------------------------------


def test_fast_division():
    wrong = emulation.load().wrong_quotients
    wrong.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint64]
    wrong.restype = ctypes.c_int64
    for d in range(1, 9):
        assert wrong(d, 1 << 21, 1 << 16, d) == 0, d
    edges = {2**b + e for b in range(1, 31) for e in (-1, 0, 1)} | {2**31 - 1, 2**31 - 2}
    chosen = torch.randint(1, 2**31 - 1, (1000,)).tolist()
    for d in {*range(1, 3000), *edges, *chosen} - {0}:
        assert wrong(d, 2000, 2000, d) == 0, d


@pytest.mark.parametrize("tiles_m", [1, 2, 7, 8, 9, 16, 29])
@pytest.mark.parametrize("tiles_n", [1, 3, 16])
def test_every_tile_and_split_has_one_block(tiles_m, tiles_n):
    library, place = emulation.load(), (ctypes.c_int * 3)()
    places = []
    for block in range(3 * tiles_m * tiles_n):
        library.gemm_tile_place(block, tiles_m, tiles_n, place)
        places.append(tuple(place))
    assert sorted(places) == sorted(itertools.product(range(tiles_m), range(tiles_n), range(3)))
    # Blocks that run concurrently share rows and columns.
    concurrent = places[: 8 * tiles_n]
    assert len({row for row, _, _ in concurrent}) <= 8
    assert len({column for _, column, _ in concurrent[:8]}) <= -(-8 // min(tiles_m, 8))


def test_splits_partition_all_steps():
    library, begin_end = emulation.load(), (ctypes.c_int * 2)()
    for steps, splits in itertools.product((1, 2, 3, 7, 8, 72), (1, 2, 3, 8)):
        assigned = []
        for split in range(splits):
            library.gemm_split_steps(steps, splits, split, begin_end)
            assigned += range(*begin_end)
        assert assigned == list(range(steps))


@pytest.mark.parametrize("channels", [8, 16, 24, 40, 56, 64, 72, 136, 512])
def test_window_iteration_matches_division(channels):
    """Also with more than 2^31 elements before the last image."""
    for kernel, dilation, groups in (((1, 1), (1, 1), 1), ((3, 3), (1, 1), 2), ((1, 5), (7, 2), 1),
                                     ((7, 7), (1, 1), 1), ((5, 1), (3, 9), 3)):  # fmt: skip
        problem = (61, 47, channels, *kernel, *dilation, groups)
        image = 61 * 47 * channels * groups
        for n in (0, 2, 2**33 // image):
            pixels = (ctypes.c_int * 8)(*problem)
            assert emulation.load().wrong_window_places(pixels, n) == 0, (problem, n)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_accumulator_offsets_are_distinct(tile):
    assert emulation.load().wrong_sum_offsets(tile.block_m, tile.block_n) == 0


def test_tiles_are_chosen_for_the_device_and_the_problem():
    """Large tiles for many pixels, splits for few pixels; tiles for Hopper only on Hopper."""
    ampere, hopper = Target("nvidia", "sm_80"), Target("nvidia", "sm_90a")
    many = Gemm(100352, 256, 64, 3, 3, 1, 1, "float16")
    few, far = many._replace(M=49, C=2048), many._replace(stride=9)
    for target, gemm in (
        (ampere, many),
        (Target("nvidia", "sm_90"), many),  # not built for Hopper
        (Target("amd", "gfx90a"), many),
        (hopper, far),
        (hopper, many._replace(operands="tf32")),
    ):
        for config in implicit_gemm.candidates(gemm, target):
            assert implicit_gemm.tiles()[config.tile]["architecture"] == 80
    for target, architecture in ((ampere, 80), (hopper, 90)):
        tile = implicit_gemm.tiles()[implicit_gemm.choose(many, target, 108).tile]
        assert tile["architecture"] == architecture
        assert tile["block_m"] * tile["block_n"] >= 128 * 128
    assert implicit_gemm.choose(few, ampere, 108).splits > 1
    stem = many._replace(K=64, C=3, R=7, S=7, stride=2)
    assert implicit_gemm.choose(stem, ampere, 108).tile == implicit_gemm.STEM
    assert implicit_gemm.choose(stem._replace(stride=1), ampere, 108).tile != implicit_gemm.STEM


@also_on_gpu
def test_zero_splits_raise():
    arguments, _ = small_integers("pointwise", torch.float16)
    with pytest.raises(RuntimeError, match="splits must be positive"):
        run(*arguments, tile=SMALLEST, splits=0)
