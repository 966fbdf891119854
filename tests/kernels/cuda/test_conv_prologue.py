"""A norm and a ReLU applied to x in the prologue of a 1x1 convolution: the CUDA kernels in the
emulator, and on a GPU where there is one, against bn_normalise and the same tile's convolution, bit
by bit; the training path that uses them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from tests.emulator import emulation
from tests.fusion.training.training_helpers import make, step
from tests.kernels.cuda import machines
from tests.ops.op_cases import randn

if emulation.unavailable() is not None:
    pytest.skip(emulation.unavailable(), allow_module_level=True)

from tests.kernels.cuda import gemm_cases
from tests.kernels.cuda.gemm_cases import GUARD, Tile, guarded
from tests.kernels.cuda.test_conv_statistics import label, own, there

on_a_gpu_too = pytest.mark.usefixtures("kernels")
HALVES = (torch.float16, torch.bfloat16)
HOPPER = gemm_cases.tiles(90)
TILES = [tile for tile in [*gemm_cases.tiles(80), *HOPPER] if min(tile.block_m, tile.block_n) >= 64]
SMALLEST = [
    min((t for t in TILES if t.architecture == a), key=lambda t: t.block_m * t.block_n)
    for a in (80, 90)
]
each_tile = pytest.mark.parametrize("tile", TILES, ids=label)

# x's (N, C, H, W), K
CASES = {
    "ragged": ((1, 136, 12, 11), 136),  # pixels, outputs and channels over several tiles and steps
    "one step": ((2, 64, 9, 8), 264),
    "less than a step": ((3, 24, 7, 5), 72),
    "long sums": ((1, 328, 5, 4), 64),
}


@pytest.fixture(autouse=True)
def same_seed(request):
    if "kernels" in request.fixturenames:
        request.getfixturevalue("kernels")
    machines.seed(1)


def operands(shape, K: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor]:
    """x, channels_last among NaN; mean, var, rest, norm's weight and bias (C,); weight
    (K, 1, 1, C)."""
    C = shape[1]
    torch.manual_seed(C)
    numbers = [torch.randn(C), torch.rand(C) + 0.1, torch.randn(C) * 1e-3]
    numbers += [torch.randn(C) + 0.5, torch.randn(C)]
    weight = (randn((K, 1, 1, C), torch.float32) / C**0.5).to(dtype)
    return randn(shape, dtype), numbers, weight


def run(
    x: Tensor, numbers: list[Tensor | None], weight: Tensor, tile: Tile, fused: bool
) -> tuple[Tensor, Tensor]:
    """z (N, K, H, W) and its statistics, normalised in the prologue or by bn_normalise before."""
    if (reason := machines.skip_reason(tile.architecture)) is not None:
        pytest.skip(reason)
    ops = machines.ops()
    (x, _), numbers, weight = guarded(x), [machines.here(t) for t in numbers], machines.here(weight)
    mean, var, rest, scale, bias = numbers
    N, _, H, W = x.shape
    z, memory = guarded(x.new_full((N, weight.shape[0], H, W), float("nan")).cpu())
    if fused:
        statistics, pixels = ops.normalised_convolution_statistics(
            x, mean, var, rest, scale, bias, 1e-3, weight, z, tile.number
        )
    else:
        a = ops.bn_normalise(x, mean, var, rest, scale, bias, None, 1e-3, True)
        statistics, pixels = ops.convolution_statistics(
            a, weight, z, [1, 1], [0, 0], [1, 1], 1, tile.number, 1
        )
    assert memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all(), "written outside z"
    assert statistics.shape == (-(-N * H * W // pixels), 3, weight.shape[0])
    return z.cpu(), statistics.cpu()


def check(*arguments) -> tuple[Tensor, Tensor]:
    found, want = run(*arguments, fused=True), run(*arguments, fused=False)
    assert machines.equal(found, want)
    return found


# --- bits ----------------------------------------------------------------------------------------


@on_a_gpu_too
@each_tile
@pytest.mark.parametrize("case", CASES)
def test_the_bits_of_one_after_the_other(case, tile):
    dtype = HALVES[(list(CASES).index(case) + TILES.index(tile)) % 2]
    x, numbers, weight = operands(*CASES[case], dtype)
    z, _ = check(x, numbers, weight, tile)
    assert z.isfinite().all()
    # And of the formula, to what one rounding of an activation makes of a sum.
    mean, var, rest, scale, bias = (t.double().view(-1, 1, 1) for t in numbers)
    a = ((x.double() - mean - rest) * scale / (var + 1e-3).sqrt() + bias).relu()
    want = torch.nn.functional.conv2d(a, weight.permute(0, 3, 1, 2).double())
    room = 4 * torch.finfo(dtype).eps * a.abs().max().item()
    torch.testing.assert_close(z.double(), want, rtol=room, atol=room)


@on_a_gpu_too
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tile", SMALLEST, ids=label)
def test_without_weight_and_bias(tile, dtype):
    x, numbers, weight = operands(*CASES["less than a step"], dtype)
    check(x, [*numbers[:3], None, numbers[4]], weight, tile)
    check(x, [*numbers[:4], None], weight, tile)


@on_a_gpu_too
@each_tile
def test_channels_past_the_end_count_for_nothing(tile):
    """Zeros there would be normalised to Inf by any numbers of others: zero times that is NaN."""
    x, numbers, weight = operands((1, 72, 7, 9), 72, torch.float16)
    numbers = [torch.full_like(numbers[0], value) for value in (300, 1, 0, -300, 0)]
    x = (x + 300).to(torch.float16)
    z, _ = check(x, numbers, weight, tile)
    assert z.isfinite().all()


@on_a_gpu_too
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tile", SMALLEST, ids=label)
def test_special_values(tile, dtype):
    """Of x, where ReLU lets NaN through and stops -Inf; of a channel's numbers."""
    for value in (float("nan"), float("inf"), -float("inf"), -0.0):
        x, numbers, weight = operands(*CASES["less than a step"], dtype)
        x[1, 3, 2, 1], x[2, 23, 6, 4] = value, value
        numbers[3][3] = 2.0
        z, _ = check(x, numbers, weight, tile)
        assert z.isnan()[1, :, 2, 1].all() == (value != value)
        assert z[0].isfinite().all()
    for number, value in ((0, float("nan")), (1, -1.0), (1, 0.0), (4, float("inf"))):
        x, numbers, weight = operands(*CASES["less than a step"], dtype)
        numbers[number][5] = value
        z, _ = check(x, numbers, weight, tile)
        assert z.isfinite().all() == (value == 0)


@pytest.mark.parametrize("multiprocessors", [1, 2])
@pytest.mark.parametrize("tile", HOPPER, ids=label)
def test_blocks_stay_for_many_tiles(tile, multiprocessors):
    """Of one step and of two, in several orders of threads and copies."""
    for C in (40, 128):
        x, numbers, weight = operands((2, C, 20, 11), 264, torch.bfloat16)
        with emulation.device(multiprocessors=multiprocessors):
            emulation.seed(C)
            check(x, numbers, weight, tile)


@each_tile
def test_the_order_of_threads_changes_nothing(tile):
    x, numbers, weight = operands(*CASES["ragged"], torch.float16)
    first = run(x, numbers, weight, tile, fused=True)
    emulation.seed(2)
    assert machines.equal(run(x, numbers, weight, tile, fused=True), first)


@each_tile
def test_no_bank_conflicts(tile):
    """A wavefront to read and one to write a row of a step, and no other access more."""
    (N, C, H, W), K = CASES["one step"]
    x, numbers, weight = operands((N, C, H, W), K, torch.bfloat16)
    found = []
    for fused in (True, False):
        with emulation.wavefronts() as waves:
            run(x, numbers, weight, tile, fused=fused)
        found.append(waves)
    rows = -(-N * H * W // tile.block_m) * tile.block_m * -(-K // tile.block_n)
    for access in emulation.ACCESSES:
        needed, ideal = (a - b for a, b in zip(found[0][access], found[1][access], strict=True))
        assert ideal == (rows if access in ("load", "store") else 0), access
        # Where some lanes of a warp read less, their later accesses are counted out of step.
        assert ideal <= needed <= 1.05 * ideal, f"{access}: {needed} wavefronts for {ideal}"


@on_a_gpu_too
def test_errors():
    x, numbers, weight = operands((1, 16, 3, 3), 16, torch.float16)
    x = x.contiguous(memory_format=torch.channels_last)

    def refused(words: str, x=x, numbers=numbers, weight=weight, tile=SMALLEST[0], out=3) -> None:
        z = torch.empty(1, 16, out, out, dtype=x.dtype).contiguous(
            memory_format=torch.channels_last
        )
        x, weight, z, *numbers = map(machines.here, (x, weight, z, *numbers))
        with pytest.raises(RuntimeError, match=f"implicit_gemm: .*{words}"):
            machines.ops().normalised_convolution_statistics(
                x, *numbers, 1e-5, weight, z, tile.number
            )

    refused("of float16 or bfloat16, got float32", x=x.float(), weight=weight.float())
    narrow = next(tile for tile in gemm_cases.tiles(80) if tile.block_n < 64)
    refused(f"no kernel of tile {narrow.number} normalises x", tile=narrow)
    refused("a 1x1 convolution, got 3x3", weight=weight.expand(16, 3, 3, 16).contiguous(), out=1)
    for i, name in enumerate(("mean", "var", "rest", "norm_weight", "norm_bias")):
        wrong = [t[:8] if i == j else t for j, t in enumerate(numbers)]
        refused(f"{name} must be float32 of shape", numbers=wrong)


# --- in training ---------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch):
    """The shapes of weights whose convolutions normalised their inputs by themselves."""
    from fused_resnet.kernels.training import cuda as cuda_training

    taken = []
    convolve = cuda_training.Cuda.convolve_normed_by

    def see(self, config, normed, weight):
        taken.append(tuple(weight.shape))
        return convolve(self, config, normed, weight)

    monkeypatch.setattr(cuda_training.Cuda, "convolve_normed_by", see)
    return taken


@pytest.fixture
def written(monkeypatch):
    """The shapes of activations that a pass of its own wrote."""
    from fused_resnet.kernels.training import cuda as cuda_training

    taken = []
    apply = cuda_training.Cuda.apply

    def see(self, normed, residual, relu):
        taken.append(tuple(normed.x.shape))
        return apply(self, normed, residual, relu)

    monkeypatch.setattr(cuda_training.Cuda, "apply", see)
    return taken


def by_tile(monkeypatch, tile: Tile) -> None:
    """1x1 convolutions of stride 1 run by it: so small ones would get a smaller tile."""
    if (reason := machines.skip_reason(tile.architecture)) is not None:
        pytest.skip(reason)
    from fused_resnet.kernels.cuda import implicit_gemm as cuda_conv
    from fused_resnet.kernels.training import cuda as cuda_training

    choose = cuda_training.Cuda._config

    def config(self, x, weight, g):
        found = choose(self, x, weight, g)
        pointwise = found is not None and weight.shape[2:] == (1, 1) and g.stride == (1, 1)
        return cuda_conv.CudaConfig(tile.number) if pointwise else found

    monkeypatch.setattr(cuda_training.Cuda, "_config", config)


@on_a_gpu_too
@pytest.mark.parametrize("tile", SMALLEST, ids=label)
@pytest.mark.parametrize("name", ["bottleneck", "bottleneck, projection", "bottleneck, groups"])
def test_a_block_trains(name, tile, served, written, monkeypatch):
    """Forward writes no activation before the widening convolution; the same bits at every level of
    memory, whoever normalised what."""
    by_tile(monkeypatch, tile)
    block, x = there(*make(name, HALVES[SMALLEST.index(tile)]))
    dy = torch.randn_like(block(x).detach())
    weight = tuple(block.conv3.weight.shape)
    want = None
    for level, passes in (("full", 0), ("low", 1), ("lower", 2), ("minimal", 2)):
        again = copy.deepcopy(block)
        fr.set_activation_memory(again, level)
        served.clear(), written.clear()
        with fr.use_backend(own()):
            y = again(x)
            assert served == [weight] * min(passes, 1), level
            # The first norm's; the second's where it is kept; the block's end.
            assert len(written) == (3 if level == "full" else 2) + ("projection" in name), level
            again = copy.deepcopy(block)
            fr.set_activation_memory(again, level)
            served.clear()
            found = [t.cpu() for t in step(again, x, dy).values()]
        assert served == [weight] * passes, level
        want = want or found
        assert machines.equal(found, want), level
        assert torch.equal(y.detach().cpu(), found[0])


@on_a_gpu_too
def test_what_is_not_served(served, monkeypatch):
    """3x3 convolutions, float32, statistics that came with no convolution, tiles without such a
    kernel, splits."""
    from fused_resnet.kernels.cuda import implicit_gemm as cuda_conv
    from fused_resnet.kernels.training import cuda as cuda_training
    from fused_resnet.kernels.training.protocol import Geometry, Norm, Normed

    device = "cpu" if machines.emulated() else "cuda"
    x = torch.randn(2, 64, 6, 6, device=device).contiguous(memory_format=torch.channels_last)
    half = x.half()
    vectors = tuple(torch.rand(3, 64, device=device).unbind())
    norm = Norm(None, None, 1e-5)
    pointwise = Geometry((1, 1), (0, 0), (1, 1), 1)
    maker = cuda_training.CUDA
    by_tile(monkeypatch, SMALLEST[0])

    def serves(x=half, state=vectors, size=1, g=pointwise, groups=1) -> bool:
        weight = torch.randn(64, 64 // groups, size, size, device=device)
        with fr.use_backend(own()):
            return maker.convolve_normed(Normed(x, norm, state), weight, g) is not None

    assert serves() and serves(x.bfloat16())
    assert not serves(half.contiguous())
    assert not serves(x) and not serves(state=(*vectors[:2], None))
    assert not serves(size=3, g=pointwise._replace(padding=(1, 1)))
    assert not serves(g=pointwise._replace(stride=(2, 2)))
    assert not serves(g=pointwise._replace(padding=(1, 1)))
    assert not serves(groups=2, g=pointwise._replace(groups=2))
    assert len(served) == 2
    narrow = next(t.number for t in gemm_cases.tiles(80) if t.block_n < 64)
    for config in (cuda_conv.CudaConfig(narrow), cuda_conv.CudaConfig(SMALLEST[0].number, 2)):
        monkeypatch.setattr(cuda_training.Cuda, "_config", lambda *_, config=config: config)
        assert not serves()
    monkeypatch.setattr(cuda_training.Cuda, "_config", lambda *_: None)
    assert not serves()
