"""The convolutions of csrc/cuda/convolution/ as a
contender (tuning.py): which problems they cover, tiles worth measuring, and a heuristic.

Channels and outputs of a group come in 16 bytes; an x with fewer channels is padded, outputs are
not. 16-bit operands, and float32 where PyTorch allows TF32.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.kernels import native, registry
from fused_resnet.kernels.problem import Geometry, Problem

STEM = -1
_STEP_BYTES = 128  # of channels that a step takes (implicit_gemm_tiles.h)
_MOST_SPLITS = 8
_FARTHEST = 128  # pixels, of a corner of the bulk copy engine's box
_TALLEST_SPLIT = 64  # rows of a tile: where there are too few tiles, smaller ones come first


@dataclass(frozen=True)
class CudaConfig:
    """One way to run it: a row of `tiles()`, or STEM, the stem's own kernel; and how many blocks
    share a tile's steps."""

    tile: int
    splits: int = 1

    def label(self) -> str:
        if self.tile == STEM:
            return "stem"
        tile = tiles()[self.tile]
        how = (
            f"sm_{tile['architecture']} {tile['block_m']}x{tile['block_n']}, {tile['warps']} warps"
        )
        return how + (f", {self.splits} splits" if self.splits > 1 else "")


CONFIG = CudaConfig


@functools.cache
def tiles() -> list[dict[str, int]]:
    """The tiles that were built: architecture, block_m, block_n, warps, stages, normalises."""
    return native.gemm_tiles()


def _itemsize(operands: str) -> int:
    return 4 if operands in ("tf32", "float32") else 2


def is_stem(problem: Problem) -> bool:
    """Whether this is 7x7 of stride 2 on three channels, 64 outputs, in 16 bits. (Padding and
    dilation, which a problem does not know, are asked by `gpu_conv.GpuConv`.)"""
    shape = (problem.K, problem.C, problem.R, problem.S, problem.groups, problem.stride)
    return shape == (64, 3, 7, 7, 1, 2) and problem.operands in ("bfloat16", "float16")


def covers(problem: Problem, capability: tuple[int, int]) -> bool:
    elements = 16 // _itemsize(problem.operands)
    aligned = problem.groups == 1 or problem.C % elements == 0
    return (
        problem.operands != "float32"
        and capability >= (8, 0)
        and aligned
        and problem.K // problem.groups % elements == 0
        and problem.M < 2**31 - 1025  # an int holds the end of the last tile too
        and bool(tiles())
    )


def reaches(problem: Problem, geometry: Geometry) -> bool:
    """Whether the bulk copy engine can address this convolution, as Hopper's kernel does it:
    covers_sm90 in csrc/cuda/convolution/sm90/launch.cu."""
    kernel = problem.R, problem.S
    if (kernel, geometry.stride, geometry.padding) == ((1, 1), (1, 1), (0, 0)):
        return True
    if problem.groups > 1 and problem.C % (_STEP_BYTES // 2) != 0:
        return False

    def fits(size: int, stride: int, padding: int, dilation: int) -> bool:
        reach = (size - 1) * dilation
        corners = padding <= _FARTHEST and -_FARTHEST <= padding - reach < _FARTHEST
        return corners and reach < 2 * _FARTHEST and stride <= 8

    return all(map(fits, kernel, *geometry))


def _hopper(problem: Problem, capability: tuple[int, int]) -> bool:
    """Whether Hopper's tiles are for this problem, padding and dilation aside (`reaches`)."""
    size, stride, groups = max(problem.R, problem.S), problem.stride, problem.groups
    return (
        capability == (9, 0)
        # Code for sm_90 alone has nothing but a trap where those kernels should be.
        and registry.cuda_kernels().built_for("9.0a")
        and _itemsize(problem.operands) == 2
        and (groups == 1 or problem.C % (_STEP_BYTES // 2) == 0 or size == stride == 1)
        and size <= _FARTHEST
        and stride <= 8
    )


def _steps(problem: Problem) -> int:
    elements = 16 // _itemsize(problem.operands)
    channels = math.ceil(problem.C / elements) * 16
    return math.ceil(problem.R * problem.S * channels / _STEP_BYTES)


def _tiles_of(tile: dict[str, int], problem: Problem) -> int:
    over_n = math.ceil(problem.K // problem.groups / tile["block_n"])
    return math.ceil(problem.M / tile["block_m"]) * over_n * problem.groups


def candidates(problem: Problem, capability: tuple[int, int]) -> list[CudaConfig]:
    stem = [CudaConfig(STEM)] if is_stem(problem) else []
    return stem + _tile_configs(problem, _hopper(problem, capability))


def _tile_configs(problem: Problem, hopper: bool) -> list[CudaConfig]:
    found = []
    for number, tile in enumerate(tiles()):
        if tile["architecture"] == 90 and not hopper:
            continue
        found.append(CudaConfig(number))
        splits = 2
        while (
            tile["architecture"] == 80
            and tile["block_m"] <= _TALLEST_SPLIT
            and splits <= _MOST_SPLITS
            and _steps(problem) >= 4 * splits
        ):
            found.append(CudaConfig(number, splits))
            splits *= 2
    return found


def choose(problem: Problem, capability: tuple[int, int], processors: int) -> CudaConfig:
    """For a problem that nobody has measured: the stem's kernel for the stem, else a tile."""
    return CudaConfig(STEM) if is_stem(problem) else choose_tile(problem, capability, processors)


def choose_tile(
    problem: Problem, capability: tuple[int, int], processors: int, reached: bool = True
) -> CudaConfig:
    """The tile of the least estimated time; one of sm_80's where `reaches` says no."""
    return _cheapest(problem, processors, reached and _hopper(problem, capability))


def fitting(
    config: CudaConfig,
    problem: Problem,
    capability: tuple[int, int],
    processors: int,
    reached: bool,
) -> CudaConfig:
    """config where its kernel runs here, else a tile that does. Winners are kept by `Problem`,
    which knows no padding and no dilation, and by GPU, whatever was built for it."""
    hopper = config.tile != STEM and tiles()[config.tile]["architecture"] == 90
    if config.tile == STEM or (hopper and not (reached and _hopper(problem, capability))):
        return choose_tile(problem, capability, processors, reached)
    return config


@functools.lru_cache(maxsize=4096)
def _cheapest(problem: Problem, processors: int, hopper: bool) -> CudaConfig:
    """The tile of the least estimated time, in products per multiprocessor.

    A wave of tiles takes at each step the time of its products or, where it loads more than it
    multiplies, of its loads: 64 products in the time of one operand from L2 (1024 dense 16-bit
    products and 16 loaded elements a cycle). wgmma multiplies about 1.6 times as fast as mma.sync
    on the same chip. Filling the pipeline and finishing a tile take about as long as four steps; on
    Hopper the next tile's steps hide that.
    """

    def cost(config: CudaConfig) -> float:
        tile = tiles()[config.tile]
        m, n = tile["block_m"], tile["block_n"]
        bulk = tile["architecture"] == 90
        waves = math.ceil(_tiles_of(tile, problem) * config.splits / processors)
        per_step = max(m * n / (1.6 if bulk else 1.0), 64 * (m + n))
        steps = math.ceil(_steps(problem) / config.splits)
        extra = 4 + waves * steps if bulk else waves * (steps + 4)
        # Partial sums are written and read once more.
        return extra * per_step * (1.0 if config.splits == 1 else 1.1)

    return min(_tile_configs(problem, hopper), key=cost)


def pack_stem(weight: Tensor) -> Tensor:
    """weight (64, 3, 7, 7) -> (64, 7, 8, 4): the eighth tap and the fourth channel are zeros."""
    return F.pad(weight, (0, 1, 0, 0, 0, 1)).permute(0, 2, 3, 1).contiguous()


def run_stem(conv: Any, x: Tensor, pool: bool) -> Tensor:
    """x (N, 3, H, W) of any layout -> y (N, 64, P, Q), with the pooling behind it if `pool`."""
    if x.dtype not in (torch.float32, conv.dtype):
        x = x.to(conv.dtype)
    weight = conv.kept("stem", lambda: pack_stem(conv.weight))
    return ops().stem(x, weight, conv.scale, conv.shift, pool)


def run_conv(
    conv: Any, x: Tensor, residual: Tensor | None, relu: bool, y: Tensor, config: CudaConfig
) -> None:
    """x, residual, y channels_last -> y of a `gpu_conv.GpuConv`."""
    elements = 16 // x.element_size()
    weight = conv.weight  # (K, C / groups, R, S), (K, R, S, C / groups) in memory
    more = -weight.shape[1] % elements
    if more:
        x = F.pad(x, (0, 0, 0, 0, 0, more)).contiguous(memory_format=torch.channels_last)
        weight = conv.kept("native", lambda: F.pad(conv.weight, (0, 0, 0, 0, 0, more)))
    x, weight = aligned(x), aligned(weight.contiguous(memory_format=torch.channels_last))
    K, C, R, S = weight.shape
    rows = weight.as_strided((K, R, S, C), (R * S * C, S * C, C, 1))
    if residual is not None:
        residual = aligned(residual)
    ops().implicit_gemm(
        x, rows, conv.scale, conv.shift, residual, y, relu,
        *conv.geometry, conv.groups, config.tile, config.splits,
    )  # fmt: skip


def normalises(config: CudaConfig) -> bool:
    """Whether there is a kernel of this tile that applies a norm and a ReLU to what it reads."""
    return config.tile != STEM and config.splits == 1 and bool(tiles()[config.tile]["normalises"])


def aligned(t: Tensor) -> Tensor:
    """t, or a copy of it, that starts at a multiple of 16 bytes."""
    return t if t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.preserve_format)


def ops() -> Any:
    """The CUDA kernels that serve now."""
    found = registry.cuda_kernels().kernels
    assert found is not None
    return found()
