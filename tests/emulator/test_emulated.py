"""Tests of the CUDA kernels in the emulator: launch configurations, bitwise reproducibility for any
order of threads, and AddressSanitizer.

Values, layouts and derivatives are tested in the ops' tests, whose `backend` includes "emulated".
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fused_resnet.ops import reference
from tests.emulator import emulation
from tests.ops.op_cases import LAYOUTS, randn

pytestmark = pytest.mark.usefixtures("emulator")
LAST = "channels_last"


@pytest.fixture
def device() -> str:
    return "cpu"


# --- bn_add_relu ------------------------------------------------------------------------------


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    layout: str
    machine: dict[str, int]
    forward: list[tuple[int, bool]]  # (blocks, cooperative) of every launch
    backward: list[tuple[int, bool]]


HALF, FLOAT = torch.float16, torch.float32
SMALL = {"architecture": 86}  # 99 KiB of shared memory
BN_CASES = {
    "a block for each slab": Case(
        (4, 256, 7, 7), HALF, LAST, {}, [(4, False)], [(4, False)]
    ),
    "a block for each slab, of 16 channels": Case(
        (4, 96, 7, 7), HALF, LAST, {"multiprocessors": 8}, [(6, False)], [(6, False)]
    ),
    "parts in one launch": Case(
        (2, 16, 24, 24), FLOAT, LAST, {"multiprocessors": 6}, [(6, True)], [(6, True)]
    ),
    "parts and slabs in one launch": Case(
        (2, 40, 23, 23), FLOAT, LAST, {"multiprocessors": 9}, [(8, True)], [(8, True)]
    ),
    "parts of planes in one launch": Case(
        (3, 3, 40, 40), FLOAT, "contiguous", {"multiprocessors": 7}, [(6, True)], [(6, True)]
    ),
    "two launches": Case(
        (5, 16, 40, 40), FLOAT, LAST, {"multiprocessors": 5, **SMALL}, 2 * [(5, False)],
        2 * [(5, False)],
    ),
    "only the backward in two launches": Case(
        (3, 16, 40, 40), FLOAT, LAST, {"multiprocessors": 5, **SMALL}, [(5, True)],
        2 * [(5, False)],
    ),
    "two launches of planes": Case(
        (8, 1, 151, 150), FLOAT, "contiguous", {"multiprocessors": 5, **SMALL},
        2 * [(5, False)], 2 * [(5, False)],
    ),
    "two launches, one part": Case(
        (2, 16, 41, 41), FLOAT, LAST, {"multiprocessors": 1, **SMALL}, 2 * [(1, False)],
        2 * [(1, False)],
    ),
    "packets of 16 bytes, 64 channels to a slab": Case(
        (4, 128, 9, 9), HALF, LAST, {"multiprocessors": 1}, [(2, False)], [(2, False)]
    ),
    "packets of one element, 32 channels": Case(
        (4, 128, 9, 9), HALF, "odd offset, channels_last", {"multiprocessors": 1},
        [(4, False)], [(4, False)],
    ),
}  # fmt: skip


def bn_run(case: Case, need: tuple[bool, bool] = (True, True)) -> tuple[list[Tensor], list[Any]]:
    """The seven results, checked against the float64 reference, and the launches of each op."""
    torch.manual_seed(0)
    x, residual, dy = (
        LAYOUTS[case.layout](randn(case.shape, case.dtype) * 2 + 0.7) for _ in range(3)
    )
    weight, bias = torch.rand(case.shape[1]) + 0.5, torch.randn(case.shape[1])
    ops = torch.ops.fused_resnet_emulated
    found: list[Any] = []
    with emulation.device(**case.machine):
        with emulation.launches() as launches:
            results = list(ops.bn_add_relu(x, weight, bias, residual, 1e-3, True))
        found.append(launches)
        y, mean, var = results
        rest = (weight, mean, var, 1e-3, True, *need)
        with emulation.launches() as launches:
            results += ops.bn_add_relu_backward(dy, x, y, *rest)
        found.append(launches)
    doubles = [t.double() for t in (x, weight, bias, residual, dy, y, mean, var)]
    exact = [*reference.bn_add_relu(*doubles[:4], 1e-3, True)]
    exact += reference.bn_add_relu_backward(
        doubles[4], doubles[0], doubles[5], doubles[1], *doubles[6:], 1e-3, True, *need
    )
    for got, want in zip(results, exact, strict=True):
        near = 1e-3 if got.dtype == HALF else 2e-6
        scale = want.abs().max().item() if want.numel() else 0
        torch.testing.assert_close(got.double(), want, rtol=0, atol=near * scale)
    return results, found


@pytest.mark.parametrize("name", BN_CASES)
def test_bn_add_relu_takes_the_intended_launches(poison, name):
    case = BN_CASES[name]
    _, found = bn_run(case)
    for launches, want in zip(found, (case.forward, case.backward), strict=True):
        assert [(launch.blocks, launch.cooperative) for launch in launches] == want


@pytest.mark.parametrize("name", ["parts in one launch", "two launches"])
def test_bn_add_relu_backward_writes_only_needed_outputs(poison, name):
    """Without outputs to write, the second launch only adds the parts, with one block per slab."""
    case = BN_CASES[name]
    for need in ((True, False), (False, True), (False, False)):
        results, (_, launches) = bn_run(case, need)
        assert [results[3].numel() > 0, results[6].numel() > 0] == list(need)
        if not any(need) and len(launches) == 2:
            assert launches[1].blocks == 1 < launches[0].blocks


@pytest.mark.parametrize("name", ["a block for each slab", "parts in one launch", "two launches"])
def test_bn_add_relu_in_any_order_of_threads(name):
    first, _ = bn_run(BN_CASES[name])
    for seed in (1, 2, 3):
        emulation.seed(seed)
        again, _ = bn_run(BN_CASES[name])
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


class Cut(NamedTuple):
    packet: int
    rows: int
    rows_per_part: int
    columns: int
    slabs: int
    parts: int
    threads: int
    kept: int
    shared_bytes: int


def bn_cut(shape, channels_last=True, element_bytes=2, operands=1, multiprocessors=132) -> Cut:
    N, C, H, W = shape
    sizes = (N, C, H * W, channels_last, element_bytes, True, operands, multiprocessors, 227 * 1024)
    out = (ctypes.c_int64 * 9)()
    emulation.load().bn_add_relu_cut((ctypes.c_int64 * 9)(*map(int, sizes)), out)
    return Cut(*out)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("operands", [1, 2], ids=["forward", "backward"])
@pytest.mark.parametrize("element_bytes", [2, 4, 8])
def test_bn_add_relu_fills_a_large_device(element_bytes, operands, channels_last):
    """ResNet-50's layers on 132 multiprocessors: covers all rows, occupies most of the device."""
    sizes = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7),
             (2048, 7))  # fmt: skip
    for N in (1, 8, 32, 256):
        for C, H in sizes:
            cut = bn_cut((N, C, H, H), channels_last, element_bytes, operands)
            assert (cut.parts - 1) * cut.rows_per_part < cut.rows <= cut.parts * cut.rows_per_part
            width = cut.columns * cut.packet if channels_last else 1
            assert (cut.slabs - 1) * width < C <= cut.slabs * width
            assert cut.rows * (1 if channels_last else cut.packet) == N * H * H
            assert cut.shared_bytes <= 227 * 1024 and cut.threads % 32 == 0
            assert cut.threads >= max(width, cut.columns)
            blocks = cut.slabs * cut.parts
            assert not (cut.kept and cut.parts > 1) or blocks <= 132
            # A block for each 16 KiB is enough.
            assert blocks >= min(0.7 * 132, N * C * H * H * element_bytes / 2**15)


def test_bn_add_relu_keeps_what_fits():
    assert bn_cut((32, 2048, 7, 7)).parts == 1 and bn_cut((32, 2048, 7, 7)).kept
    cut = bn_cut((32, 64, 56, 56))
    assert cut.kept and cut.parts == 66 and cut.slabs == 2  # 12.8 MB
    assert not bn_cut((32, 256, 56, 56)).kept  # 51 MB
    assert not bn_cut((64, 64, 56, 56), operands=2).kept


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_bn_add_relu_indices_beyond_two_to_the_31(channels_last):
    C, HW, channel = 3, 2**16 + 8, 2
    offset = emulation.load().bn_add_relu_offset
    offset.restype = ctypes.c_int64
    offset.argtypes = [*2 * [ctypes.c_int64], *2 * [ctypes.c_int], *3 * [ctypes.c_int64],
                       ctypes.c_int]  # fmt: skip
    for row in (5, 2**31 + 12345, 2**33 + 7):
        for packet in (1,) if channels_last else (1, 8):
            n, i = divmod(row * packet, HW)
            want = row * C + channel if channels_last else (n * C + channel) * HW + i
            for stride in (1, 64, -512, HW - 8, -3 * HW + 24):
                steps = 5 if row > 2**31 else 0
                got = offset(C, HW, channels_last, packet, channel, row, stride, steps)
                assert got == want


# --- AddressSanitizer -------------------------------------------------------------------------


@pytest.mark.skipif(not emulation.SANITIZER, reason="python -m tests.emulator.emulation pytest")
def test_address_sanitizer_detects_overflow():
    """Writes past the end of an output whose storage was shrunk after the shape was set."""
    program = """
import sys
import torch
from tests.emulator import emulation
emulation.load()
x, out = torch.ones(1, 8, 4, 4), torch.empty(1, 8, 4, 4)
out.untyped_storage().resize_(4 * 100)
torch.ops.fused_resnet_emulated.add_relu_out(x, x, out)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=emulation.ROOT, capture_output=True, text=True, timeout=600
    )  # fmt: skip
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
    assert "elementwise_kernel" in done.stderr
