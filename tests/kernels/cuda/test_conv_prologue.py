"""A norm and a ReLU applied to x in the prologue of a 1x1 convolution: the CUDA kernels, in the
emulator and, if available, on a GPU, are bitwise equal to bn_normalise and the same tile's
convolution; and the training path that uses them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from fused_resnet.kernels.cuda.implicit_gemm import CudaConfig
from fused_resnet.kernels.training.cuda import CUDA, Cuda
from fused_resnet.kernels.training.protocol import Geometry, Norm, Normed
from tests.emulator import emulation
from tests.fusion.training.training_helpers import make, step
from tests.kernels.cuda import machines
from tests.ops.op_cases import randn

if emulation.unavailable() is not None:
    pytest.skip(emulation.unavailable(), allow_module_level=True)

from tests.kernels.cuda import gemm_cases
from tests.kernels.cuda.gemm_cases import GUARD, Tile, guarded
from tests.kernels.cuda.test_conv_statistics import kernel_backend, label, on_device

also_on_gpu = pytest.mark.usefixtures("kernels")
DTYPES = (torch.float16, torch.bfloat16)
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
    """x (N, C, H, W); mean, var, rest, norm's weight and bias (C,); weight (K, 1, 1, C)."""
    C = shape[1]
    torch.manual_seed(C)
    vectors = [torch.randn(C), torch.rand(C) + 0.1, torch.randn(C) * 1e-3]
    vectors += [torch.randn(C) + 0.5, torch.randn(C)]
    weight = (randn((K, 1, 1, C), torch.float32) / C**0.5).to(dtype)
    return randn(shape, dtype), vectors, weight


def run(
    x: Tensor, vectors: list[Tensor | None], weight: Tensor, tile: Tile, fused: bool
) -> tuple[Tensor, Tensor]:
    """z (N, K, H, W) and its statistics; x is normalised in the prologue or by bn_normalise."""
    if (reason := machines.skip_reason(tile.architecture)) is not None:
        pytest.skip(reason)
    ops = machines.ops()
    x, _ = guarded(x)
    vectors, weight = [machines.to_device(t) for t in vectors], machines.to_device(weight)
    mean, var, rest, scale, bias = vectors
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
    fused, want = run(*arguments, fused=True), run(*arguments, fused=False)
    assert machines.equal(fused, want)
    return fused


# --- values --------------------------------------------------------------------------------------


@also_on_gpu
@each_tile
@pytest.mark.parametrize("case", CASES)
def test_bitwise_equal_to_separate_passes(case, tile):
    dtype = DTYPES[(list(CASES).index(case) + TILES.index(tile)) % 2]
    x, vectors, weight = operands(*CASES[case], dtype)
    z, _ = check(x, vectors, weight, tile)
    assert z.isfinite().all()
    # Also compare with the formula; one rounding of each activation is allowed.
    mean, var, rest, scale, bias = (t.double().view(-1, 1, 1) for t in vectors)
    a = ((x.double() - mean - rest) * scale / (var + 1e-3).sqrt() + bias).relu()
    want = torch.nn.functional.conv2d(a, weight.permute(0, 3, 1, 2).double())
    tolerance = 4 * torch.finfo(dtype).eps * a.abs().max().item()
    torch.testing.assert_close(z.double(), want, rtol=tolerance, atol=tolerance)


@also_on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", SMALLEST, ids=label)
def test_without_weight_and_bias(tile, dtype):
    x, vectors, weight = operands(*CASES["less than a step"], dtype)
    check(x, [*vectors[:3], None, vectors[4]], weight, tile)
    check(x, [*vectors[:4], None], weight, tile)


@also_on_gpu
@each_tile
def test_channels_past_the_end_are_ignored(tile):
    """Zeros there, normalised with other channels' parameters, would give Inf; zero times Inf is
    NaN."""
    x, vectors, weight = operands((1, 72, 7, 9), 72, torch.float16)
    vectors = [torch.full_like(vectors[0], value) for value in (300, 1, 0, -300, 0)]
    x = (x + 300).to(torch.float16)
    z, _ = check(x, vectors, weight, tile)
    assert z.isfinite().all()


@also_on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", SMALLEST, ids=label)
def test_special_values(tile, dtype):
    """In x, where the ReLU keeps NaN and maps -Inf to 0; and in a channel's parameters."""
    for value in (float("nan"), float("inf"), -float("inf"), -0.0):
        x, vectors, weight = operands(*CASES["less than a step"], dtype)
        x[1, 3, 2, 1], x[2, 23, 6, 4] = value, value
        vectors[3][3] = 2.0
        z, _ = check(x, vectors, weight, tile)
        assert z.isnan()[1, :, 2, 1].all() == (value != value)
        assert z[0].isfinite().all()
    for index, value in ((0, float("nan")), (1, -1.0), (1, 0.0), (4, float("inf"))):
        x, vectors, weight = operands(*CASES["less than a step"], dtype)
        vectors[index][5] = value
        z, _ = check(x, vectors, weight, tile)
        assert z.isfinite().all() == (value == 0)


@pytest.mark.parametrize("multiprocessors", [1, 2])
@pytest.mark.parametrize("tile", HOPPER, ids=label)
def test_persistent_blocks_with_many_tiles(tile, multiprocessors):
    """Tiles of one and of two steps, in several orders of threads and copies."""
    for C in (40, 128):
        x, vectors, weight = operands((2, C, 20, 11), 264, torch.bfloat16)
        with emulation.device(multiprocessors=multiprocessors):
            emulation.seed(C)
            check(x, vectors, weight, tile)


@each_tile
def test_result_does_not_depend_on_thread_order(tile):
    x, vectors, weight = operands(*CASES["ragged"], torch.float16)
    first = run(x, vectors, weight, tile, fused=True)
    emulation.seed(2)
    assert machines.equal(run(x, vectors, weight, tile, fused=True), first)


@each_tile
def test_no_bank_conflicts(tile):
    """The prologue adds one wavefront to read and one to write each row of a step, no others."""
    (N, C, H, W), K = CASES["one step"]
    x, vectors, weight = operands((N, C, H, W), K, torch.bfloat16)
    counts = []
    for fused in (True, False):
        with emulation.wavefronts() as wavefronts:
            run(x, vectors, weight, tile, fused=fused)
        counts.append(wavefronts)
    rows = -(-N * H * W // tile.block_m) * tile.block_m * -(-K // tile.block_n)
    for access in emulation.ACCESSES:
        needed, ideal = (a - b for a, b in zip(counts[0][access], counts[1][access], strict=True))
        assert ideal == (rows if access in ("load", "store") else 0), access
        # If some lanes of a warp read less, later accesses are counted in wrong groups.
        assert ideal <= needed <= 1.05 * ideal, f"{access}: {needed} wavefronts for {ideal}"


@also_on_gpu
def test_errors():
    x, vectors, weight = operands((1, 16, 3, 3), 16, torch.float16)
    x = x.contiguous(memory_format=torch.channels_last)

    def check_error(
        words: str, x=x, vectors=vectors, weight=weight, tile=SMALLEST[0], out=3
    ) -> None:
        z = torch.empty(1, 16, out, out, dtype=x.dtype).contiguous(
            memory_format=torch.channels_last
        )
        x, weight, z, *vectors = map(machines.to_device, (x, weight, z, *vectors))
        with pytest.raises(RuntimeError, match=f"implicit_gemm: .*{words}"):
            machines.ops().normalised_convolution_statistics(
                x, *vectors, 1e-5, weight, z, tile.number
            )

    check_error("of float16 or bfloat16, got float32", x=x.float(), weight=weight.float())
    narrow = next(tile for tile in gemm_cases.tiles(80) if tile.block_n < 64)
    check_error(f"no kernel of tile {narrow.number} normalises x", tile=narrow)
    check_error(
        "a 1x1 convolution, got 3x3", weight=weight.expand(16, 3, 3, 16).contiguous(), out=1
    )
    for i, name in enumerate(("mean", "var", "rest", "norm_weight", "norm_bias")):
        wrong = [t[:8] if i == j else t for j, t in enumerate(vectors)]
        check_error(f"{name} must be float32 of shape", vectors=wrong)


# --- in training ---------------------------------------------------------------------------------


@pytest.fixture
def fused_prologues(monkeypatch):
    """The shapes of the weights of convolutions with a fused prologue."""
    shapes = []
    convolve = Cuda.convolve_normed_with_config

    def record(self, config, normed, weight):
        shapes.append(tuple(weight.shape))
        return convolve(self, config, normed, weight)

    monkeypatch.setattr(Cuda, "convolve_normed_with_config", record)
    return shapes


@pytest.fixture
def applied(monkeypatch):
    """The shapes of activations that a separate pass wrote."""
    shapes = []
    apply = Cuda.apply

    def record(self, normed, residual, relu):
        shapes.append(tuple(normed.x.shape))
        return apply(self, normed, residual, relu)

    monkeypatch.setattr(Cuda, "apply", record)
    return shapes


def force_tile(monkeypatch, tile: Tile) -> None:
    """Uses the tile for 1x1 convolutions of stride 1; small ones would get a smaller tile."""
    if (reason := machines.skip_reason(tile.architecture)) is not None:
        pytest.skip(reason)
    choose = Cuda._config

    def config(self, x, weight, g):
        default = choose(self, x, weight, g)
        pointwise = default is not None and weight.shape[2:] == (1, 1) and g.stride == (1, 1)
        return CudaConfig(tile.number) if pointwise else default

    monkeypatch.setattr(Cuda, "_config", config)


@also_on_gpu
@pytest.mark.parametrize("tile", SMALLEST, ids=label)
@pytest.mark.parametrize("name", ["bottleneck", "bottleneck, projection", "bottleneck, groups"])
def test_a_block_trains(name, tile, fused_prologues, applied, monkeypatch):
    """Forward writes no activation before the widening convolution; results are bitwise equal at
    every level of activation memory."""
    force_tile(monkeypatch, tile)
    block, x = on_device(*make(name, DTYPES[SMALLEST.index(tile)]))
    dy = torch.randn_like(block(x).detach())
    weight = tuple(block.conv3.weight.shape)
    want = None
    for level, passes in (("full", 0), ("low", 1), ("lower", 2), ("minimal", 2)):
        recomputing = copy.deepcopy(block)
        fr.set_activation_memory(recomputing, level)
        fused_prologues.clear(), applied.clear()
        with fr.use_backend(kernel_backend()):
            y = recomputing(x)
            assert fused_prologues == [weight] * min(passes, 1), level
            # The first norm, the second if its activation is saved, and the block's end.
            assert len(applied) == (3 if level == "full" else 2) + ("projection" in name), level
            recomputing = copy.deepcopy(block)
            fr.set_activation_memory(recomputing, level)
            fused_prologues.clear()
            results = [t.cpu() for t in step(recomputing, x, dy).values()]
        assert fused_prologues == [weight] * passes, level
        want = want or results
        assert machines.equal(results, want), level
        assert torch.equal(y.detach().cpu(), results[0])


@also_on_gpu
def test_unsupported_cases(fused_prologues, monkeypatch):
    """3x3 convolutions, float32, statistics that are not fused, tiles without such a kernel,
    splits."""
    device = "cpu" if machines.emulated() else "cuda"
    x = torch.randn(2, 64, 6, 6, device=device).contiguous(memory_format=torch.channels_last)
    x16 = x.half()
    vectors = tuple(torch.rand(3, 64, device=device).unbind())
    norm = Norm(None, None, 1e-5)
    pointwise = Geometry((1, 1), (0, 0), (1, 1), 1)
    force_tile(monkeypatch, SMALLEST[0])

    def supported(x=x16, state=vectors, size=1, g=pointwise, groups=1) -> bool:
        weight = torch.randn(64, 64 // groups, size, size, device=device)
        with fr.use_backend(kernel_backend()):
            return CUDA.convolve_normed(Normed(x, norm, state), weight, g) is not None

    assert supported() and supported(x.bfloat16())
    assert not supported(x16.contiguous())
    assert not supported(x) and not supported(state=(*vectors[:2], None))
    assert not supported(size=3, g=pointwise._replace(padding=(1, 1)))
    assert not supported(g=pointwise._replace(stride=(2, 2)))
    assert not supported(g=pointwise._replace(padding=(1, 1)))
    assert not supported(groups=2, g=pointwise._replace(groups=2))
    assert len(fused_prologues) == 2
    monkeypatch.setattr(Cuda, "_config", lambda *_: CudaConfig(SMALLEST[0].number))
    assert supported() and not supported(x)  # whatever tile is chosen
    narrow = next(t.number for t in gemm_cases.tiles(80) if t.block_n < 64)
    for config in (CudaConfig(narrow), CudaConfig(SMALLEST[0].number, 2)):
        monkeypatch.setattr(Cuda, "_config", lambda *_, config=config: config)
        assert not supported()
    monkeypatch.setattr(Cuda, "_config", lambda *_: None)
    assert not supported()
