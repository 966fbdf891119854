"""Batch norm statistics computed in the epilogue of a convolution, merged and applied: the CUDA
kernels in the emulator and, if available, on a GPU; and the training path that uses them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from fused_resnet.kernels import tuning
from fused_resnet.kernels.cuda import implicit_gemm
from fused_resnet.kernels.cuda.implicit_gemm import CudaConfig
from fused_resnet.kernels.problem import Gemm, operands_of
from fused_resnet.kernels.target import Target
from fused_resnet.kernels.training.cuda import CUDA, Cuda
from fused_resnet.kernels.training.protocol import Geometry
from fused_resnet.tolerance import measure_error
from tests.emulator import emulation
from tests.fusion.training.training_helpers import make, step, stock_step
from tests.kernels.cuda import machines
from tests.ops.op_cases import DENSE, LAYOUTS, close, lifted, randn, same

if emulation.unavailable() is not None:
    pytest.skip(emulation.unavailable(), allow_module_level=True)

from tests.kernels.cuda import gemm_cases, test_hopper
from tests.kernels.cuda.gemm_cases import GUARD, guarded, padded, pairs
from tests.kernels.cuda.test_implicit_gemm import (
    BEYOND_ONE_TILE,
    DTYPES,
    SMALLEST,
    TILES,
    random,
    small_integers,
)
from tests.ops.test_conv_bn_relu import CASES, exact

also_on_gpu = pytest.mark.usefixtures("kernels")
HOPPER = gemm_cases.tiles(90)
# For windows larger than 1x1, Hopper's tiles read whole steps of 64 channels of a group.
RAGGED = {**BEYOND_ONE_TILE, "two groups of 64": ((1, 128, 9, 15), 144, (1, 3), 1, (0, 1), 1, 2)}


def label(tile: gemm_cases.Tile) -> str:
    return f"sm_{tile.architecture} {tile}"


def multiplies(tile: gemm_cases.Tile, dtype: torch.dtype) -> bool:
    return tile.architecture == 80 or dtype != torch.float32


@pytest.fixture(autouse=True)
def same_seed(request):
    if "kernels" in request.fixturenames:
        request.getfixturevalue("kernels")
    machines.seed(1)


def convolve(
    x: Tensor, weight: Tensor, *geometry, tile: gemm_cases.Tile, splits: int = 1
) -> tuple[Tensor, Tensor, int]:
    """x (N, C, H, W), weight (K, C / groups, R, S) -> z (N, K, P, Q), statistics (parts, 3, K) and
    the pixels of a part, on padded copies with NaN around x and z."""
    if (reason := machines.skip_reason(tile.architecture)) is not None:
        pytest.skip(reason)
    stride, padding, dilation, groups = pairs(geometry)
    size, K = 16 // x.element_size(), weight.shape[0]
    out = torch.nn.functional.conv2d(
        x[:, :groups].float(), torch.empty(groups, 1, *weight.shape[2:]), None, stride, padding,
        dilation, groups,
    ).shape  # fmt: skip
    x, _ = guarded(padded(x, 1, groups, size))
    weight = padded(padded(weight, 1, 1, size), 0, groups, size)
    weight = machines.to_device(weight.permute(0, 2, 3, 1).contiguous())
    wide = weight.shape[0]
    z, memory = guarded(x.new_full((out[0], wide, *out[2:]), float("nan")))
    statistics, pixels = machines.ops().convolution_statistics(
        x, weight, z, stride, padding, dilation, groups, tile.number, splits
    )
    assert memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all(), "written outside z"
    M = out[0] * out[2] * out[3]
    assert statistics.shape == (-(-M // pixels), 3, wide)
    z = z.cpu().reshape(out[0], groups, wide // groups, *out[2:])[:, :, : K // groups].flatten(1, 2)
    of_group = statistics.reshape(-1, 3, groups, wide // groups)[..., : K // groups]
    return z, of_group.flatten(2, 3).contiguous(), pixels


def merge(statistics: Tensor, z: Tensor, pixels: int) -> list[Tensor]:
    """mean, variance and the rounding error (rest) of the mean, (K,)."""
    merged = machines.ops().bn_merge_statistics(statistics, z.numel() // z.shape[1], pixels)
    return [t.cpu() for t in merged]


def check_statistics(z: Tensor, statistics: Tensor, pixels: int) -> None:
    """Asserts the tolerance rule of float32 for mean and variance of z as stored; stock's are those
    of its batch norm."""
    mean, var, rest = merge(statistics, z, pixels)
    flat = lifted(z).transpose(0, 1).flatten(1)
    want = flat.mean(1), flat.var(1, correction=0)
    theirs = [torch.zeros(z.shape[1]) for _ in range(2)]
    torch.nn.functional.batch_norm(z.float(), *theirs, training=True, momentum=1.0)
    count = flat.shape[1]
    theirs[1] *= (count - 1) / count
    # The error of a sum that cancels is relative to its terms; a variance has a few roundings.
    terms = {"mean": flat.abs().max().item(), "var": 4 * want[1].max().item()}
    close(("mean", "var"), (mean, var), theirs, want, torch.float32, terms)
    whole = mean.double() + rest.double()
    assert measure_error(whole, want[0]).max_abs <= 2.0**-24 * terms["mean"]


@also_on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if " many" not in f" {c}"])
def test_values(case, dtype):
    """z is bitwise equal to conv_bn_relu's result for scale 1 and shift 0."""
    (x, weight, *_), geometry = random(case, dtype)
    number = list(CASES).index(case) + DTYPES.index(dtype)
    many_groups = CASES[case][-1] > 8  # slow
    tile = SMALLEST if many_groups else TILES[number % len(TILES)]
    z, statistics, pixels = convolve(x, weight, *geometry, tile=tile)
    ones, zeros = torch.ones(weight.shape[0]), torch.zeros(weight.shape[0])
    same(z, gemm_cases.run(x, weight, ones, zeros, None, False, *geometry, tile=tile))
    if z.numel() > z.shape[1]:
        check_statistics(z, statistics, pixels)


@also_on_gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", test_hopper.CASES)
def test_values_of_hopper(case, dtype):
    """The same for Hopper's tiles and cases."""
    (x, weight, *_), geometry = test_hopper.operands(case, dtype)
    for i in range(2):
        number = list(test_hopper.CASES).index(case) + 2 * i
        tile = HOPPER[number % len(HOPPER)]
        z, statistics, pixels = convolve(x, weight, *geometry, tile=tile)
        ones, zeros = torch.ones(weight.shape[0]), torch.zeros(weight.shape[0])
        same(z, gemm_cases.run(x, weight, ones, zeros, None, False, *geometry, tile=tile))
        if z.numel() > z.shape[1]:
            check_statistics(z, statistics, pixels)


# Splits for one tile only: the kernel that adds them is the same for all tiles.
RAGGED_RUNS = [
    pytest.param(name, tile, splits, dtype, id=f"{name}, {label(tile)}, {splits} splits, {dtype}")
    for name, tile, splits, dtype in itertools.product(RAGGED, [*TILES, *HOPPER], (1, 2, 3), DTYPES)
    if (splits == 1 or tile == SMALLEST)
    and multiplies(tile, dtype)
    and (name in BEYOND_ONE_TILE if tile.architecture == 80 else name != "two groups")
]


@also_on_gpu
@pytest.mark.parametrize("name, tile, splits, dtype", RAGGED_RUNS)
def test_every_tile(monkeypatch, name, tile, splits, dtype):
    """Partial tiles of pixels and outputs, and groups; sums of small integers are exact."""
    check_exactly(monkeypatch, name, tile, splits, dtype)


@pytest.mark.parametrize("multiprocessors", [1, 2])
@pytest.mark.parametrize("tile", HOPPER, ids=label)
def test_persistent_blocks_with_many_tiles(monkeypatch, tile, multiprocessors):
    """Tiles of one step, so that a warp may overwrite what a slower one still reads."""
    case = ((2, 40, 20, 11), 584, (1, 1), 1, 0, 1, 1)
    monkeypatch.setitem(RAGGED, "many tiles of one step", case)
    with emulation.device(multiprocessors=multiprocessors):
        for number in range(3):
            emulation.seed(number)
            check_exactly(monkeypatch, "many tiles of one step", tile, 1, torch.bfloat16)


def check_exactly(monkeypatch, name, tile, splits, dtype) -> None:
    monkeypatch.setitem(CASES, name, RAGGED[name])
    (x, weight, *_), _ = small_integers(name, dtype)
    geometry = RAGGED[name][3:]
    z, statistics, pixels = convolve(x, weight, *geometry, tile=tile, splits=splits)
    ones, zeros = torch.ones(weight.shape[0]), torch.zeros(weight.shape[0])
    same(z, exact(x, weight, ones, zeros, None, False, *geometry).to(dtype))
    flat = z.float().permute(0, 2, 3, 1).flatten(0, 2)
    for part, fused in zip(flat.split(pixels), statistics.cpu(), strict=True):
        exactly = part.double()
        mean = (fused[0].double() + fused[1].double() / len(part), exactly.mean(0))
        squares = (fused[2].double(), (exactly - exactly.mean(0)).square().sum(0))
        torch.testing.assert_close(fused[0].double(), mean[1], rtol=0, atol=1e-5)
        torch.testing.assert_close(*mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(*squares, rtol=1e-6, atol=1e-6)
    check_statistics(z, statistics, pixels)


# (tile, splits) for each kernel and each assignment of values to threads.
KINDS = [(SMALLEST, 1), (SMALLEST, 2), *((tile, 1) for tile in HOPPER)]
each_kind = pytest.mark.parametrize(
    "tile, splits", KINDS, ids=[f"{label(tile)}, {splits} splits" for tile, splits in KINDS]
)


@also_on_gpu
@pytest.mark.parametrize(
    "dtype, tile, splits",
    [
        pytest.param(dtype, tile, splits, id=f"{label(tile)}, {splits} splits, {dtype}")
        for dtype, (tile, splits) in itertools.product(DTYPES, KINDS)
        if multiplies(tile, dtype)
    ],
)
@pytest.mark.parametrize("offset", [0, 30, 1000])
def test_mean_far_from_zero(dtype, offset, tile, splits):
    """A plain sum of squares would lose the variance: 1000 +- 1 (in 16 bits, rounded). Also with a
    first pixel far from all others."""
    x = torch.cat([randn((3, 8, 12, 11), torch.float32) / 8, torch.ones(3, 8, 12, 11)], 1)
    weight = torch.cat([torch.eye(8) * 8, torch.eye(8) * offset], 1)[:, :, None, None]
    for outlier in (False, True):
        if outlier:
            x[0, :8, 0, 0] = 100.0
        z, statistics, pixels = convolve(
            gemm_cases.to_tf32(x).to(dtype), weight.to(dtype), 1, 0, 1, 1, tile=tile,
            splits=splits,
        )  # fmt: skip
        check_statistics(z, statistics, pixels)
        flat = lifted(z).transpose(0, 1).flatten(1)
        var = merge(statistics, z, pixels)[1].double()
        torch.testing.assert_close(var, flat.var(1, correction=0), rtol=2e-6, atol=0)


@also_on_gpu
@pytest.mark.parametrize("parts", [1, 2, 127, 128, 129, 2000, 17000])
def test_many_parts_are_merged(parts):
    """In one, two and three launches; the last part is partial."""
    K, pixels = (40, 3) if parts < 2000 else (3, 2)
    values = randn((parts * pixels - 1, K), torch.float32) * 0.3 + 5
    statistics = torch.stack([
        torch.stack([p[0], (p - p[0]).sum(0), (p - p.mean(0)).square().sum(0)])
        for p in values.split(pixels)
    ])  # fmt: skip
    merged = machines.ops().bn_merge_statistics(
        machines.to_device(statistics), len(values), pixels
    )  # fmt: skip
    mean, var, _ = (t.cpu().double() for t in merged)
    exactly = values.double()
    torch.testing.assert_close(mean, exactly.mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(var, exactly.var(0, correction=0), rtol=2e-6, atol=0)


@also_on_gpu
@each_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 70])
def test_special_values_stay_in_their_channel(value, at, tile, splits):
    x = randn((1, 16, 9, 10), torch.bfloat16)
    x[0, 3].view(-1)[at] = value
    weight = torch.eye(16, dtype=torch.bfloat16)[:, :, None, None].clone()
    weight[torch.arange(16) != 3, 3] = 0
    x0 = x.clone()
    x0[0, 3] = 0
    one = torch.where(torch.arange(16)[None, :, None, None] == 3, x, x0)
    z = one.clone()
    statistics = torch.zeros(1)
    z, statistics, pixels = convolve(one[:, 3:4], weight[3:4, 3:4], 1, 0, 1, 1, tile=tile,
                                     splits=splits)  # fmt: skip
    mean, var, _ = merge(statistics, z, pixels)
    assert var.isnan().all() and mean.isnan().all() == (value != value)
    if value == value:
        assert mean.item() == value


@pytest.mark.parametrize("splits", [1, 2])
def test_result_does_not_depend_on_thread_order(splits):
    for tile in [*TILES, *HOPPER] if splits == 1 else TILES:
        (x, weight, *_), geometry = random("3x3, stride 2", torch.bfloat16)
        first = convolve(x, weight, *geometry, tile=tile, splits=splits)
        merged = merge(first[1], *first[::2])
        emulation.seed(2)
        second = convolve(x, weight, *geometry, tile=tile, splits=splits)
        assert machines.equal(first[:2], second[:2])
        assert machines.equal(merged, merge(second[1], *second[::2]))


@pytest.mark.parametrize(
    "tile, dtype",
    [
        pytest.param(tile, dtype, id=f"{label(tile)}, {dtype}")
        for tile, dtype in itertools.product([*TILES, *HOPPER], (torch.float16, torch.float32))
        if multiplies(tile, dtype)
    ],
)
def test_no_bank_conflicts(tile, dtype):
    for case in ("3x3", "pointwise"):
        (x, weight, *_), _ = small_integers(case, dtype)
        with emulation.wavefronts() as wavefronts:
            convolve(x, weight, *CASES[case][3:], tile=tile)
        for access in ("async_store", "ldmatrix", "stmatrix", "store", "load"):
            needed, ideal = wavefronts[access]
            # If some lanes of a warp store less, later stores are counted in wrong groups.
            tolerance = 0.05 * ideal if access == "store" else 0
            assert ideal <= needed <= ideal + tolerance, (
                f"{access}: {needed} wavefronts for {ideal}"
            )


# --- applied -------------------------------------------------------------------------------------


@also_on_gpu
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 9, 7), (3, 33, 7, 5), (2, 8, 40, 41)], ids=str)
def test_bn_normalise_matches_bn_add_relu(shape, dtype, layout):
    """With the statistics of bn_add_relu; repeated calls are bitwise equal."""
    x, residual = (machines.to_device(LAYOUTS[layout](randn(shape, dtype))) for _ in range(2))
    weight, bias = (machines.to_device(torch.rand(shape[1]) + 0.5) for _ in range(2))
    for arguments in ((weight, bias, residual, 1e-5, True), (None, None, None, 1e-3, False)):
        want, mean, var = machines.ops().bn_add_relu(x, *arguments)
        rest = torch.zeros_like(mean)
        y = machines.ops().bn_normalise(x, mean, var, rest, *arguments)
        assert y.stride() == x.stride()
        torch.testing.assert_close(y.cpu(), want.cpu(), rtol=2e-7 if dtype == torch.float32 else 0,
                                   atol=1e-6 if dtype == torch.float32 else 0.02)  # fmt: skip
        first = y.clone()
        second = machines.ops().bn_normalise(x, mean, var, rest, *arguments)
        assert machines.equal([second.cpu()], [first.cpu()])


@also_on_gpu
def test_rounding_error_of_the_mean_is_used():
    x = machines.to_device(randn((2, 8, 9, 9), torch.float32) + 2.0**14)
    args = (None, None, None, 1e-5, False)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    rest = torch.full_like(mean, 0.25)
    zero = torch.zeros_like(mean)
    a, b = (machines.ops().bn_normalise(x, mean, var, r, *args).cpu() for r in (zero, rest))
    off = (0.25 / (var + 1e-5).sqrt()).cpu().view(-1, 1, 1)
    torch.testing.assert_close(a - b, off.expand_as(a), rtol=1e-4, atol=1e-5)


@also_on_gpu
def test_errors():
    x = machines.to_device(torch.zeros(1, 8, 2, 2).contiguous(memory_format=torch.channels_last))
    weight = machines.to_device(torch.zeros(8, 1, 1, 8))
    ops = machines.ops()
    hopper = gemm_cases.tiles(90)[0].number
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    with pytest.raises(RuntimeError, match="splits must be 1 for Hopper's"):
        operands = x.half(), weight.half(), x.half()
        ops.convolution_statistics(*operands, *geometry, hopper, 2)
    if machines.skip_reason(90) is None:
        with pytest.raises(RuntimeError, match="takes float16 or bfloat16"):
            ops.convolution_statistics(x, weight, x.clone(), *geometry, hopper, 1)
    with pytest.raises(RuntimeError, match="9 pixels in parts of 4 are not 2 parts"):
        ops.bn_merge_statistics(machines.to_device(torch.zeros(2, 3, 8)), 9, 4)
    with pytest.raises(RuntimeError, match=r"must be a contiguous float32 \(parts, 3, K\)"):
        ops.bn_merge_statistics(machines.to_device(torch.zeros(2, 2, 8)), 8, 4)
    with pytest.raises(RuntimeError, match="bn_normalise: rest"):
        vector = machines.to_device(torch.zeros(8))
        ops.bn_normalise(x, vector, vector, vector[:4], None, None, None, 1e-5, True)


# --- in training ---------------------------------------------------------------------------------


@pytest.fixture
def fused_statistics(monkeypatch):
    """The shapes of the weights of convolutions with fused statistics."""
    shapes = []
    convolve = Cuda.convolve

    def record(self, x, weight, g):
        z, state = convolve(self, x, weight, g)
        if state is not None:
            shapes.append(tuple(weight.shape))
        return z, state

    monkeypatch.setattr(Cuda, "convolve", record)
    assert implicit_gemm.tiles()
    return shapes


def kernel_backend() -> str:
    return "emulated" if machines.emulated() else "native"


def on_device(block: torch.nn.Module, x: Tensor) -> tuple[torch.nn.Module, Tensor]:
    device = "cpu" if machines.emulated() else "cuda"
    return block.to(device), x.detach().to(device).requires_grad_()


@also_on_gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "name",
    ["basic", "basic, projection", "bottleneck, projection", "bottleneck, groups", "plain",
     "basic, padding", "odd channels", "preact, padding"],
)  # fmt: skip
def test_a_block_trains(name, dtype, fused_statistics):
    """Output, gradients and statistics are within the tolerance rule; every supported convolution
    has fused statistics; recomputation is bitwise equal."""
    block, x = on_device(*make(name, dtype))
    dy = torch.randn_like(block(x).detach())
    exact = step(*(copy.deepcopy(block).cpu().double(), x.cpu().double()), dy.cpu().double())
    theirs = stock_step(copy.deepcopy(block), x, dy)
    fused_statistics.clear()
    start = copy.deepcopy(block)
    with fr.use_backend(kernel_backend()):
        mine = step(block, x, dy)
    convolutions = [m for m in block.modules() if isinstance(m, torch.nn.Conv2d)]
    assert "preact" in name or len(fused_statistics) == (0 if "odd" in name else len(convolutions))
    for key, got in mine.items():
        error, other = (measure_error(t, exact[key].cpu()) for t in (got, theirs[key]))
        if key.startswith("d"):  # gradients: a rounding decides the ReLU's mask
            assert error.rms <= 3 * other.rms + 0.1, (key, error, other)
        else:
            limit = 3 * other.max_abs + 4 * torch.finfo(dtype).eps * other.scale
            assert error.max_abs <= limit, (key, error, other)
    for level in ("low", "lower", "minimal"):
        recomputing = copy.deepcopy(start)
        fr.set_activation_memory(recomputing, level)
        with fr.use_backend(kernel_backend()):
            assert machines.equal(
                [t.cpu() for t in step(recomputing, x, dy).values()],
                [t.cpu() for t in mine.values()],
            ), level


@also_on_gpu
def test_running_statistics_are_those_of_z(fused_statistics):
    block, x = on_device(*make("basic", torch.bfloat16))
    with fr.use_backend(kernel_backend()):
        block(x)
    assert len(fused_statistics) == 2
    bn = copy.deepcopy(make("basic", torch.bfloat16)[0]).bn1
    z = torch.nn.functional.conv2d(x.detach().cpu().float(), block.conv1.weight.cpu().float(),
                                   padding=1).bfloat16().float()  # fmt: skip
    mean = 0.9 * bn.running_mean.float() + 0.1 * z.mean((0, 2, 3))
    var = 0.9 * bn.running_var.float() + 0.1 * z.var((0, 2, 3))
    for got, want in ((block.bn1.running_mean, mean), (block.bn1.running_var, var)):
        torch.testing.assert_close(got.cpu().float(), want, rtol=1e-2, atol=1e-2)


def problem_of_block(x: Tensor, weight: Tensor) -> Gemm:
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return Gemm(pixels, *weight.shape, 1, 1, operands_of(x.dtype))


def test_only_measured_winners_are_used_unless_forced(monkeypatch, fused_statistics):
    """As on a GPU: no measurement, another backend is fastest, Hopper's tile is fastest (and built
    or not built), native is fastest."""
    with fr.use_backend("emulated"):
        tiles = implicit_gemm.tiles()
    block, x = make("basic", torch.bfloat16)
    weight = block.conv1.weight
    problem = problem_of_block(x, weight)
    hopper = next(i for i, tile in enumerate(tiles) if tile["architecture"] == 90)
    ours = tuning.Choice("native", CudaConfig(SMALLEST.number), 1e-5)
    rows = {
        "no measurement": ({}, False),
        "another": ({"native": ours, "vendor": tuning.Choice("vendor", None, 1e-6)}, False),
        "hopper": ({"native": ours._replace(config=CudaConfig(hopper))}, True),
        "hopper, not built": (
            {"native": ours._replace(config=CudaConfig(hopper))},
            False,
        ),
        "stem": ({"native": ours._replace(config=CudaConfig(implicit_gemm.STEM))}, False),
        "ours": ({"native": ours, "vendor": tuning.Choice("vendor", None, 1e-4)}, True),
    }
    machines.as_if_on_a_gpu(monkeypatch, ("vendor", "native"))
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    for name, (measured, used) in rows.items():
        monkeypatch.setattr(tuning, "winners", lambda device, m=measured: {problem: m})
        hopper = Target("nvidia", "sm_90" if "not built" in name else "sm_90a")
        monkeypatch.setattr(emulation.Emulated, "target", lambda self, device, t=hopper: t)
        tuning.choice.cache_clear()
        config = CUDA._config(x.detach(), weight, geometry)
        assert (config is not None) == used, name
        assert not used or config == measured["native"].config
    # The same problem with a padding that Hopper's kernel does not support.
    measured, _ = rows["hopper"]
    geometry = Geometry((1, 1), (129, 1), (1, 1), 1)
    H, W = x.shape[2] + 2 * 129 - 2, x.shape[3]
    far = problem._replace(M=x.shape[0] * H * W)
    monkeypatch.setattr(tuning, "winners", lambda device: {far: measured})
    hopper = Target("nvidia", "sm_90a")
    monkeypatch.setattr(emulation.Emulated, "target", lambda self, device: hopper)
    tuning.choice.cache_clear()
    assert CUDA._config(x.detach(), weight, geometry) is None
    with fr.use_backend("emulated"):
        config = CUDA._config(x.detach(), weight, geometry)
    assert implicit_gemm.tiles()[config.tile]["architecture"] == 80
    tuning.choice.cache_clear()


@also_on_gpu
def test_a_network_trains_a_step(fused_statistics):
    """Under autocast, every convolution of the network except the first has fused statistics."""
    device = "cpu" if machines.emulated() else "cuda"
    torch.manual_seed(0)
    net = fr.cifar_resnet(8).train().to(device).to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
    other = copy.deepcopy(net)
    losses = []
    for model, backend in ((net, kernel_backend()), (other, "reference")):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with fr.use_backend(backend):
            for _ in range(2):
                with torch.autocast(device, torch.bfloat16):
                    loss = model(x).float().square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
    assert losses[:2] == pytest.approx(losses[2:], rel=0.02)
    assert len(fused_statistics) == 2 * 6
