"""The convolution for Hopper (csrc/cuda/convolution/sm90/), in the emulator and, if available, on a
Hopper GPU: values, geometries, the order of threads and copies; and its index arithmetic."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.kernels import cache, native, providers, registry
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.cuda import implicit_gemm
from fused_resnet.kernels.cuda.convolution import GpuConv
from fused_resnet.kernels.problem import Problem, convolution
from fused_resnet.kernels.target import Target
from tests.emulator import emulation
from tests.kernels.cuda import machines
from tests.kernels.cuda.gemm_cases import tiles
from tests.ops.op_cases import close, fused_conv, integers, randn, same
from tests.ops.test_conv_bn_relu import exact, stock

pytestmark = pytest.mark.skipif(
    emulation.unavailable() is not None, reason=str(emulation.unavailable())
)

# block_m x block_n of the sm_90 rows of kGemmTiles
TILES = ("128x256", "128x128", "64x256", "128x64", "64x64")
FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16
DTYPES = (FLOAT16, BFLOAT16)

# name -> x's (N, C, H, W), K, kernel (R, S), stride, padding, dilation, groups
CASES = {
    # First, since no chip has run it: as in a ResNet the stride leaves a remainder of 1.
    "3x3, stride 2, even": ((2, 64, 12, 8), 64, (3, 3), 2, 1, 1, 1),
    "pointwise": ((2, 64, 9, 8), 64, (1, 1), 1, 0, 1, 1),
    "pointwise, long sums": ((1, 200, 7, 7), 136, (1, 1), 1, 0, 1, 1),
    "pointwise, stride 2": ((2, 72, 9, 12), 80, (1, 1), 2, 0, 1, 1),
    "pointwise, groups": ((1, 80, 7, 9), 48, (1, 1), 1, 0, 1, 2),
    "3x3": ((2, 64, 9, 10), 72, (3, 3), 1, 1, 1, 1),
    "3x3, stride 2": ((2, 72, 11, 9), 264, (3, 3), 2, 1, 1, 1),
    "pointwise, stride 2, even": ((2, 64, 8, 10), 64, (1, 1), 2, 0, 1, 1),
    "strides that leave 2 and 1": ((2, 16, 11, 9), 64, (3, 4), (3, 2), (1, 0), 1, 1),
    "stem": ((1, 8, 23, 21), 64, (7, 7), 2, 3, 1, 1),
    "dilated": ((1, 24, 13, 12), 24, (3, 3), 1, 2, 2, 1),
    "asymmetric": ((2, 16, 9, 12), 40, (1, 5), (2, 1), (0, 2), (1, 2), 1),
    "asymmetric, tall": ((1, 16, 14, 5), 16, (4, 2), (3, 1), (2, 1), (2, 1), 1),
    "wide padding": ((1, 16, 4, 5), 16, (3, 3), 1, (3, 4), 1, 1),
    "no padding": ((3, 8, 6, 7), 8, (2, 3), 1, 0, 1, 1),
    "one pixel": ((1, 16, 1, 1), 8, (1, 1), 1, 0, 1, 1),
    "one pixel, 3x3": ((3, 16, 1, 1), 24, (3, 3), 1, 1, 1, 1),
    "pointwise, groups of 8": ((1, 32, 6, 6), 32, (1, 1), 1, 0, 1, 4),
    "groups of 64": ((1, 128, 6, 7), 48, (3, 3), 1, 1, 1, 2),
    "groups of 64, stride 2": ((2, 192, 7, 5), 120, (3, 3), 2, 1, 1, 3),
    "many tiles": ((3, 72, 20, 11), 264, (1, 3), 1, (0, 1), 1, 1),
    "groups of 128": ((1, 256, 5, 6), 144, (1, 3), 1, (0, 1), 1, 2),
}


def row_of(tile: str) -> int:
    """The index in kGemmTiles of the sm_90 tile."""
    (row,) = (t.number for t in tiles(90) if f"{t.block_m}x{t.block_n}" == tile)
    return row


# Tests without it run in the emulator only, or test code that runs on the host.
also_on_gpu = pytest.mark.usefixtures("kernels")


def pair(v) -> tuple[int, int]:
    return (v, v) if isinstance(v, int) else tuple(v)


def guarded(t: Tensor, fill: bool = True) -> Tensor:
    """t's values (or NaN), channels_last, in memory with NaN before and after."""
    t = t.contiguous(memory_format=torch.channels_last)
    memory = torch.full((t.numel() + 1024,), float("nan"), dtype=t.dtype, device=t.device)
    inside = memory.as_strided(t.shape, t.stride(), 512)
    return inside.copy_(t) if fill else inside


def untouched_around(t: Tensor) -> bool:
    memory = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
    return bool(memory[:512].isnan().all() and memory[-512:].isnan().all())


def operands(case, dtype, make=randn) -> tuple[list[Tensor], tuple]:
    """x, weight, scale, shift, residual, and the geometry."""
    shape, K, kernel, *geometry = CASES[case]
    groups = geometry[3]
    weight = make((K, shape[1] // groups, *kernel), dtype)
    x = make(shape, dtype)
    scale, shift = torch.rand(K) + 0.5, torch.randn(K)
    scale = scale * torch.where(torch.arange(K) % 5 == 4, -1.0, 1.0)
    if make is randn:
        weight = weight / weight[0].numel() ** 0.5
    else:
        scale, shift = torch.randint(1, 3, (K,)).float(), torch.randint(-9, 9, (K,)).float()
        x, weight = x.clamp(-1, 1), weight.clamp(-1, 1)
    out = F.conv2d(x.float(), weight.float(), None, *geometry).shape
    return [guarded(x), weight, scale, shift, guarded(make(out, dtype))], tuple(geometry)


def conv(x, weight, scale, shift, residual, relu, geometry, tile) -> Tensor:
    if (reason := machines.skip_reason(90)) is not None:
        pytest.skip(reason)
    stride, padding, dilation, groups = geometry
    out = F.conv2d(x.float(), weight.float(), None, *geometry).shape
    y = machines.to_device(guarded(torch.empty(out, dtype=x.dtype), fill=False))
    weight = weight.permute(0, 2, 3, 1).contiguous()
    moved = map(machines.to_device, (x, weight, scale, shift, residual))
    machines.ops().implicit_gemm(
        *moved, y, relu, pair(stride), pair(padding), pair(dilation), groups, row_of(tile), 1
    )
    assert untouched_around(y)
    return y.cpu()


@also_on_gpu
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", CASES)
def test_small_integers_are_exact(case, tile):
    """Every product and sum is exact: one wrong index changes the result."""
    dtype = DTYPES[(list(CASES).index(case) + TILES.index(tile)) % 2]
    (x, weight, scale, shift, residual), geometry = operands(case, dtype, integers)
    machines.seed(len(case))
    for added, relu in ((residual, True), (None, False)):
        arguments = (x, weight, scale, shift, added, relu)
        same(conv(*arguments, geometry, tile), exact(*arguments, *geometry).to(dtype))


@also_on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", ["pointwise, long sums", "3x3, stride 2", "groups of 64"])
def test_values(case, tile, dtype):
    tensors, geometry = operands(case, dtype)
    for added, relu in ((tensors[4], True), (None, True), (tensors[4], False), (None, False)):
        arguments = (*tensors[:4], added, relu)
        y = conv(*arguments, geometry, tile)
        theirs = machines.stock(stock, *arguments, *geometry)
        results = [theirs], [exact(*arguments, *geometry)]
        close(("y",), [y], *results, dtype)


@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 132])
@pytest.mark.parametrize("tile", TILES)
def test_persistent_blocks_with_many_tiles(tile, multiprocessors):
    """Several rounds of the stage ring, output buffers and turns, or fewer tiles than blocks."""
    tensors, geometry = operands("many tiles", FLOAT16, integers)
    with emulation.device(multiprocessors=multiprocessors):
        for added in (tensors[4], None):
            arguments = (*tensors[:4], added, True)
            same(conv(*arguments, geometry, tile), exact(*arguments, *geometry).to(FLOAT16))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", ["3x3", "pointwise", "groups of 64"])
def test_result_does_not_depend_on_thread_order(case, tile):
    tensors, geometry = operands(case, BFLOAT16)
    with emulation.device(multiprocessors=1):
        results = []
        for number in range(6):
            emulation.seed(number)
            results.append(conv(*tensors, True, geometry, tile))
    for y in results[1:]:
        assert torch.equal(y, results[0])


@also_on_gpu
@pytest.mark.parametrize("case", ["pointwise, groups", "pointwise, groups of 8", "groups of 128"])
def test_groups_are_independent(case):
    """NaN stays in its group, although a step of 64 channels extends beyond a group of 40."""
    (x, weight, scale, shift, _), geometry = operands(case, FLOAT16)
    groups = geometry[3]
    C, K = x.shape[1] // groups, weight.shape[0] // groups
    clean = conv(x, weight, scale, shift, None, True, geometry, "128x64")
    for group in range(groups):
        for operand in ("x", "weight"):
            x2, weight2 = guarded(x), weight.clone()
            if operand == "x":
                x2[:, group * C : (group + 1) * C] = float("nan")
            else:
                weight2[group * K : (group + 1) * K] = float("inf")
            y = conv(x2, weight2, scale, shift, None, True, geometry, "128x64")
            others = torch.ones(y.shape[1], dtype=torch.bool)
            others[group * K : (group + 1) * K] = False
            assert torch.equal(y[:, others], clean[:, others])
            assert not y[:, ~others].isfinite().all()


@also_on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_propagate_as_in_stock(dtype):
    (x, weight, scale, shift, residual), geometry = operands("3x3", dtype)
    # Both of a pair of outputs that share a register.
    scale[2:4], shift[5] = float("nan"), -float("inf")
    x[0, 2, 3, 3], residual[1, 6:8, 2, 2], residual[0, 8, 1, 1] = float("inf"), float("nan"), -0.0
    for added, relu in ((residual, True), (residual, False), (None, True)):
        y = conv(x, weight, scale, shift, added, relu, geometry, "64x64")
        want = exact(x, weight, scale, shift, added, relu, *geometry).to(dtype)
        assert torch.equal(y.isnan(), want.isnan()) and want.isnan().any()
        infinite = want.isinf()
        assert torch.equal(y[infinite], want[infinite])
        finite = want.isfinite()
        torch.testing.assert_close(y[finite], want[finite], rtol=2e-2, atol=2e-2)


@also_on_gpu
def test_output_aliases_residual():
    """Each tile of the residual is read before that tile of y is written."""
    tensors, geometry = operands("3x3", FLOAT16, integers)
    want = exact(*tensors, True, *geometry).to(FLOAT16)
    if (reason := machines.skip_reason(90)) is not None:
        pytest.skip(reason)
    tensors[1] = tensors[1].permute(0, 2, 3, 1).contiguous()
    *moved, y = map(machines.to_device, tensors)
    machines.ops().implicit_gemm(
        *moved, y, y, True, *map(pair, geometry[:3]), geometry[3], row_of("128x64"), 1
    )
    same(y.cpu(), want)


@pytest.mark.parametrize("tile", TILES)
def test_no_bank_conflicts(tile):
    tensors, geometry = operands("3x3", FLOAT16)
    with emulation.wavefronts() as wavefronts:
        conv(*tensors, True, geometry, tile)
    for kind in ("ldmatrix", "stmatrix"):
        needed, ideal = wavefronts[kind]
        assert needed == ideal > 0, wavefronts


ERRORS = {
    "stride": (dict(stride=9), {}, "does not cover a 3x3 kernel of stride (9, 9)"),
    "padding": (dict(padding=129), {}, "does not cover"),
    "architecture": ({}, dict(architecture=80), "is for Hopper, sm_90, not for sm_80"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    change, device, words = ERRORS[case]
    (x, weight, scale, shift, _), (stride, padding, dilation, groups) = operands("3x3", FLOAT16)
    sizes = {"stride": stride, "padding": padding, **change}
    geometry = (sizes["stride"], sizes["padding"], dilation, groups)
    with emulation.device(**device), pytest.raises(RuntimeError, match="implicit_gemm: ") as error:
        conv(x, weight, scale, shift, None, True, geometry, "64x64")
    assert words in str(error.value)


@also_on_gpu
def test_float32_and_misaligned_scale_raise():
    (x, weight, scale, shift, _), geometry = operands("3x3", FLOAT16)
    with pytest.raises(RuntimeError, match="takes float16 or bfloat16"):
        conv(guarded(x.float()), weight.float(), scale, shift, None, True, geometry, "64x64")
    scale = torch.cat([scale[:1], scale])[1:]
    with pytest.raises(RuntimeError, match="must be aligned to 8 bytes"):
        conv(x, weight, scale, shift, None, True, geometry, "64x64")


def test_scale_and_shift_of_a_module_may_be_misaligned():
    emulation.load()
    tensors, geometry = operands("3x3", FLOAT16, integers)
    x, weight, scale, shift, residual = tensors
    table = torch.stack([scale, shift]).flatten()
    scale, shift = torch.cat([table[:1], table])[1:].split(len(scale))
    with registry.use_backend("emulated"):
        sizes = (*map(pair, geometry[:3]), geometry[3])
        net = fused_conv(GpuConv, weight, scale, shift, FLOAT16, *sizes)
        config = implicit_gemm.CudaConfig(row_of("64x64"))
        with cache.noting() as used:
            y = net.run_by("native", config, x, residual, Activation.RELU)
            net.run(x, None, Activation.RELU)
        assert used == [net]
    same(y, exact(*tensors, True, *geometry).to(FLOAT16))


# --- index arithmetic ----------------------------------------------------------------------------


@pytest.mark.parametrize("m_tiles, n_tiles, groups", [(1, 1, 1), (7, 3, 1), (4, 1, 5), (5, 2, 3)])
def test_every_tile_is_scheduled_once(m_tiles, n_tiles, groups):
    tiles = m_tiles * n_tiles * groups
    out = (ctypes.c_int * (3 * tiles))()
    emulation.load().hopper_schedule(tiles, n_tiles, groups, 128, 64, out)
    schedule = list(zip(out[::3], out[1::3], out[2::3], strict=True))
    every = itertools.product(range(m_tiles), range(groups), range(n_tiles))
    assert schedule == [(128 * m, g, 64 * n) for m, g, n in every]


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_stage_ring(step):
    out = (ctypes.c_int * 40)()
    emulation.load().hopper_ring(20, step, out)
    turns = [divmod(i * step, 3) for i in range(20)]
    assert list(out) == [v for turn, stage in turns for v in (stage, turn % 2)]


# N, H, W, kernel, stride, padding, dilation
COLUMNS = [
    (N, H, W, kernel, stride, padding, dilation)
    for N, H, W in ((1, 7, 9), (3, 8, 5))
    for kernel in ((1, 1), (3, 3), (2, 4))
    for stride in ((1, 1), (2, 2), (3, 1))
    for padding in ((0, 0), (1, 1), (3, 2))
    for dilation in ((1, 1), (2, 1))
    if (kernel, stride, padding) != ((1, 1), (1, 1), (0, 0))  # those load x as a matrix
    and H + 2 * padding[0] > dilation[0] * (kernel[0] - 1)
    and W + 2 * padding[1] > dilation[1] * (kernel[1] - 1)
]


def test_im2col_box_reads_the_pixels_of_the_convolution():
    """The emulated copy engine's order against p * stride - pad + r * dilation: first and last tap,
    several first outputs, across the ends of rows, columns and images."""
    library = emulation.load()
    for N, H, W, (R, S), stride, padding, dilation in COLUMNS:
        P = (H + 2 * padding[0] - dilation[0] * (R - 1) - 1) // stride[0] + 1
        Q = (W + 2 * padding[1] - dilation[1] * (S - 1) - 1) // stride[1] + 1
        geometry = (ctypes.c_int * 13)(N, H, W, R, S, P, Q, *stride, *padding, *dilation)
        outputs = list(itertools.product(range(N), range(P), range(Q)))
        for r, s, m in itertools.product((0, R - 1), (0, S - 1), (0, len(outputs) // 2)):
            count = len(outputs) - m
            out = (ctypes.c_int * (3 * count))()
            assert library.hopper_column(geometry, m, count, r, s, out) == 0
            assert list(zip(out[::3], out[1::3], out[2::3], strict=True)) == [
                (
                    q * stride[1] - padding[1] + s * dilation[1],
                    p * stride[0] - padding[0] + r * dilation[0],
                    n,
                )
                for n, p, q in outputs[m:]
            ]


def test_pixels_after_the_last_image_are_outside_x():
    library, out = emulation.load(), (ctypes.c_int * 30)()
    geometry = (ctypes.c_int * 13)(2, 4, 4, 1, 1, 2, 2, 2, 2, 0, 0, 1, 1)
    assert library.hopper_column(geometry, 0, 10, 0, 0, out) == 0
    assert list(out)[24:] == [0, 0, 2, 2, 0, 2]


def test_covers_is_exact():
    """C++ and Python agree on what is covered: that for every size of x the corners of the box and
    the offset of the last tap fit, along either dimension."""
    library, out = emulation.load(), (ctypes.c_int * 3)()
    limits = itertools.product(
        (1, 2, 3, 65, 129, 130), (1, 2, 3, 8, 9), (0, 1, 126, 127, 128, 129), (1, 2, 64, 127, 128)
    )
    seen = set()
    for size, stride, padding, dilation in limits:
        reach = (size - 1) * dilation
        smallest = max(1, reach + 1 - 2 * padding)
        valid = reach < 256
        for H in range(smallest, smallest + stride):
            P = (H + 2 * padding - reach - 1) // stride + 1
            geometry = (H, 5, size, 2, P, 4, stride, 1, padding, 0, dilation, 1)
            valid &= library.hopper_column((ctypes.c_int * 13)(1, *geometry), 0, 1, 0, 0, out) == 0
        row = ([size, 2], [stride, 1], [padding, 0], [dilation, 1])
        for kernel, *sizes in (row, [pair[::-1] for pair in row]):
            values = (*kernel, *sizes[0], *sizes[1], *sizes[2], 1, 64)
            assert bool(library.hopper_covers((ctypes.c_int * 10)(*values))) == valid, values
            problem = convolution((64, 64, *kernel), FLOAT16, *sizes, 1)
            assert implicit_gemm.reaches(problem) == valid, values
        seen.add((stride, valid))
    assert seen == {(s, v) for s in (1, 2, 3, 8) for v in (True, False)} | {(9, False)}


def test_swizzle():
    """PTX ISA, "128B swizzle": rows of eight 16-byte chunks; `order` gives each row's chunks."""
    library = emulation.load()
    order = ("01234567", "10325476", "23016745", "32107654")
    order += ("45670123", "54761032", "67452301", "76543210")
    for row, chunk in itertools.product(range(16), range(8)):
        place = 128 * row + 16 * int(order[row % 8][chunk])
        assert library.hopper_swizzled_offset(row, chunk) == place
        for byte in (0, 6, 15):
            at = library.hopper_emulated_offset(128 * row + 16 * chunk + byte)
            assert at == place + byte


def test_descriptor():
    """PTX ISA, "Matrix Descriptor Format"."""
    descriptor = emulation.load().hopper_descriptor
    descriptor.restype = ctypes.c_uint64
    for address, step in ((1024, 0), (0x2FC00, 96), (3 * 1024, 64 * 128 + 32)):
        bits = descriptor(address, step)
        assert bits & 0x3FFF == (address + step) // 16
        rest = 0x3FFF | 0x3FFF << 32 | 3 << 62
        assert bits & ~rest == 0  # no leading offset, no base offset
        assert bits >> 32 & 0x3FFF == 64  # 1024 bytes from 8 rows to the next
        assert bits >> 62 == 1  # 128-byte swizzle


# R, S, stride, padding, dilation, groups, C -> covered
COVERS = {
    (3, 3, 1, 1, 1, 1, 1, 1, 1, 64): True,
    (1, 1, 1, 1, 0, 0, 1, 1, 32, 8): True,
    (3, 3, 8, 8, 1, 1, 1, 1, 1, 64): True,
    (3, 3, 9, 1, 1, 1, 1, 1, 1, 64): False,
    (3, 3, 1, 9, 1, 1, 1, 1, 1, 64): False,
    (3, 3, 1, 1, 128, 1, 1, 1, 1, 64): True,
    (3, 3, 1, 1, 1, 129, 1, 1, 1, 64): False,
    (3, 3, 1, 1, 127, 127, 127, 64, 1, 64): True,
    (3, 3, 1, 1, 128, 1, 128, 1, 1, 64): False,  # an offset of 256
    (1, 3, 1, 1, 0, 0, 1, 64, 1, 64): True,
    (1, 3, 1, 1, 0, 0, 1, 65, 1, 64): False,  # a corner at -130
    (1, 3, 1, 2, 0, 0, 1, 64, 1, 64): False,  # at -129, where the stride leaves a remainder
    (3, 3, 1, 1, 1, 1, 1, 1, 2, 32): False,  # a step reads two groups
    (3, 3, 1, 1, 1, 1, 1, 1, 2, 64): True,
    (1, 1, 2, 2, 0, 0, 1, 1, 2, 32): False,
}


@pytest.mark.parametrize("values", COVERS)
def test_covers(values):
    """In C++ and in Python (`implicit_gemm.reaches`)."""
    assert emulation.load().hopper_covers((ctypes.c_int * 10)(*values)) == COVERS[values]
    R, S, *sizes, groups, C = values
    geometry = (sizes[:2], sizes[2:4], sizes[4:], groups)
    problem = convolution((64, C, R, S), FLOAT16, *geometry)
    assert implicit_gemm.reaches(problem) == COVERS[values]


def chosen(monkeypatch, *arguments) -> list[int]:
    """The architectures of the tiles used, for each possible measured winner."""
    x, weight, scale, shift, geometry = arguments
    used = []
    with registry.use_backend("emulated"):
        sizes = (*map(pair, geometry[:3]), geometry[3])
        net = fused_conv(GpuConv, weight, scale, shift, x.dtype, *sizes)
        for config in (
            net.choice(x, Activation.RELU).config,
            *map(implicit_gemm.CudaConfig, map(row_of, TILES)),
        ):
            monkeypatch.setattr(implicit_gemm, "run_conv", lambda *a: used.append(a[-1].tile))
            net.run_by("native", config, x, None, Activation.RELU)
    return [implicit_gemm.tiles()[tile]["architecture"] for tile in used]


FALLBACKS = {
    "far": ((1, 64, 300, 9), 128, (3, 3), 1, (129, 1), 1, 1),
    "wide": ((1, 64, 290, 9), 128, (3, 3), 1, (128, 1), (128, 1), 1),
    "narrow groups": ((1, 64, 9, 9), 128, (3, 3), 1, 1, 1, 2),
    "stride": ((1, 64, 30, 30), 128, (3, 3), (9, 1), 1, 1, 1),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_fallback_to_sm_80_tiles(case, monkeypatch):
    shape, K, kernel, *geometry = FALLBACKS[case]
    x = torch.zeros(shape, dtype=FLOAT16)
    weight = torch.zeros(K, shape[1] // geometry[3], *kernel, dtype=FLOAT16)
    operands = (x, weight, torch.ones(K), torch.zeros(K))
    assert set(chosen(monkeypatch, *operands, geometry)) == {80}
    weight, geometry = weight[:, :, :1, :1].contiguous(), (1, 0, 1, geometry[3])
    assert set(chosen(monkeypatch, x, weight, *operands[2:], geometry)) == {90}


def test_builds_without_sm_90a_do_not_use_hopper_tiles(monkeypatch):
    problem = Problem("conv_bn_relu", FLOAT16, (256, 64, 1, 1), x_shape=(1, 64, 56, 56))
    provider, device = registry.provider("native", "cuda"), torch.device("cuda")
    monkeypatch.setattr(providers, "target_of", lambda device: Target("nvidia", "sm_90"))
    hopper = implicit_gemm.CudaConfig(row_of("128x128"))
    for archs, built in (("8.0+PTX;9.0a", True), ("8.0 9.0", False), (None, False)):
        native.built_for.cache_clear()
        monkeypatch.setattr(native, "build_info", lambda archs=archs: {"cuda_archs": archs})
        target = provider.target(device)
        assert (hopper in implicit_gemm.candidates(problem.gemm(), target)) == built
        assert (implicit_gemm.fitting(hopper, problem, target, 132) == hopper) == built
    native.built_for.cache_clear()
