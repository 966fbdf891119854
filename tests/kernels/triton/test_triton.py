"""Tests specific to the Triton kernels: tiles, tuning, compiled code.

tests/ops tests values, layouts, special values and gradients for all backends, without a GPU in
Triton's interpreter.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet import layout
from fused_resnet.bench import machine
from fused_resnet.bench.layers import layers_of
from fused_resnet.kernels import measure, registry, target, tuning
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.cuda.implicit_gemm import CudaConfig
from fused_resnet.kernels.problem import Gemm, Geometry, Problem
from fused_resnet.kernels.target import Target
from fused_resnet.ops import reference
from tests import ROOT
from tests.emulator import emulation
from tests.kernels import registrations

triton = pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = registry.missing("conv_bn_relu", "triton", DEVICE)
if REASON:
    pytest.skip(REASON, allow_module_level=True)

import triton.language as tl  # noqa: E402

from fused_resnet.kernels.triton import (  # noqa: E402
    backward,
    batch_norm,
    configs,
    convolution,
    elementwise,
    support,
)
from fused_resnet.kernels.triton.batch_norm import _places  # noqa: E402
from fused_resnet.kernels.triton.configs import Config  # noqa: E402

SMALL = Config(32, 32, 16, 4, 2)


def conv(config: Config | None, shape, K, kernel, groups=1, x: Tensor | None = None, **where):
    """The results of `config` and of the reference for integers: products and sums are exact."""
    sizes = {"stride": 1, "padding": 0, "dilation": 1, **where}
    geometry = Geometry(*((v, v) for v in sizes.values()), groups)
    g = torch.Generator().manual_seed(0)
    if x is None:
        x = torch.randint(-2, 3, shape, generator=g).float().to(DEVICE)
    weight = torch.randint(-2, 3, (K, shape[1] // groups, *kernel), generator=g).float().to(DEVICE)
    scale = torch.randint(1, 3, (K,), generator=g).float().to(DEVICE)
    shift = torch.randint(-5, 6, (K,), generator=g).float().to(DEVICE)
    want = reference.conv_bn_relu(x, weight, scale, shift, None, True, *geometry)
    y = layout.channels_last_empty(want.shape, x).fill_(torch.nan)
    x, weight = layout.channels_last(x), layout.channels_last(weight)
    gemm = Gemm(y.numel() // K, K, shape[1] // groups, *kernel, groups, sizes["stride"], "float32")
    config = configs.fitted(config, gemm) if config else None
    convolution.run(x, weight, scale, shift, None, y, True, geometry, config)
    return y, want


@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("group_m", [1, 8])
def test_every_tile_is_computed_once(splits, persistent, group_m):
    config = replace(SMALL, splits=splits, persistent=persistent, group_m=group_m)
    got, want = conv(config, (3, 40, 7, 9), 70, (3, 3), padding=1, stride=2)
    assert torch.equal(got, want)


LISTED = {
    config
    for operands in ("bfloat16", "tf32", "float32")
    for architecture in (80, 86, 90, 100, 120)
    for config in configs.configs(operands, Target("nvidia", f"sm_{architecture}"))
}


@pytest.mark.parametrize("listed", sorted(LISTED, key=str), ids=str)
def test_every_listed_tile(listed):
    got, want = conv(listed, (2, 72, 6, 5), 70, (1, 1))
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "groups, C, outputs", [(8, 4, 4), (32, 4, 8), (6, 8, 8), (3, 5, 7), (2, 48, 40)]
)
def test_group_widths(groups, C, outputs):
    got, want = conv(SMALL, (2, groups * C, 6, 5), groups * outputs, (3, 3), groups, padding=1)
    assert torch.equal(got, want)


# x's (N, C, H, W), K, kernel, stride, padding, dilation, groups
BACKWARD = {
    "many parts": ((2, 16, 20, 20), 24, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "many parts, 3x3": ((3, 8, 19, 17), 16, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "stride 2": ((1, 8, 9, 8), 16, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "pixels that no tap reaches": ((1, 8, 9, 8), 16, (1, 1), (3, 2), (0, 0), (1, 1), 1),
    "asymmetric": ((2, 6, 9, 12), 10, (2, 5), (2, 1), (0, 2), (1, 1), 2),
    "dilated": ((1, 6, 11, 9), 8, (3, 2), (1, 1), (2, 0), (2, 3), 1),
    "padding beyond the kernel": ((1, 4, 5, 4), 4, (2, 2), (1, 1), (3, 2), (1, 1), 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BACKWARD)
def test_gradients_of_integers_are_exact(case):
    shape, K, kernel, *sizes, groups = BACKWARD[case]
    geometry = Geometry(*sizes, groups)
    x = torch.randint(-2, 3, shape).float().to(DEVICE)
    weight = torch.randint(-2, 3, (K, shape[1] // groups, *kernel)).float().to(DEVICE)
    y = torch.nn.functional.conv2d(x, weight, None, *geometry)
    g = torch.randint(-2, 3, y.shape).float().to(DEVICE)
    want_dx, want_dweight, _ = torch.ops.aten.convolution_backward(
        g, x, weight, None, *geometry[:3], False, [0, 0], groups, [True, True, False]
    )
    assert torch.equal(backward.convolution_dx(g, weight, x.shape, geometry), want_dx)
    dweight = backward.convolution_dweight(g, x, weight.shape, geometry)
    assert torch.equal(dweight, want_dweight)


@pytest.mark.slow
def test_the_backward_op():
    """Schema, fake, the fallback to PyTorch (stride with dilation), and an empty batch."""
    op = torch.ops.fused_resnet.convolution_backward_triton
    x, weight = torch.randn(2, 6, 9, 8, device=DEVICE), torch.randn(4, 3, 3, 3, device=DEVICE)
    for stride, dilation in (([1, 1], [1, 1]), ([2, 1], [1, 2])):
        geometry = (stride, [1, 1], dilation)
        g = torch.nn.functional.conv2d(x, weight, None, *geometry, 2)
        for mask in ([True, True, False], [True, False, False], [False, True, False]):
            utils = ("test_schema", "test_faketensor")
            torch.library.opcheck(op, (g, x, weight, *geometry, 2, mask), test_utils=utils)
        want = torch.ops.aten.convolution_backward(
            g, x, weight, None, *geometry, False, [0, 0], 2, [True, True, False]
        )
        mine = op(g, x, weight, *geometry, 2, [True, True, False])
        torch.testing.assert_close(mine, want[:2], rtol=1e-4, atol=1e-4)
        dx, dweight = op(g[:0], x[:0], weight, *geometry, 2, [True, True, False])
        assert dx.shape == (0, 6, 9, 8) and dweight.count_nonzero() == 0


def test_nan_stays_in_its_group():
    """A tile of several groups multiplies by zeros between them; NaN and Inf must not spread."""
    x = torch.ones(1, 32, 5, 5, device=DEVICE)
    x[0, 9, 2, 2], x[0, 21, 0, 0] = torch.nan, torch.inf
    got, want = conv(SMALL, (1, 32, 5, 5), 32, (3, 3), 8, x=x, padding=1)
    assert configs.groups_per_tile(Gemm(25, 32, 4, 3, 3, 8, 1, "float32"), 32, 16) == 4
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_the_interpreter_still_multiplies_bfloat16_wrongly():
    """When this fails, ON_HOST can be removed from the kernels."""
    if not support.on_host():
        pytest.skip("on a GPU")

    @triton.jit
    def product(a_ptr, b_ptr, y_ptr):
        i = tl.arange(0, 16)
        at = i[:, None] * 16 + i[None, :]
        tl.store(y_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))

    a = torch.randn(16, 16).bfloat16()
    y = torch.zeros(16, 16)
    product[(1,)](a, a, y)
    assert not torch.allclose(y, a.float() @ a.float(), rtol=1e-2, atol=1e-2)


RESNET50 = [
    Gemm(batch * P * P, K, C, R, S, 1, 1, "bfloat16")
    for batch in (1, 32, 256)
    for P, K, C, R, S in (
        (112, 64, 28, 7, 1), (56, 64, 256, 1, 1), (56, 64, 64, 3, 3), (28, 512, 128, 1, 1),
        (14, 256, 256, 3, 3), (7, 512, 512, 3, 3), (7, 2048, 512, 1, 1),
    )
]  # fmt: skip


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_the_heuristic_fits_the_device(architecture):
    shared = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}.get(architecture, 99) * 1024
    target = Target("nvidia" if architecture.startswith("sm") else "amd", architecture)
    for problem in RESNET50:
        config = configs.choose(problem, target, 132)
        assert configs.shared_bytes(config, "bfloat16") <= shared
        tiles = configs.tiles(config, problem) * config.splits
        # Small grids are split until half of the multiprocessors have work, if possible.
        most = configs.steps(config, problem) // 4
        assert tiles >= 66 or config.splits >= min(most, 8) / 2, (problem, config)


HOPPER = Target("nvidia", "sm_90")


def problem_of(gemm: Gemm) -> Problem:
    """A convolution with this matrix product, of one row of pixels."""
    padding = ((gemm.R - 1) // 2, (gemm.S - 1) // 2)
    geometry = Geometry((1, 1), padding, (1, 1))
    dtype = getattr(torch, gemm.operands)
    problem = Problem("conv_bn_relu", dtype, gemm[1:5], geometry, (1, gemm.C, 1, gemm.M))
    assert problem.gemm() == gemm
    return problem


WINNERS = {
    RESNET50[0]: {"triton": tuning.Choice("triton", SMALL, 1e-5)},
    RESNET50[3]: {
        "native": tuning.Choice("native", CudaConfig(2, 4), 3e-5),
        "triton": tuning.Choice("triton", replace(SMALL, splits=2, persistent=True), 2e-5),
    },
}


def test_winners_round_trip_through_a_file(tmp_path):
    path = tmp_path / "deeper" / "winners.json"
    assert tuning.read(path) == {}
    assert tuning.write(path, WINNERS) is None
    assert tuning.read(path) == WINNERS and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"winners": [{"problem": {"M": 1}}]}'])
def test_corrupt_file_is_ignored_with_one_warning(tmp_path, content):
    path = tmp_path / "winners.json"
    path.write_text(content)
    with pytest.warns(RuntimeWarning, match=r"winners.json is ignored .* rewrites it"):
        assert tuning.read(path) == {}
    assert tuning.write(path, WINNERS) is None and tuning.read(path) == WINNERS


def test_unwritable_folder_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    message = tuning.write(tmp_path / "file" / "winners.json", WINNERS)
    assert message is not None and "cannot be written" in message


def test_tune_selects_the_fastest_and_skips_failures(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "file_name", lambda device: "here.json")
    monkeypatch.setattr(tuning, "_winners", {})
    emulation.load()  # only its configurations are asked for
    device = torch.device("cpu")
    gemm, failing = RESNET50[2], RESNET50[5]
    problem, failing_problem, other_problem = map(problem_of, (gemm, failing, RESNET50[4]))
    triton_only = (registry.provider("triton", "cpu"),)
    both = (*triton_only, registry.provider("emulated", "cpu"))
    listed = tuning.configurations(problem, device, both)
    assert {backend for backend, _ in listed} == {"triton", "native"}
    best, broken = listed[-1], listed[3]
    assert math.isinf(tuning.choice(gemm, device, both).time_s)  # cached; tuning clears it

    def measure(problem: Problem, backend: str, config: Any) -> float:
        if (backend, config) == broken or problem == failing_problem:
            raise RuntimeError("out of resources")
        return 1.0 if (backend, config) == best else 2.0

    seen = []
    winners, complete, wrong, file_error = tuning.tune(
        [problem, failing_problem], device, both, measure, lambda p, b, c, t: seen.append((b, c))
    )
    assert broken in seen, "the progress bar would not complete"
    assert file_error is None and complete and not wrong and winners[failing] == {}
    assert winners[gemm] == {
        "triton": tuning.Choice("triton", listed[0][1], 2.0),
        best[0]: tuning.Choice(*best, 1.0),
    }
    assert tuning.choice(gemm, device, both) == tuning.Choice(*best, 1.0)
    assert tuning.choice(gemm, device, triton_only).backend == "triton"  # forced
    assert tuning.read(tmp_path / "fused_resnet" / "here.json") == {gemm: winners[gemm]}
    # Not measured, or no candidate runs: the heuristic of the first backend.
    for other in (RESNET50[4], failing):
        config = configs.choose(other, HOPPER, target.multiprocessors(device))
        assert tuning.choice(other, device, both) == tuning.Choice("triton", config)
    # Earlier measurements are preserved.
    tuning.tune([other_problem], device, both, measure)
    assert set(tuning.read(tmp_path / "fused_resnet" / "here.json")) == {gemm, RESNET50[4]}


def test_user_winners_override_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuning, "file_name", lambda device: "a_gpu.json")
    monkeypatch.setattr(tuning, "_winners", {})
    mine = {RESNET50[0]: {"triton": tuning.Choice("triton", SMALL, 9e-5)}}
    for folder, winners in ((tuning.SHIPPED, WINNERS), (tuning.cache_folder(), mine)):
        assert tuning.write(folder / "a_gpu.json", winners) is None
    assert tuning.winners(torch.device("cuda")) == WINNERS | mine


def test_unknown_gpu_is_reported_in_one_line(monkeypatch):
    def launch(*args: object, **constants: object) -> None:
        raise RuntimeError("ptxas: Value 'sm_130' is not defined\nmore of it")

    assert support.probe(DEVICE) is None
    monkeypatch.setattr(support, "launch", launch)
    message = support.probe(DEVICE)
    assert message.endswith("does not work (RuntimeError: ptxas: Value 'sm_130' is not defined)")


@pytest.mark.parametrize(
    "attribute, value, words",
    [
        ("IMPORT_ERROR", "ModuleNotFoundError: triton", "cannot be imported .*pip install triton"),
        ("MIN_VERSION", (99, 0), "is too old: 99.0 or later is required"),
        ("probe", lambda device_type: "no compiler", "no compiler"),
    ],
    ids=["absent", "too old", "probe"],
)
def test_reasons_why_triton_is_unavailable(monkeypatch, attribute, value, words):
    monkeypatch.setattr(support, attribute, value)
    assert re.search(words, support.unavailable.__wrapped__(HOPPER, "cuda"))


@pytest.mark.parametrize(
    "target, words",
    [
        (Target("cpu", "avx2"), "need a GPU$"),
        (Target("nvidia", "none"), "no CUDA device is available"),
        (Target("nvidia", "sm_75"), "need a GPU of sm_80 or later, this is sm_75"),
    ],
    ids=str,
)
def test_targets_that_triton_does_not_support(target, words):
    assert re.search(words, support.unavailable.__wrapped__(target, "cuda"))


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, fused_resnet as fr
x = torch.randn(2, 8, 6, 6)
torch.testing.assert_close(fr.add_relu(x, x), torch.relu(2 * x))
try:
    with fr.use_backend("triton"):
        raise SystemExit("triton is unavailable, but use_backend did not raise")
except RuntimeError as error:
    assert "pip install triton" in str(error), error
"""


@pytest.mark.slow
def test_without_triton_other_backends_are_used():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], env=environment, timeout=120)
    assert run.returncode == 0


@pytest.mark.parametrize(
    "memory_format", (torch.contiguous_format, torch.channels_last), ids=("contiguous", "last")
)
def test_grids_of_large_batches_fit(monkeypatch, memory_format):
    """All dimensions of a grid except the first are limited to 65535."""
    grids = {}
    for module in (elementwise, batch_norm, convolution, backward):
        monkeypatch.setattr(module, "launch", lambda k, grid, *a, **c: grids.update({k: grid}))
    x = torch.empty(
        1024, 64, 112, 112, dtype=torch.bfloat16, device="meta"
    ).contiguous(memory_format=memory_format)  # fmt: skip
    weight, vector = x.new_empty(64, 64, 3, 3), x.new_empty(64, dtype=torch.float32)
    geometry = Geometry((1, 1), (1, 1), (1, 1))
    registrations.keep(monkeypatch)
    registry.register("triton", "meta", registry.provider("triton", DEVICE))
    elementwise.add_relu(x, x)
    batch_norm.bn_add_relu(x, None, None, x, 1e-5, True)
    flags = (1e-5, True, True, True)
    batch_norm.bn_add_relu_backward(x, x, x, None, vector, vector, *flags)
    convolution.run(x, layout.channels_last(weight), vector, vector, x, x, True, geometry)
    backward.convolution_dx(x, weight, x.shape, geometry)
    backward.convolution_dweight(x, x, weight.shape, geometry)
    assert len(grids) >= 9 and max(grid[0] for grid in grids.values()) > 65535
    assert all(max((0, *grid[1:])) <= 65535 for grid in grids.values()), grids


def test_offsets_are_64_bit_for_large_tensors():
    """Tests the index type, because the interpreter is too slow for more than 2^31 elements."""
    small, large = torch.empty(5, device="meta"), torch.empty(2**31, device="meta")
    assert support.index_type(small, None) == tl.int32
    assert support.index_type(small, large) == tl.int64
    # A masked tile may extend past the end: the last offset must fit, not just the last element.
    assert support.index_type(torch.empty(2**31 - 2**19, device="meta")) == tl.int64
    # Strides count, not elements.
    every_second = torch.empty(2, 2**20, 2**11, device="meta")[:, :, ::2]
    assert every_second.numel() == 2**31 and support.index_type(every_second[:, :-1]) == tl.int64
    assert support.index_type(small[:1].expand(2**32)) == tl.int32


def test_more_than_2_31_pixels_are_refused():
    few, many = (
        conv_problem(shape) for shape in ((2**10, 16, 1024, 1024), (2**11, 16, 1024, 1024))
    )
    assert convolution.supports(few, HOPPER) is None
    assert "fewer than 2146435072 pixels" in convolution.supports(many, HOPPER)
    nearly = many._replace(x_shape=(1, 16, 1, 2**31 - 128))
    assert convolution.supports(nearly, HOPPER) is not None
    g, weight = torch.empty(2**11, 16, 512, 512, device="meta"), torch.empty(16, 16, 1, 1)
    strided = Geometry((2, 2), (0, 0), (1, 1))
    assert backward.convolution_dx(g, weight, many.x_shape, strided) is None


def conv_problem(x_shape) -> Problem:
    geometry = Geometry((1, 1), (0, 0), (1, 1))
    return Problem("conv_bn_relu", torch.float16, (16, 16, 1, 1), geometry, x_shape)


@pytest.mark.skipif(DEVICE != "cpu", reason="memory that is mapped but not used")
def test_images_far_apart(tmp_path):
    """Two images of one pixel, more than 2^31 elements apart in x and in y."""
    apart = 2**31 + 64
    memory = torch.from_file(str(tmp_path / "sparse"), True, apart + 64, dtype=torch.float16)
    strides = (apart, 1, 16, 16)
    x, y = (memory.as_strided((2, 16, 1, 1), strides, offset) for offset in (0, 32))
    x.copy_(torch.randint(-2, 3, x.shape))
    weight = torch.randint(-2, 3, (16, 16, 3, 3)).half()
    geometry, one = Geometry((1, 1), (1, 1), (1, 1)), torch.ones(16)
    weight_last = layout.channels_last(weight)
    convolution.run(x, weight_last, one, 0 * one, None, y, Activation.NONE, geometry, SMALL)
    wanted = torch.nn.functional.conv2d(x.float(), weight.float(), None, 1, 1).half()
    assert torch.equal(y, wanted)


@triton.jit
def last_place_kernel(out_ptr, M, C, HW):
    m = (M - 1 + tl.arange(0, 1)).to(tl.int64)
    at, inside = _places(m, tl.zeros((1,), tl.int64), M, C, HW, False)
    tl.store(out_ptr + tl.zeros((1, 1), tl.int32), at, mask=inside)


def test_batch_norm_of_large_images():
    """An image of more than 2^31 elements; and parts that begin beyond 2^31 pixels."""
    place = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    C, HW = 64, 6000**2
    support.launch(last_place_kernel, (1,), place, 2 * HW, C, HW)
    assert place.item() == C * HW + HW - 1
    pixels, count = 3 * 10**7, 100
    parts, out = torch.zeros(count, 3, 16, device=DEVICE), torch.zeros(5, 16, device=DEVICE)
    parts[:, 1] = torch.arange(count, device=DEVICE)[:, None]  # the parts' means
    support.launch(
        batch_norm.bn_stats_merge_kernel, (1,), parts, None, out[0], out[1], out[2:],
        pixels * (count - 1) + 1, 16, count, pixels, 1e-5, BLOCK_P=64, BLOCK_C=16, ACC=tl.float32,
    )  # fmt: skip
    assert (out[0] - 49).abs().max() < 1e-3 and (out[1] - 816.6667).abs().max() < 1e-2


@pytest.fixture
def as_if_on_a_gpu(monkeypatch, tmp_path) -> Path:
    """Simulates a GPU on which larger tiles are faster; yields the cache folder of winners."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    emulation.load()
    registrations.keep(monkeypatch)
    for name, on_cpu in (("triton", "triton"), ("native", "emulated")):
        registry.register(name, "cuda", registry.provider(on_cpu, "cpu"))
    monkeypatch.setattr(registry, "candidates", lambda *_: ("triton", "native", "reference"))
    monkeypatch.setattr(machine, "check_device", lambda name: None)
    monkeypatch.setattr(tuning, "_winners", {})
    monkeypatch.setattr(tuning, "file_name", lambda device: "a_gpu.json")

    def time_s(problem: Problem, backend: str, config: Any) -> float:
        if backend == "native":
            return 1.0 if config.splits == 1 else 2.0
        return 2**14 / (config.block_m * config.block_n * config.splits)

    monkeypatch.setattr(measure, "measure_on", lambda *which: time_s)
    yield tmp_path / "fused_resnet"
    tuning.choice.cache_clear()


def test_the_tune_command(as_if_on_a_gpu):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from fused_resnet.cli import application

    def tune(*words: str):
        return CliRunner().invoke(application(), ["tune", "--model", "resnet18", *words])

    run = tune("--batch", "1,32", "--dtype", "bfloat16")
    assert run.exit_code == 0, run.output
    assert "100%" in run.output and "resnet18, batch 32, bfloat16" in run.output
    assert "triton 128x256x64, 8 warps" in run.output and "native 2.00" in run.output
    winners = tuning.read(as_if_on_a_gpu / "a_gpu.json")
    for name in ("cuda", "cuda:0"):  # a tensor's device, and the command's option
        assert tuning.winners(torch.device(name)) == winners
    layers = {x.gemm() for x in layers_of("resnet18", 32, torch.bfloat16)}
    assert layers < winners.keys() and len(layers) == 11
    triton_configs = [by_backend["triton"].config for by_backend in winners.values()]
    assert {c.block_m * c.block_n for c in triton_configs if c.splits == 1} == {128 * 256}

    as_if_on_a_gpu.joinpath("a_gpu.json").unlink()
    as_if_on_a_gpu.rmdir()
    as_if_on_a_gpu.write_text("not a folder")
    run = tune("--batch", "1")
    assert run.exit_code == 0 and "cached for this process only" in run.output, run.output

    run = tune("--batch", "none")
    assert run.exit_code == 2 and "--batch" in run.output


def test_the_tune_commands_failures(as_if_on_a_gpu, monkeypatch):
    """Exit status 1 if an output is wrong or the GPU fails; not if the time is over."""
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from fused_resnet.cli import application

    def tune(*words: str):
        words = ("tune", "--model", "resnet18", "--batch", "1", *words)
        return CliRunner().invoke(application(), words)

    run = tune("--seconds", "0")
    assert run.exit_code == 0 and "not complete; run it again" in run.output, run.output
    time_s = measure.measure_on("cuda")

    def wrong(problem: Problem, backend: str, config: Any) -> float:
        if backend == "native" and problem.weight_shape[0] == 512:
            raise tuning.Wrong("y: largest error 3")
        return time_s(problem, backend, config)

    monkeypatch.setattr(measure, "measure_on", lambda device: wrong)
    run = tune()
    assert run.exit_code == 1 and "is wrong for Gemm(M=49, K=512" in run.output, run.output
    assert "not complete" not in run.output and tuning.read(as_if_on_a_gpu / "a_gpu.json")

    def illegal(*which: Any) -> float:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(measure, "measure_on", lambda device: illegal)
    monkeypatch.setattr(torch.cuda, "synchronize", illegal)
    run = tune("--again")
    assert run.exit_code == 1 and "GPU does not work any more" in run.output, run.output


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="not in a checkout")
def test_hopper_code_uses_tensor_cores_without_spills(tmp_path):
    """CI runs triton_resources.py for all kernels, configurations and architectures."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks/kernels/triton/triton_resources.py"),
        "--arch",
        "90",
    ]
    command += ["--dtype", "bfloat16", "--kernel", "conv", "--out", str(tmp_path)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    (file,) = tmp_path.glob("triton_resources-*.json")
    table = json.loads(file.read_text())["kernels"]
    products = [row for row in table if row["kernel"] == "conv_bn_relu_kernel"]
    products = [row for row in products if row["variant"] != "sizes of one"]
    assert all(row["found"]["tensor"] > 0 for row in products)
    tiles = {row["variant"].split(",")[0] for row in products}
    assert len(tiles) == len(configs.configs("bfloat16", HOPPER))
