"""The ReLU's mask and the sums of the batch norm's gradient, computed in the epilogue of a
convolution's input gradient: the CUDA kernels in the emulator and, if available, on a GPU; and the
training path that uses them."""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_resnet as fr
from fused_resnet.bench.layers import layers_of
from fused_resnet.kernels import measure, registry, tuning
from fused_resnet.kernels.cuda.implicit_gemm import CudaConfig
from fused_resnet.kernels.problem import Gemm
from fused_resnet.kernels.training.cuda import CUDA, Cuda
from fused_resnet.kernels.training.protocol import Geometry, Norm, Normed
from fused_resnet.ops import reference
from fused_resnet.tolerance import measure_error
from tests.emulator import emulation
from tests.fusion.training.training_helpers import make, step, stock_step
from tests.kernels.cuda import machines
from tests.ops.op_cases import DENSE, LAYOUTS, close, integers, lifted, randn, same

if emulation.unavailable() is not None:
    pytest.skip(emulation.unavailable(), allow_module_level=True)

from tests.kernels.cuda import gemm_cases, test_hopper
from tests.kernels.cuda.gemm_cases import GUARD, guarded, padded, pairs
from tests.kernels.cuda.test_conv_statistics import (
    HOPPER,
    RAGGED,
    kernel_backend,
    label,
    on_device,
)
from tests.kernels.cuda.test_implicit_gemm import (
    BEYOND_ONE_TILE,
    SMALLEST,
    TILES,
    random,
    small_integers,
)
from tests.ops.test_conv_bn_relu import CASES

also_on_gpu = pytest.mark.usefixtures("kernels")
DTYPES = (torch.float16, torch.bfloat16)
# The convolutions that are input gradients have stride 1.
STRIDE_1 = [
    name
    for name, (*_, stride, _, _, groups) in CASES.items()
    if stride == 1 and groups <= 3 and " many" not in f" {name}"
]
HOPPER_STRIDE_1 = [name for name, case in test_hopper.CASES.items() if case[3] == 1]


@pytest.fixture(autouse=True)
def same_seed(request):
    if "kernels" in request.fixturenames:
        request.getfixturevalue("kernels")
    machines.seed(1)


class NormState(NamedTuple):
    """A norm of C channels and its batch statistics, float32; rest: the mean's rounding error."""

    mean: Tensor
    var: Tensor
    rest: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def random_norm(C: int) -> NormState:
    sign = torch.where(torch.arange(C) % 5 == 4, -1.0, 1.0)
    rest, bias = torch.randn(2, C).unbind()
    return NormState(
        torch.randn(C) * 0.3, torch.rand(C) + 0.5, rest * 1e-3, (torch.rand(C) + 0.5) * sign,
        bias * 0.3, 1e-3,
    )  # fmt: skip


def integer_norm(C: int) -> NormState:
    """Exact in every dtype; where x equals the mean, only `rest` decides the ReLU's mask."""
    sign = torch.where(torch.arange(C) % 3 == 2, -1.0, 1.0)
    mean = torch.randint(-1, 2, (C,)).float()
    rest = torch.where(torch.arange(C) % 2 == 0, 2.0**-10, -(2.0**-10))
    weight = torch.randint(1, 3, (C,)).float() * sign
    return NormState(mean, torch.full((C,), 0.75), rest, weight, None, 0.25)


def gradient(
    dy: Tensor, weight: Tensor, x: Tensor, norm: NormState, *geometry, tile: gemm_cases.Tile,
    splits: int = 1,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """dy (N, K, P, Q), weight (C, K / groups, R, S), x (N, C, H, W) and the geometry of the
    convolution that computes the input gradient -> g (N, C, H, W), sums (parts, 2, C) and the
    number of pixels per part, on padded copies with NaN around dy, x and g."""
    if (reason := machines.skip_reason(tile.architecture)) is not None:
        pytest.skip(reason)
    _, padding, dilation, groups = pairs(geometry)
    size, C = 16 // dy.element_size(), weight.shape[0]
    dy, _ = guarded(padded(dy, 1, groups, size))
    weight = padded(padded(weight, 1, 1, size), 0, groups, size)
    weight = machines.to_device(weight.permute(0, 2, 3, 1).contiguous())
    wide = weight.shape[0]
    x, _ = guarded(padded(x, 1, groups, size))
    vectors = [
        None if t is None else machines.to_device(padded(t, 0, groups, size)) for t in norm[:5]
    ]
    g, memory = guarded(torch.full_like(x, float("nan")))
    sums = machines.ops().convolution_gradient_sums(
        dy, weight, g, x, *vectors, norm.eps, padding, dilation, groups, tile.number, splits
    )
    assert memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all(), "written outside g"
    M = g.numel() // wide
    halves = tile.architecture == 90 and tile.warps == 8
    pixels = 64 if splits > 1 else tile.block_m // (1 + halves)
    assert sums.shape == (-(-M // pixels), 2, wide)
    g = g.cpu().unflatten(1, (groups, -1))[:, :, : C // groups].flatten(1, 2)
    of_group = sums.cpu().unflatten(2, (groups, -1))[..., : C // groups]
    return g, of_group.flatten(2, 3), pixels


def unfused(dy, weight, x, norm: NormState, *geometry, tile, splits=1) -> Tensor:
    """The convolution by the same tile, then a separate mask by the ReLU's output."""
    C = weight.shape[0]
    plain = (torch.ones(C), torch.zeros(C), None, False)
    dx = gemm_cases.run(dy, weight, *plain, *geometry, tile=tile, splits=splits)
    vectors = (machines.to_device(t) for t in norm[:5])
    y = machines.ops().bn_normalise(machines.to_device(x), *vectors, None, norm.eps, True).cpu()
    return torch.where(y <= 0, torch.zeros_like(dx), dx)


def check(g: Tensor, sums: Tensor, pixels: int, x: Tensor, mean: Tensor, roundings: float) -> None:
    """Asserts the sums of g as stored, within `roundings` float32 roundings of their terms."""

    def flat(t: Tensor) -> Tensor:
        return lifted(t).permute(0, 2, 3, 1).flatten(0, 2)

    terms = torch.stack([flat(g), flat(g) * (flat(x) - mean.double())], 1)
    for part, fused in zip(terms.split(pixels), sums.double(), strict=True):
        allowed = roundings * 2.0**-24 * part.abs().sum(0)
        assert ((fused - part.sum(0)).abs() <= allowed).all()


def check_case(dy, weight, x, geometry, tile, splits=1) -> None:
    norm = random_norm(weight.shape[0])
    arguments = (dy, weight, x, norm, *geometry)
    g, sums, pixels = gradient(*arguments, tile=tile, splits=splits)
    same(g, unfused(*arguments, tile=tile, splits=splits))
    assert ((g == 0).any() and (g != 0).any()) or g.numel() < 200
    check(g, sums, pixels, x, norm.mean, 24)


@also_on_gpu
@pytest.mark.parametrize("case", STRIDE_1)
def test_values(case):
    """g is bitwise equal to the same tile's convolution with the forward mask; sums are of g."""
    number = STRIDE_1.index(case)
    (dy, weight, *_, x), geometry = random(case, DTYPES[number % 2])
    check_case(dy, weight, x, geometry, TILES[number % len(TILES)])


@also_on_gpu
@pytest.mark.parametrize("case", HOPPER_STRIDE_1)
def test_values_of_hopper(case):
    number = HOPPER_STRIDE_1.index(case)
    (dy, weight, *_, x), geometry = test_hopper.operands(case, DTYPES[number % 2])
    for i in (0, 2):
        check_case(dy, weight, x, geometry, HOPPER[(number + i) % len(HOPPER)])


# Splits for one tile only: the kernel that adds them is the same for all tiles.
RAGGED_RUNS = [
    pytest.param(name, tile, splits, id=f"{name}, {label(tile)}, {splits} splits")
    for name, tile, splits in itertools.product(RAGGED, [*TILES, *HOPPER], (1, 2, 3))
    if (splits == 1 or tile == SMALLEST)
    and (name in BEYOND_ONE_TILE if tile.architecture == 80 else name != "two groups")
]


@also_on_gpu
@pytest.mark.parametrize("name, tile, splits", RAGGED_RUNS)
def test_every_tile(monkeypatch, name, tile, splits):
    """Partial tiles of pixels and channels, and groups; sums of small integers are exact."""
    check_exactly(monkeypatch, name, RAGGED[name], tile, splits, DTYPES[tile.number % 2])


@pytest.mark.parametrize("tile", HOPPER, ids=label)
def test_persistent_blocks_with_many_tiles(monkeypatch, tile):
    """Tiles of one step, so that a warp may overwrite what a slower one still reads."""
    case = ((2, 40, 20, 11), 584, (1, 1), 1, 0, 1, 1)
    for multiprocessors, number in itertools.product((1, 2), range(2)):
        with emulation.device(multiprocessors=multiprocessors):
            emulation.seed(number)
            check_exactly(monkeypatch, "many tiles of one step", case, tile, 1, torch.bfloat16)


def check_exactly(monkeypatch, name, case, tile, splits, dtype) -> None:
    monkeypatch.setitem(CASES, name, case)
    (dy, weight, *_), _ = small_integers(name, dtype)
    shape = F.conv2d(dy.float(), weight.float(), None, *case[3:]).shape
    x, norm = integers(shape, dtype), integer_norm(weight.shape[0])
    g, sums, pixels = gradient(dy, weight, x, norm, *case[3:], tile=tile, splits=splits)
    dx = F.conv2d(dy.double(), weight.double(), None, *case[3:]).to(dtype)
    mean, rest, sign = (t.view(-1, 1, 1) for t in (norm.mean, norm.rest, norm.weight.sign()))
    positive = ((x.float() - mean) - rest) * sign > 0
    same(g, torch.where(positive, dx, torch.zeros_like(dx)))
    check(g, sums, pixels, x, norm.mean, 0)


# (tile, splits) for each kernel and each assignment of values to threads.
KINDS = [(SMALLEST, 1), (SMALLEST, 2), *((tile, 1) for tile in HOPPER)]
each_kind = pytest.mark.parametrize(
    "tile, splits", KINDS, ids=[f"{label(tile)}, {splits} splits" for tile, splits in KINDS]
)


@also_on_gpu
@each_kind
def test_special_values(tile, splits):
    """NaN and infinities in dy, x and the statistics stay in their channel; g and the sums equal
    those of the separate pass. Where y rounds to zero, g is 0."""
    eye = torch.eye(8, dtype=torch.float16)[:, :, None, None].repeat(3, 1, 1, 1)
    dy, x = (randn((1, 24, 9, 10), torch.float16) for _ in range(2))
    norm = random_norm(24)
    for c, value in enumerate((float("nan"), float("inf"), -float("inf"), -0.0)):
        dy[0, c].view(-1)[70 + c] = value  # affects all of the first group
        x[0, 8 + c].view(-1)[7 + c] = value
    norm.bias[12], norm.mean[16], norm.rest[17] = (float("nan") for _ in range(3))
    norm.var[18], norm.weight[19] = float("inf"), float("inf")
    # 2^-26 rounds to zero in float16, 2^-24 does not.
    norm.weight[20], norm.bias[20] = 0.0, 2.0**-26
    norm.weight[21], norm.bias[21] = 0.0, 2.0**-24
    arguments = (dy, eye, x, norm, 1, 0, 1, 3)
    g, sums, _ = gradient(*arguments, tile=tile, splits=splits)
    want = unfused(*arguments, tile=tile, splits=splits)
    same(g, want)
    assert (g[:, 20] == 0).all() and (g[:, 21] != 0).all()
    flat = want.double().transpose(0, 1).flatten(1)
    centred = x.double().transpose(0, 1).flatten(1) - norm.mean.double()[:, None]
    for fused, terms in zip(sums.sum(0), (flat, flat * centred), strict=True):
        exactly = terms.sum(1)
        assert torch.equal(fused.isnan(), exactly.isnan())
        assert torch.equal(fused.isinf(), exactly.isinf())
        finite = exactly.isfinite()
        assert finite[13:16].all() and finite[20:].all()
        torch.testing.assert_close(fused.double()[finite], exactly[finite], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tile", [*TILES, *HOPPER], ids=label)
def test_result_does_not_depend_on_thread_order(tile):
    (dy, weight, *_, x), geometry = random("3x3", torch.bfloat16)
    norm = random_norm(weight.shape[0])
    for splits in (1, 2) if tile == SMALLEST else (1,):
        emulation.seed(1)
        first = gradient(dy, weight, x, norm, *geometry, tile=tile, splits=splits)
        emulation.seed(2)
        second = gradient(dy, weight, x, norm, *geometry, tile=tile, splits=splits)
        assert machines.equal(first[:2], second[:2])


@pytest.mark.parametrize("tile", [*TILES, *HOPPER], ids=label)
def test_no_bank_conflicts(tile):
    """With full tiles only: if some lanes of a warp access less, as when storing the sums, later
    accesses are counted in wrong groups."""
    dy, x = randn((2, 64, 8, 8), torch.float16), randn((2, 256, 8, 8), torch.float16)
    weight = randn((256, 64, 1, 1), torch.float16)
    with emulation.wavefronts() as wavefronts:
        gradient(dy, weight, x, random_norm(256), 1, 0, 1, 1, tile=tile)
    for access in ("async_store", "ldmatrix", "stmatrix", "store", "load"):
        needed, ideal = wavefronts[access]
        tolerance = 0.05 * ideal if access == "store" else 0
        assert ideal <= needed <= ideal + tolerance, f"{access}: {needed} wavefronts for {ideal}"


@also_on_gpu
def test_errors():
    def last(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return machines.to_device(
            torch.zeros(shape, dtype=dtype).to(memory_format=torch.channels_last)
        )

    ops, weight = machines.ops(), machines.to_device(torch.zeros(8, 1, 1, 8, dtype=torch.float16))
    vector = machines.to_device(torch.zeros(8))
    rest = (1e-5, [0, 0], [1, 1], 1, SMALLEST.number, 1)
    x = last(1, 8, 2, 3)
    run, by_sums = ops.convolution_gradient_sums, ops.bn_gradient_by_sums
    with pytest.raises(RuntimeError, match="dy must be bfloat16 or float16, got float32"):
        wide = x.float()
        run(wide, weight.float(), wide, wide, *[vector] * 5, *rest)
    with pytest.raises(RuntimeError, match="x has a wrong shape"):
        run(x, weight, x.clone(), last(1, 8, 3, 2), *[vector] * 5, *rest)
    with pytest.raises(RuntimeError, match=r"rest must be float32 of shape \(8,\)"):
        run(x, weight, x.clone(), x, vector, vector, vector[:4], vector, vector, *rest)
    with pytest.raises(RuntimeError, match=r"sums must be a contiguous float32 \(parts, 2, 8\)"):
        by_sums(x, x, machines.to_device(torch.zeros(1, 3, 8)), vector, vector, vector, 1e-5)
    with pytest.raises(RuntimeError, match="x must be of 32 or 16 bits and not empty"):
        sums = machines.to_device(torch.zeros(1, 2, 8))
        by_sums(x.double(), x.double(), sums, vector, vector, vector, 1e-5)


# --- the norm's gradient from the sums ------------------------------------------------------------


@also_on_gpu
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float32), ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 9, 7), (3, 33, 7, 5), (2, 8, 40, 41)], ids=str)
def test_gradient_by_sums_matches_bn_add_relu_backward(poison, shape, dtype, layout):
    """From separately computed sums: the error is at most one rounding above that of
    bn_add_relu_backward."""
    dy, x = (LAYOUTS[layout](randn(shape, dtype)) for _ in range(2))
    x = x * 2 + 0.7
    weight = torch.rand(shape[1]) + 0.5
    ops, eps = machines.ops(), 1e-3
    moved = [machines.to_device(t) for t in (dy, x, weight)]
    y, mean, var = ops.bn_add_relu(moved[1], moved[2], None, None, eps, True)
    g = torch.where(y <= 0, torch.zeros_like(moved[0]), moved[0])
    terms = [g.double(), g.double() * (moved[1].double() - mean.double().view(-1, 1, 1))]
    sums = torch.stack([t.sum((0, 2, 3)) for t in terms])[None].float()
    mine = ops.bn_gradient_by_sums(g, moved[1], sums, moved[2], mean, var, eps)
    theirs = ops.bn_add_relu_backward(
        moved[0], moved[1], y, moved[2], mean, var, eps, True, True, False
    )
    assert mine[0].stride() == moved[1].stride()
    saved = map(lifted, (dy, x, y, weight, mean, var))
    exact = reference.bn_add_relu_backward(*saved, eps, True, True, False)
    for got, other, want in zip(mine, theirs[:3], exact[:3], strict=True):
        error, limit = (measure_error(t.cpu(), want) for t in (got, other))
        unit = torch.finfo(got.dtype).eps * want.abs().max().item()
        assert error.max_abs <= limit.max_abs + unit


@also_on_gpu
@pytest.mark.parametrize("parts", [1, 2, 127, 128, 129, 2000, 17000])
def test_many_parts_are_added_up(parts):
    """In the gradient's kernel, after one launch, after two; sums of integers are exact."""
    C = 40 if parts < 2000 else 3
    sums = torch.randint(-50, 51, (parts, 2, C)).float()
    g, x = (machines.to_device(randn((2, C, 3, 5), torch.float32)) for _ in range(2))
    mean, var = machines.to_device(torch.zeros(C)), machines.to_device(torch.full((C,), 0.75))
    dx, dweight, dbias = machines.ops().bn_gradient_by_sums(
        g, x, machines.to_device(sums), None, mean, var, 0.25
    )
    same(torch.stack([dbias.cpu(), dweight.cpu()]), sums.sum(0))
    sum_g, sum_gx = (t.view(-1, 1, 1) / 30 for t in sums.double().sum(0))
    close(("dx",), [dx.cpu()], [dx.cpu()], [lifted(g) - sum_g - lifted(x) * sum_gx], torch.float32,
          {"dx": 8 * float(sum_gx.abs().max() * lifted(x).abs().max())})  # fmt: skip


# --- in training ----------------------------------------------------------------------------------


# dy's channels, x's, taps, padding, dilation, groups
GEOMETRIES = {
    "pointwise": (24, 16, (1, 1), (0, 0), (1, 1), 1),
    "3x3": (16, 24, (3, 3), (1, 1), (1, 1), 1),
    "asymmetric, dilated": (16, 8, (3, 2), (2, 0), (2, 1), 1),
    "groups": (32, 48, (3, 3), (1, 1), (1, 1), 2),
    "no padding": (8, 16, (2, 3), (0, 0), (1, 1), 1),
}


@also_on_gpu
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradients_of_a_unit(name, splits):
    """From the next convolution's output to the norm's input, within the tolerance rule."""
    K, C, taps, padding, dilation, groups = GEOMETRIES[name]
    g, dtype = Geometry((1, 1), padding, dilation, groups), DTYPES[splits - 1]
    last = torch.channels_last
    x = randn((2, C, 9, 8), dtype).contiguous(memory_format=last)
    weight = randn((K, C // groups, *taps), dtype) / (C * taps[0] * taps[1]) ** 0.5
    norm_state = random_norm(C)._replace(rest=torch.zeros(C))
    move = machines.to_device
    norm = Norm(move(norm_state.weight), move(norm_state.bias), norm_state.eps)
    y = reference.bn_add_relu(x, norm_state.weight, norm_state.bias, None, norm_state.eps, True)[0]
    dy = randn(F.conv2d(y, weight, None, *g).shape, dtype).contiguous(memory_format=last)
    mean, var = x.float().mean((0, 2, 3)), x.float().var((0, 2, 3), correction=0)
    state = tuple(move(t) for t in (mean, var, norm_state.rest))
    normed = Normed(move(x), norm, state)
    with fr.use_backend(kernel_backend()):
        y = CUDA.apply(normed, None, True)
        dh, sums = CUDA.relu_gradient_with_config(
            CudaConfig(SMALLEST.number, splits), move(dy), move(weight), g, normed
        )
        mine = CUDA.norm_gradients_from_sums(sums, dh, y, normed)
    y = y.cpu()

    def chain(dy: Tensor, x: Tensor, y: Tensor, weight: Tensor, *rest: Tensor) -> tuple:
        gradient = torch.ops.aten.convolution_backward(
            dy, y, weight, None, *g[:3], False, [0, 0], groups, [True, False, False]
        )[0]  # fmt: skip
        return reference.bn_add_relu_backward(
            gradient, x, y, *rest, norm_state.eps, True, True, False
        )[:3]  # fmt: skip

    operands = (dy, x, y, weight, norm_state.weight, *(t.cpu() for t in state[:2]))
    exact = chain(*map(lifted, operands))
    terms = {"dweight": 64.0, "dbias": 64.0}  # sums of 144 values of about 0.5
    close(("dx", "dweight", "dbias"), [t.cpu() for t in mine], chain(*operands), exact, dtype,
          terms)  # fmt: skip


@pytest.fixture
def fused_gradients(monkeypatch):
    """The shapes of the weights of input gradients with fused sums."""
    shapes = []
    run = Cuda.relu_gradient_with_config

    def record(self, config, dy, weight, *rest):
        shapes.append(tuple(weight.shape))
        return run(self, config, dy, weight, *rest)

    monkeypatch.setattr(Cuda, "relu_gradient_with_config", record)
    return shapes


# The number of convolutions of stride 1 whose input is the ReLU of a norm with fused statistics.
FUSED = {
    "basic": 1, "bottleneck, projection": 1, "bottleneck, groups": 2, "basic, padding": 1,
    "plain": 1, "preact": 1, "preact bottleneck, projection": 1, "odd channels": 0,
}  # fmt: skip


@also_on_gpu
@pytest.mark.parametrize("name", FUSED)
def test_a_block_trains(name, fused_gradients):
    """Gradients are within the tolerance rule and bitwise equal at every level of activation
    memory."""
    dtype = DTYPES[len(name) % 2]
    block, x = on_device(*make(name, dtype))
    dy = torch.randn_like(block(x).detach())
    exact = step(copy.deepcopy(block).cpu().double(), x.cpu().double(), dy.cpu().double())
    theirs = stock_step(copy.deepcopy(block), x, dy)
    start = copy.deepcopy(block)
    fused_gradients.clear()
    with fr.use_backend(kernel_backend()):
        mine = step(block, x, dy)
    assert len(fused_gradients) == FUSED[name]
    for key, got in mine.items():
        error, other = (measure_error(t, exact[key].cpu()) for t in (got, theirs[key]))
        if key.startswith("d"):  # a rounding decides the ReLU's mask
            assert error.rms <= 3 * other.rms + 0.1, (key, error, other)
    for level in ("low", "lower", "minimal"):
        recomputing = copy.deepcopy(start)
        fr.set_activation_memory(recomputing, level)
        fused_gradients.clear()
        with fr.use_backend(kernel_backend()):
            recomputed = step(recomputing, x, dy)
        assert len(fused_gradients) == FUSED[name], level
        assert machines.equal(
            [t.cpu() for t in recomputed.values()], [t.cpu() for t in mine.values()]
        )


def test_float32_and_strides_are_not_fused(fused_gradients):
    with fr.use_backend("emulated"):
        block, x = make("basic", torch.float32)
        step(block, x, torch.randn_like(block(x)))
        block, x = make("plain", torch.bfloat16)
        block.conv2.stride = (2, 2)
        step(block, x, torch.randn_like(block(x)))
    assert fused_gradients == []


def test_only_measured_winners_of_the_gradient_are_used_unless_forced(monkeypatch):
    """The measurement of the gradient's problem (K and C exchanged) counts, not the forward's."""
    weight = torch.empty(24, 16, 3, 3)
    dy = torch.empty(2, 24, 9, 7, dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )
    g = Geometry((1, 1), (1, 1), (1, 1), 1)
    vector = torch.zeros(16)
    normed = Normed(torch.empty(2, 16, 9, 7), Norm(None, None, 1e-5), (vector, vector, vector))
    ours = tuning.Choice("native", CudaConfig(SMALLEST.number), 1e-5)
    vendor = tuning.Choice("vendor", None, 1e-6)
    forward = Gemm(2 * 9 * 7, 24, 16, 3, 3, 1, 1, "bfloat16")
    turned = forward._replace(K=16, C=24)
    machines.as_if_on_a_gpu(monkeypatch, ("vendor", "native"))

    def config(measured: Any, normed: Normed = normed, g: Geometry = g) -> Any:
        monkeypatch.setattr(tuning, "winners", lambda device: measured)
        tuning.choice.cache_clear()
        result = CUDA._gradient_config(dy, weight, g, normed)
        tuning.choice.cache_clear()
        return result

    assert config({}) is None and config({forward: {"native": ours}}) is None
    assert config({turned: {"native": ours, "vendor": vendor}}) is None
    measured = {turned: {"native": ours, "vendor": vendor._replace(time_s=1.0)}}
    assert config(measured) == ours.config
    # Statistics that are not fused have no rest.
    assert config(measured, normed._replace(state=(vector, vector, None))) is None
    assert config(measured, g=g._replace(stride=(2, 2))) is None


MODELS = ("resnet50", "resnext50_32x4d")


def test_gradients_are_tuned():
    """The input gradient of every convolution of stride 1 of a network, if native supports it."""
    emulation.load()
    device, dtype = torch.device("cpu"), torch.bfloat16
    layers = [layer for name in MODELS for layer in layers_of(name, 2, dtype, 64)]
    native, vendor = registry.provider("emulated", "cpu"), registry.provider("vendor", "cuda")
    problems = measure.problems(layers, device, (native, vendor))
    forward = {layer.gemm() for layer in layers}
    want = set()
    for layer in layers:
        (N, C, H, W), (K, each, R, S) = layer.x_shape, layer.weight_shape
        groups = layer.geometry.groups
        if layer.geometry.stride == (1, 1) and not (each % 8 or K // groups % 8):
            want.add(Gemm(N * H * W, C, K // groups, R, S, groups, 1, "bfloat16"))
            assert each == C // groups
    assert {problem.gemm() for problem in problems} == forward | want and want - forward
    assert len(problems) == len(forward | want)
    for problem in problems:
        shapes = (problem.x_shape, problem.weight_shape)
        x, weight = (torch.empty(shape, device="meta") for shape in shapes)
        assert F.conv2d(x, weight, None, *problem.geometry).shape == problem.y_shape
    for backend, kind in ((vendor, dtype), (native, torch.float32)):
        of_kind = [layer._replace(dtype=kind) for layer in layers]
        found = measure.problems(of_kind, device, (backend,))
        assert {p.gemm() for p in found} == {layer.gemm() for layer in of_kind}


@also_on_gpu
def test_a_network_trains_a_step(fused_gradients):
    """Under autocast, the second convolution of every block has a fused gradient."""
    device = "cpu" if machines.emulated() else "cuda"
    torch.manual_seed(0)
    net = fr.cifar_resnet(8).train().to(device).to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
    grads = []
    for backend in (kernel_backend(), "reference"):
        net.zero_grad()
        with fr.use_backend(backend), torch.autocast(device, torch.float16):
            net(x).float().square().mean().backward()
        grads.append({name: p.grad.cpu().clone() for name, p in net.named_parameters()})
    assert fused_gradients == [(64, 64, 3, 3), (32, 32, 3, 3), (16, 16, 3, 3)]
    for name, got in grads[0].items():
        want = grads[1][name]
        assert (got - want).norm() <= 0.1 * want.norm() + 1e-6, name
