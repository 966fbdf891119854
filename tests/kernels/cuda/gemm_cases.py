"""Helpers of the tests of the implicit-GEMM kernels: tiles, packed operands, a guarded call."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.emulator import emulation
from tests.kernels.cuda import machines
from tests.ops.op_cases import close, lifted
from tests.ops.test_conv_bn_relu import exact, stock

TABLE = emulation.ROOT / "csrc/cuda/convolution/tiles.h"
GUARD = 64  # NaN elements before and after a tensor


class Tile(NamedTuple):
    """A row of kGemmTiles in csrc/cuda/convolution/tiles.h; `number` is its index."""

    number: int
    architecture: int
    block_m: int
    block_n: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n} by {self.warps} warps"


def tiles(architecture: int) -> list[Tile]:
    """The tiles for sm_80 or sm_90, parsed from the header, so that collection builds nothing."""
    rows = re.findall(r"^ +\{(\d+), (\d+), (\d+), (\d+), (\d+)\},", TABLE.read_text(), re.M)
    table = [Tile(number, *map(int, row)) for number, row in enumerate(rows)]
    assert table, f"no tiles in {TABLE}"
    return [tile for tile in table if tile.architecture == architecture]


def to_tf32(t: Tensor) -> Tensor:
    """t rounded to TF32: the 10 mantissa bits of a float32 that tensor cores read."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def pairs(geometry: Sequence) -> tuple[list[int], list[int], list[int], int]:
    """stride, padding, dilation (int or pair), groups -> pairs of the first three, groups."""
    stride, padding, dilation, groups = geometry
    both = [[v, v] if isinstance(v, int) else list(v) for v in (stride, padding, dilation)]
    return both[0], both[1], both[2], groups


def padded(t: Tensor, dim: int, groups: int, multiple: int) -> Tensor:
    """Pads each group's range of a dimension with zeros to a multiple."""
    t = t.movedim(dim, 0)
    t = t.reshape(groups, -1, *t.shape[1:])
    more = -t.shape[1] % multiple
    t = torch.cat([t, t.new_zeros(groups, more, *t.shape[2:])], 1)
    return t.flatten(0, 1).movedim(0, dim)


def guarded(t: Tensor) -> tuple[Tensor, Tensor]:
    """A channels_last copy of t (N, C, H, W) between two bands of NaN, and the whole buffer, on the
    kernels' device."""
    memory = machines.to_device(torch.full((t.numel() + 2 * GUARD,), float("nan"), dtype=t.dtype))
    N, C, H, W = t.shape
    inside = memory[GUARD : GUARD + t.numel()].view(N, H, W, C).permute(0, 3, 1, 2)
    return inside.copy_(t), memory


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    *geometry,
    tile: Tile,
    splits: int = 1,
) -> Tensor:
    """The raw op on padded copies: x (N, C, H, W), weight (K, C / groups, R, S), scale, shift (K,),
    residual (N, K, P, Q) -> y (N, K, P, Q). Memory around x and y is NaN and must not change."""
    if (reason := machines.skip_reason(tile.architecture)) is not None:
        pytest.skip(reason)
    stride, padding, dilation, groups = pairs(geometry)
    size, K = 16 // x.element_size(), weight.shape[0]
    out = F.conv2d(x[:, :groups].float(), torch.empty(groups, 1, *weight.shape[2:]), None,
                   stride, padding, dilation, groups).shape  # fmt: skip
    x, _ = guarded(padded(x, 1, groups, size))
    weight = padded(padded(weight, 1, 1, size), 0, groups, size)
    weight = weight.permute(0, 2, 3, 1).contiguous()  # (K, R, S, C / groups)
    scale, shift = padded(scale, 0, groups, size), padded(shift, 0, groups, size)
    if residual is not None:
        residual, _ = guarded(padded(residual, 1, groups, size))
    wide = weight.shape[0]
    y, memory = guarded(x.new_full((out[0], wide, *out[2:]), float("nan")))
    weight, scale, shift = map(machines.to_device, (weight, scale, shift))
    machines.ops().implicit_gemm(
        x, weight, scale, shift, residual, y, relu, stride, padding, dilation, groups,
        tile.number, splits,
    )  # fmt: skip
    assert memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all(), "written outside y"
    y = y.cpu().reshape(out[0], groups, wide // groups, *out[2:])
    return y[:, :, : K // groups].flatten(1, 2)


def check_close(arguments: Sequence, y: Tensor) -> None:
    """Asserts the tolerance rule, with the minimum for float32 of test_conv_bn_relu.test_values.
    float32 operands must be TF32 values, so that their products are exact in float32."""
    x, weight, scale, shift, residual, _, *geometry = arguments
    sizes = (t if t is None else t.abs() for t in (x, weight, scale, shift, residual))
    terms = {"y": exact(*sizes, False, *geometry).max().item()}
    wanted = (
        [machines.stock(stock, *arguments)],
        [exact(*map(lifted, arguments[:5]), *arguments[5:])],
        x.dtype,
    )
    close(("y",), [y], *wanted, terms if x.dtype == torch.float32 else None)
