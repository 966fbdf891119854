"""A ReLU's mask and the sums of its norm's gradient, taken in the epilogue of a convolution's input
gradient: the CUDA kernels in the emulator, and on a GPU where there is one; the training path that
uses them."""

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
from fused_resnet.kernels import measure, native, registry
from fused_resnet.kernels import problem as gemm
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
from tests.kernels.cuda.test_conv_statistics import HOPPER, RAGGED, label, own, there
from tests.kernels.cuda.test_implicit_gemm import (
    BEYOND_ONE_TILE,
    SMALLEST,
    TILES,
    random,
    small_integers,
)
from tests.ops.test_conv_bn_relu import CASES

on_a_gpu_too = pytest.mark.usefixtures("kernels")
DTYPES = (torch.float16, torch.bfloat16)
# The convolutions that are gradients have no stride.
STRAIGHT = [
    name
    for name, (*_, stride, _, _, groups) in CASES.items()
    if stride == 1 and groups <= 3 and " many" not in f" {name}"
]
STRAIGHT_OF_HOPPER = [name for name, case in test_hopper.CASES.items() if case[3] == 1]


@pytest.fixture(autouse=True)
def same_seed(request):
    if "kernels" in request.fixturenames:
        request.getfixturevalue("kernels")
    machines.seed(1)


class Given(NamedTuple):
    """A norm of C channels and the statistics that it normalised by, float32."""

    mean: Tensor
    var: Tensor
    rest: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def some(C: int) -> Given:
    sign = torch.where(torch.arange(C) % 5 == 4, -1.0, 1.0)
    rest, bias = torch.randn(2, C).unbind()
    return Given(
        torch.randn(C) * 0.3, torch.rand(C) + 0.5, rest * 1e-3, (torch.rand(C) + 0.5) * sign,
        bias * 0.3, 1e-3,
    )  # fmt: skip


def of_integers(C: int) -> Given:
    """Exact in every dtype; where x is the mean, its rest alone decides what the ReLU does."""
    sign = torch.where(torch.arange(C) % 3 == 2, -1.0, 1.0)
    mean = torch.randint(-1, 2, (C,)).float()
    rest = torch.where(torch.arange(C) % 2 == 0, 2.0**-10, -(2.0**-10))
    weight = torch.randint(1, 3, (C,)).float() * sign
    return Given(mean, torch.full((C,), 0.75), rest, weight, None, 0.25)


def gradient(
    dy: Tensor, weight: Tensor, x: Tensor, norm: Given, *geometry, tile: gemm_cases.Tile,
    splits: int = 1,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """dy (N, K, P, Q), weight (C, K / groups, R, S), x (N, C, H, W), all of the convolution that is
    the gradient -> g (N, C, H, W), sums (parts, 2, C) and the pixels of a part, on padded copies
    with NaN around dy, x and g."""
    if (reason := machines.skip_reason(tile.architecture)) is not None:
        pytest.skip(reason)
    _, padding, dilation, groups = pairs(geometry)
    size, C = 16 // dy.element_size(), weight.shape[0]
    dy, _ = guarded(padded(dy, 1, groups, size))
    weight = padded(padded(weight, 1, 1, size), 0, groups, size)
    weight = machines.here(weight.permute(0, 2, 3, 1).contiguous())
    wide = weight.shape[0]
    x, _ = guarded(padded(x, 1, groups, size))
    vectors = [None if t is None else machines.here(padded(t, 0, groups, size)) for t in norm[:5]]
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


def unfused(dy, weight, x, norm: Given, *geometry, tile, splits=1) -> Tensor:
    """The convolution by the same tile, then masked by the ReLU's output."""
    C = weight.shape[0]
    plain = (torch.ones(C), torch.zeros(C), None, False)
    dx = gemm_cases.run(dy, weight, *plain, *geometry, tile=tile, splits=splits)
    vectors = (machines.here(t) for t in norm[:5])
    y = machines.ops().bn_normalise(machines.here(x), *vectors, None, norm.eps, True).cpu()
    return torch.where(y <= 0, torch.zeros_like(dx), dx)


def check(g: Tensor, sums: Tensor, pixels: int, x: Tensor, mean: Tensor, room: float) -> None:
    """Sums of what is stored, to `room` float32 roundings of their terms."""

    def flat(t: Tensor) -> Tensor:
        return lifted(t).permute(0, 2, 3, 1).flatten(0, 2)

    terms = torch.stack([flat(g), flat(g) * (flat(x) - mean.double())], 1)
    for part, found in zip(terms.split(pixels), sums.double(), strict=True):
        allowed = room * 2.0**-24 * part.abs().sum(0)
        assert ((found - part.sum(0)).abs() <= allowed).all()


def check_case(dy, weight, x, geometry, tile, splits=1) -> None:
    norm = some(weight.shape[0])
    arguments = (dy, weight, x, norm, *geometry)
    g, sums, pixels = gradient(*arguments, tile=tile, splits=splits)
    same(g, unfused(*arguments, tile=tile, splits=splits))
    assert ((g == 0).any() and (g != 0).any()) or g.numel() < 200
    check(g, sums, pixels, x, norm.mean, 24)


@on_a_gpu_too
@pytest.mark.parametrize("case", STRAIGHT)
def test_values(case):
    """g has the bits of the same tile's convolution and the forward pass's ReLU; sums are of it."""
    number = STRAIGHT.index(case)
    (dy, weight, *_, x), geometry = random(case, DTYPES[number % 2])
    check_case(dy, weight, x, geometry, TILES[number % len(TILES)])


@on_a_gpu_too
@pytest.mark.parametrize("case", STRAIGHT_OF_HOPPER)
def test_values_of_hopper(case):
    number = STRAIGHT_OF_HOPPER.index(case)
    (dy, weight, *_, x), geometry = test_hopper.operands(case, DTYPES[number % 2])
    for i in (0, 2):
        check_case(dy, weight, x, geometry, HOPPER[(number + i) % len(HOPPER)])


# By splits, once: the kernel that adds parts up is the same for all tiles.
RAGGED_RUNS = [
    pytest.param(name, tile, splits, id=f"{name}, {label(tile)}, {splits} splits")
    for name, tile, splits in itertools.product(RAGGED, [*TILES, *HOPPER], (1, 2, 3))
    if (splits == 1 or tile == SMALLEST)
    and (name in BEYOND_ONE_TILE if tile.architecture == 80 else name != "two groups")
]


@on_a_gpu_too
@pytest.mark.parametrize("name, tile, splits", RAGGED_RUNS)
def test_every_tile(monkeypatch, name, tile, splits):
    """Ragged in pixels and channels, groups too; small integers: sums are exact."""
    check_exactly(monkeypatch, name, RAGGED[name], tile, splits, DTYPES[tile.number % 2])


@pytest.mark.parametrize("tile", HOPPER, ids=label)
def test_blocks_stay_for_many_tiles(monkeypatch, tile):
    """Of one step, so that a warp may run ahead of another that still reads what it writes."""
    case = ((2, 40, 20, 11), 584, (1, 1), 1, 0, 1, 1)
    for multiprocessors, number in itertools.product((1, 2), range(2)):
        with emulation.device(multiprocessors=multiprocessors):
            emulation.seed(number)
            check_exactly(monkeypatch, "many tiles of one step", case, tile, 1, torch.bfloat16)


def check_exactly(monkeypatch, name, case, tile, splits, dtype) -> None:
    monkeypatch.setitem(CASES, name, case)
    (dy, weight, *_), _ = small_integers(name, dtype)
    shape = F.conv2d(dy.float(), weight.float(), None, *case[3:]).shape
    x, norm = integers(shape, dtype), of_integers(weight.shape[0])
    g, sums, pixels = gradient(dy, weight, x, norm, *case[3:], tile=tile, splits=splits)
    dx = F.conv2d(dy.double(), weight.double(), None, *case[3:]).to(dtype)
    mean, rest, sign = (t.view(-1, 1, 1) for t in (norm.mean, norm.rest, norm.weight.sign()))
    let_through = ((x.float() - mean) - rest) * sign > 0
    same(g, torch.where(let_through, dx, torch.zeros_like(dx)))
    check(g, sums, pixels, x, norm.mean, 0)


# A tile and splits: each of the kernels, and of the shares that a thread has.
KINDS = [(SMALLEST, 1), (SMALLEST, 2), *((tile, 1) for tile in HOPPER)]
each_kind = pytest.mark.parametrize(
    "tile, splits", KINDS, ids=[f"{label(tile)}, {splits} splits" for tile, splits in KINDS]
)


@on_a_gpu_too
@each_kind
def test_special_values(tile, splits):
    """NaN and infinities in dy, x and the statistics: g and the sums are what the pass of its own
    makes of them, and stay in their channel. A y that is rounded to zero lets nothing through."""
    eye = torch.eye(8, dtype=torch.float16)[:, :, None, None].repeat(3, 1, 1, 1)
    dy, x = (randn((1, 24, 9, 10), torch.float16) for _ in range(2))
    norm = some(24)
    for c, value in enumerate((float("nan"), float("inf"), -float("inf"), -0.0)):
        dy[0, c].view(-1)[70 + c] = value  # for all of the first group
        x[0, 8 + c].view(-1)[7 + c] = value
    norm.bias[12], norm.mean[16], norm.rest[17] = (float("nan") for _ in range(3))
    norm.var[18], norm.weight[19] = float("inf"), float("inf")
    # 2^-26 is zero in float16, 2^-24 is not.
    norm.weight[20], norm.bias[20] = 0.0, 2.0**-26
    norm.weight[21], norm.bias[21] = 0.0, 2.0**-24
    arguments = (dy, eye, x, norm, 1, 0, 1, 3)
    g, sums, _ = gradient(*arguments, tile=tile, splits=splits)
    want = unfused(*arguments, tile=tile, splits=splits)
    same(g, want)
    assert (g[:, 20] == 0).all() and (g[:, 21] != 0).all()
    flat = want.double().transpose(0, 1).flatten(1)
    apart = x.double().transpose(0, 1).flatten(1) - norm.mean.double()[:, None]
    for found, terms in zip(sums.sum(0), (flat, flat * apart), strict=True):
        exactly = terms.sum(1)
        assert torch.equal(found.isnan(), exactly.isnan())
        assert torch.equal(found.isinf(), exactly.isinf())
        finite = exactly.isfinite()
        assert finite[13:16].all() and finite[20:].all()
        torch.testing.assert_close(found.double()[finite], exactly[finite], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tile", [*TILES, *HOPPER], ids=label)
def test_the_order_of_threads_changes_nothing(tile):
    (dy, weight, *_, x), geometry = random("3x3", torch.bfloat16)
    norm = some(weight.shape[0])
    for splits in (1, 2) if tile == SMALLEST else (1,):
        emulation.seed(1)
        first = gradient(dy, weight, x, norm, *geometry, tile=tile, splits=splits)
        emulation.seed(2)
        again = gradient(dy, weight, x, norm, *geometry, tile=tile, splits=splits)
        assert machines.equal(first[:2], again[:2])


@pytest.mark.parametrize("tile", [*TILES, *HOPPER], ids=label)
def test_no_bank_conflicts(tile):
    """Of whole tiles: where some lanes of a warp load or store less, as they store the sums, what
    comes later is counted out of step."""
    dy, x = randn((2, 64, 8, 8), torch.float16), randn((2, 256, 8, 8), torch.float16)
    weight = randn((256, 64, 1, 1), torch.float16)
    with emulation.wavefronts() as found:
        gradient(dy, weight, x, some(256), 1, 0, 1, 1, tile=tile)
    for access in ("async_store", "ldmatrix", "stmatrix", "store", "load"):
        needed, ideal = found[access]
        room = 0.05 * ideal if access == "store" else 0
        assert ideal <= needed <= ideal + room, f"{access}: {needed} wavefronts for {ideal}"


@on_a_gpu_too
def test_errors():
    def last(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return machines.here(torch.zeros(shape, dtype=dtype).to(memory_format=torch.channels_last))

    ops, weight = machines.ops(), machines.here(torch.zeros(8, 1, 1, 8, dtype=torch.float16))
    vector = machines.here(torch.zeros(8))
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
        by_sums(x, x, machines.here(torch.zeros(1, 3, 8)), vector, vector, vector, 1e-5)
    with pytest.raises(RuntimeError, match="x must be of 32 or 16 bits and not empty"):
        sums = machines.here(torch.zeros(1, 2, 8))
        by_sums(x.double(), x.double(), sums, vector, vector, vector, 1e-5)


# --- the second half ------------------------------------------------------------------------------


@on_a_gpu_too
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float32), ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 9, 7), (3, 33, 7, 5), (2, 8, 40, 41)], ids=str)
def test_the_second_half_is_bn_add_relus(poison, shape, dtype, layout):
    """Of the same sums, whoever took them: within the rule, and beside its own backward."""
    dy, x = (LAYOUTS[layout](randn(shape, dtype)) for _ in range(2))
    x = x * 2 + 0.7
    weight = torch.rand(shape[1]) + 0.5
    ops, eps = machines.ops(), 1e-3
    on = [machines.here(t) for t in (dy, x, weight)]
    y, mean, var = ops.bn_add_relu(on[1], on[2], None, None, eps, True)
    g = torch.where(y <= 0, torch.zeros_like(on[0]), on[0])
    terms = [g.double(), g.double() * (on[1].double() - mean.double().view(-1, 1, 1))]
    sums = torch.stack([t.sum((0, 2, 3)) for t in terms])[None].float()
    mine = ops.bn_gradient_by_sums(g, on[1], sums, on[2], mean, var, eps)
    theirs = ops.bn_add_relu_backward(on[0], on[1], y, on[2], mean, var, eps, True, True, False)
    assert mine[0].stride() == on[1].stride()
    saved = map(lifted, (dy, x, y, weight, mean, var))
    exact = reference.bn_add_relu_backward(*saved, eps, True, True, False)
    for got, other, want in zip(mine, theirs[:3], exact[:3], strict=True):
        error, limit = (measure_error(t.cpu(), want) for t in (got, other))
        unit = torch.finfo(got.dtype).eps * want.abs().max().item()
        assert error.max_abs <= limit.max_abs + unit


@on_a_gpu_too
@pytest.mark.parametrize("parts", [1, 2, 127, 128, 129, 2000, 17000])
def test_many_parts_are_added_up(parts):
    """By the gradient's kernel alone, after one launch, after two; integers: exactly."""
    C = 40 if parts < 2000 else 3
    sums = torch.randint(-50, 51, (parts, 2, C)).float()
    g, x = (machines.here(randn((2, C, 3, 5), torch.float32)) for _ in range(2))
    mean, var = machines.here(torch.zeros(C)), machines.here(torch.full((C,), 0.75))
    dx, dweight, dbias = machines.ops().bn_gradient_by_sums(
        g, x, machines.here(sums), None, mean, var, 0.25
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


@on_a_gpu_too
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradients_of_a_unit(name, splits):
    """From the next convolution's output to the norm's input, within the rule."""
    from fused_resnet.kernels.cuda.implicit_gemm import CudaConfig
    from fused_resnet.kernels.training.cuda import CUDA

    K, C, taps, padding, dilation, groups = GEOMETRIES[name]
    g, dtype = Geometry((1, 1), padding, dilation, groups), DTYPES[splits - 1]
    last = torch.channels_last
    x = randn((2, C, 9, 8), dtype).contiguous(memory_format=last)
    weight = randn((K, C // groups, *taps), dtype) / (C * taps[0] * taps[1]) ** 0.5
    given = some(C)._replace(rest=torch.zeros(C))
    where = machines.here
    norm = Norm(where(given.weight), where(given.bias), given.eps)
    y = reference.bn_add_relu(x, given.weight, given.bias, None, given.eps, True)[0]
    dy = randn(F.conv2d(y, weight, None, *g).shape, dtype).contiguous(memory_format=last)
    mean, var = x.float().mean((0, 2, 3)), x.float().var((0, 2, 3), correction=0)
    state = tuple(where(t) for t in (mean, var, given.rest))
    normed = Normed(where(x), norm, state)
    with fr.use_backend(own()):
        y = CUDA.apply(normed, None, True)
        dh, sums = CUDA.relu_gradient_by(
            CudaConfig(SMALLEST.number, splits), where(dy), where(weight), g, normed
        )
        mine = CUDA.norm_gradients_by(sums, dh, y, normed)
    y = y.cpu()

    def chain(dy: Tensor, x: Tensor, y: Tensor, weight: Tensor, *rest: Tensor) -> tuple:
        gradient = torch.ops.aten.convolution_backward(
            dy, y, weight, None, *g[:3], False, [0, 0], groups, [True, False, False]
        )[0]  # fmt: skip
        found = reference.bn_add_relu_backward(gradient, x, y, *rest, given.eps, True, True, False)
        return found[:3]

    operands = (dy, x, y, weight, given.weight, *(t.cpu() for t in state[:2]))
    exact = chain(*map(lifted, operands))
    terms = {"dweight": 64.0, "dbias": 64.0}  # of 144 numbers of about 0.5
    close(("dx", "dweight", "dbias"), [t.cpu() for t in mine], chain(*operands), exact, dtype,
          terms)  # fmt: skip


@pytest.fixture
def taken(monkeypatch):
    """The shapes of weights whose input gradients took a norm's sums."""
    from fused_resnet.kernels.training import cuda as cuda_training

    found = []
    run = cuda_training.Cuda.relu_gradient_by

    def see(self, config, dy, weight, *rest):
        found.append(tuple(weight.shape))
        return run(self, config, dy, weight, *rest)

    monkeypatch.setattr(cuda_training.Cuda, "relu_gradient_by", see)
    return found


# The convolutions of stride 1 that read a ReLU behind a norm with statistics of the kernels' own.
SERVED = {
    "basic": 1, "bottleneck, projection": 1, "bottleneck, groups": 2, "basic, padding": 1,
    "plain": 1, "preact": 1, "preact bottleneck, projection": 1, "odd channels": 0,
}  # fmt: skip


@on_a_gpu_too
@pytest.mark.parametrize("name", SERVED)
def test_a_block_trains(name, taken):
    """Gradients within the rule, and the same bits at every level of what is kept; nothing of
    float32's."""
    dtype = DTYPES[len(name) % 2]
    block, x = there(*make(name, dtype))
    dy = torch.randn_like(block(x).detach())
    exact = step(copy.deepcopy(block).cpu().double(), x.cpu().double(), dy.cpu().double())
    theirs = stock_step(copy.deepcopy(block), x, dy)
    start = copy.deepcopy(block)
    taken.clear()
    with fr.use_backend(own()):
        mine = step(block, x, dy)
    assert len(taken) == SERVED[name]
    for key, got in mine.items():
        error, other = (measure_error(t, exact[key].cpu()) for t in (got, theirs[key]))
        if key.startswith("d"):  # a rounding decides which side of a ReLU a value is on
            assert error.rms <= 3 * other.rms + 0.1, (key, error, other)
    for level in ("low", "lower", "minimal"):
        again = copy.deepcopy(start)
        fr.set_activation_memory(again, level)
        taken.clear()
        with fr.use_backend(own()):
            found = step(again, x, dy)
        assert len(taken) == SERVED[name], level
        assert machines.equal([t.cpu() for t in found.values()], [t.cpu() for t in mine.values()])


def test_float32_and_strides_are_served_by_nobody(taken):
    with fr.use_backend("emulated"):
        block, x = make("basic", torch.float32)
        step(block, x, torch.randn_like(block(x)))
        block, x = make("plain", torch.bfloat16)
        block.conv2.stride = (2, 2)
        step(block, x, torch.randn_like(block(x)))
    assert taken == []


def test_only_measured_winners_of_the_gradient_serve_unforced(monkeypatch):
    """Of the convolution that the gradient is, K and C exchanged: not of the forward one's."""
    from fused_resnet.kernels import tuning
    from fused_resnet.kernels.cuda.implicit_gemm import CudaConfig
    from fused_resnet.kernels.training import cuda as cuda_training

    weight = torch.empty(24, 16, 3, 3)
    dy = torch.empty(2, 24, 9, 7, dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )
    g = Geometry((1, 1), (1, 1), (1, 1), 1)
    vector = torch.zeros(16)
    normed = Normed(torch.empty(2, 16, 9, 7), Norm(None, None, 1e-5), (vector, vector, vector))
    ours = tuning.Choice("native", CudaConfig(SMALLEST.number), 1e-5)
    vendor = tuning.Choice("vendor", None, 1e-6)
    forward = gemm.Problem(2 * 9 * 7, 24, 16, 3, 3, 1, 1, "bfloat16")
    turned = forward._replace(K=16, C=24)
    monkeypatch.setattr(cuda_training.registry, "gpu_kernels", lambda kind: True)
    monkeypatch.setattr(cuda_training.registry, "gpu_conv_backends", lambda: ("vendor", "native"))
    monkeypatch.setattr(registry.gpu_convolution("vendor"), "covers", lambda *_: True)
    monkeypatch.setattr(registry.gpu_convolution("vendor"), "choose", lambda *_: None)
    monkeypatch.setattr(native, "built_for", lambda arch: True)

    def config(measured: Any, normed: Normed = normed, g: Geometry = g) -> Any:
        monkeypatch.setattr(tuning, "winners", lambda device: measured)
        tuning.choice.cache_clear()
        found = cuda_training.CUDA._gradient_config(dy, weight, g, normed)
        tuning.choice.cache_clear()
        return found

    assert config({}) is None and config({forward: {"native": ours}}) is None
    assert config({turned: {"native": ours, "vendor": vendor}}) is None
    measured = {turned: {"native": ours, "vendor": vendor._replace(time_s=1.0)}}
    assert config(measured) == ours.config
    # Statistics of somebody else's, without the mean's rest.
    assert config(measured, normed._replace(state=(vector, vector, None))) is None
    assert config(measured, g=g._replace(stride=(2, 2))) is None


MODELS = ("resnet50", "resnext50_32x4d")


def test_gradients_are_tuned_too():
    """Every convolution of stride 1 of a network as its input gradient, where ours can be one."""

    layers = [layer for name in MODELS for layer in layers_of(name, 2, 64)]
    device, dtype = torch.device("cpu"), torch.bfloat16
    found = measure.problems(layers, device, ("native", "vendor"), dtype)
    forward = {gemm.problem_of(layer, dtype) for layer in layers}
    want = set()
    for (N, C, H, W), (K, each, R, S), _, geometry, groups in layers:
        if geometry.stride == (1, 1) and not (each % 8 or K // groups % 8):
            want.add(gemm.Problem(N * H * W, C, K // groups, R, S, groups, 1, "bfloat16"))
            assert each == C // groups
    assert set(found) == forward | want and want - forward
    for problem, layer in found.items():
        x, weight = (torch.empty(shape, device="meta") for shape in layer[:2])
        assert F.conv2d(x, weight, None, *layer.geometry, layer.groups).shape == layer.y_shape
        assert gemm.problem_of(layer, dtype) == problem
    for backends, kind in ((("vendor",), dtype), (("native",), torch.float32)):
        assert set(measure.problems(layers, device, backends, kind)) == {
            gemm.problem_of(layer, kind) for layer in layers
        }


@on_a_gpu_too
def test_a_network_trains_a_step(taken):
    """Under autocast: the second convolution of every block."""
    device = "cpu" if machines.emulated() else "cuda"
    torch.manual_seed(0)
    net = fr.cifar_resnet(8).train().to(device).to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
    grads = []
    for backend in (own(), "reference"):
        net.zero_grad()
        with fr.use_backend(backend), torch.autocast(device, torch.float16):
            net(x).float().square().mean().backward()
        grads.append({name: p.grad.cpu().clone() for name, p in net.named_parameters()})
    assert taken == [(64, 64, 3, 3), (32, 32, 3, 3), (16, 16, 3, 3)]
    for name, got in grads[0].items():
        want = grads[1][name]
        assert (got - want).norm() <= 0.1 * want.norm() + 1e-6, name
