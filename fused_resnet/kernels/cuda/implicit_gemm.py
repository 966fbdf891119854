"""The "native" convolution on GPUs (see kernels/tuning.py): the kernels of csrc/cuda/convolution/,
the problems they support, tiles worth measuring, and a heuristic.

The channels and the outputs of a group must be multiples of 16 bytes. Without groups, the channels
of x are padded; outputs are not. Operands: 16-bit, and float32 if PyTorch allows TF32.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.kernels import registry, tuning
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.native import gemm_tiles as tiles
from fused_resnet.kernels.problem import Gemm, Problem
from fused_resnet.kernels.target import Target

STEM = -1
_STEP_BYTES = 128  # of channels per step (csrc/cuda/convolution/tiles.h)
_MAX_CORNER = 128  # pixels, of a corner of the TMA's im2col box


@dataclass(frozen=True)
class CudaConfig:
    """tile: an index of `tiles()`, or STEM, the stem's specialised kernel. splits: the number of
    thread blocks among which the steps of a tile are divided."""

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


def _itemsize(operands: str) -> int:
    return 4 if operands in ("tf32", "float32") else 2


def is_stem(gemm: Gemm) -> bool:
    """Whether this is a 7x7 convolution of stride 2, 3 channels and 64 outputs in 16 bits. A `Gemm`
    has no padding and dilation; `GpuConv` checks those."""
    shape = (gemm.K, gemm.C, gemm.R, gemm.S, gemm.groups, gemm.stride)
    return shape == (64, 3, 7, 7, 1, 2) and gemm.operands in ("bfloat16", "float16")


def supports(problem: Problem, target: Target) -> str | None:
    """None if a tile computes the convolution, else the reason in one line."""
    gemm = problem.gemm()
    elements = 16 // _itemsize(gemm.operands)
    if gemm.operands not in ("bfloat16", "float16", "tf32"):
        return f"the CUDA convolution multiplies 16-bit and TF32 operands, not {gemm.operands}"
    if target.capability < (8, 0):
        return f"the CUDA convolution needs a GPU of sm_80 or later, not {target.architecture}"
    if gemm.groups > 1 and gemm.C % elements:
        return f"the channels of a group must be a multiple of {elements}, got {gemm.C}"
    if gemm.K // gemm.groups % elements:
        return f"the outputs of a group must be a multiple of {elements}, got {gemm.K}"
    if gemm.M >= 2**31 - 1025:  # the end of the last tile must fit in an int
        return "the output has more than 2^31 pixels"
    return None if tiles() else "the native build has no tiles of the CUDA convolution"


def reaches(problem: Problem) -> bool:
    """Whether the TMA can address this convolution in Hopper's kernel; same conditions as
    covers_sm90 in csrc/cuda/convolution/sm90/launch.cu."""
    (_, C, *kernel), g = problem.weight_shape, problem.geometry
    if (kernel, g.stride, g.padding) == ([1, 1], (1, 1), (0, 0)):
        return True
    if g.groups > 1 and C % (_STEP_BYTES // 2) != 0:
        return False

    def fits(size: int, stride: int, padding: int, dilation: int) -> bool:
        reach = (size - 1) * dilation
        upper = padding - reach  # the corner; the stride may leave a remainder up to stride - 1
        corners = padding <= _MAX_CORNER and upper - (stride - 1) >= -_MAX_CORNER
        return corners and upper < _MAX_CORNER and reach < 2 * _MAX_CORNER and stride <= 8

    return all(map(fits, kernel, *g[:3]))


def _hopper(gemm: Gemm, target: Target) -> bool:
    """Whether Hopper's tiles support this; `reaches` checks padding and dilation."""
    size, stride, groups = max(gemm.R, gemm.S), gemm.stride, gemm.groups
    return (
        target.architecture == "sm_90a"
        and _itemsize(gemm.operands) == 2
        and (groups == 1 or gemm.C % (_STEP_BYTES // 2) == 0 or size == stride == 1)
        and size <= _MAX_CORNER
        and stride <= 8
    )


def _steps(gemm: Gemm) -> int:
    elements = 16 // _itemsize(gemm.operands)
    channels = math.ceil(gemm.C / elements) * 16
    return math.ceil(gemm.R * gemm.S * channels / _STEP_BYTES)


def candidates(gemm: Gemm, target: Target) -> list[CudaConfig]:
    stem = [CudaConfig(STEM)] if is_stem(gemm) else []
    return stem + _tile_configs(gemm, _hopper(gemm, target))


def _tile_configs(gemm: Gemm, hopper: bool) -> list[CudaConfig]:
    configs = []
    for index, tile in enumerate(tiles()):
        if tile["architecture"] == 90 and not hopper:
            continue
        steps = _steps(gemm) if tile["architecture"] == 80 else 1
        configs += [CudaConfig(index, s) for s in tuning.splits(tile["block_m"], steps)]
    return configs


def choose(gemm: Gemm, target: Target, processors: int) -> CudaConfig:
    """For a problem without measurements: the stem's kernel for the stem, else a tile."""
    return CudaConfig(STEM) if is_stem(gemm) else _cheapest(gemm, processors, _hopper(gemm, target))


def choose_tile(problem: Problem, target: Target, processors: int) -> CudaConfig:
    """The tile with the least estimated time for a convolution of any padding and dilation."""
    gemm = problem.gemm()
    return _cheapest(gemm, processors, reaches(problem) and _hopper(gemm, target))


@functools.lru_cache(maxsize=4096)
def fitting(config: CudaConfig, problem: Problem, target: Target, processors: int) -> CudaConfig:
    """`config` if its kernel supports this convolution, else a tile that does. Winners are stored
    per `Gemm`, which has no padding and dilation, and per GPU, regardless of the build."""
    hopper = config.tile != STEM and tiles()[config.tile]["architecture"] == 90
    fits = not hopper or (reaches(problem) and _hopper(problem.gemm(), target))
    if config.tile == STEM or not fits:
        return choose_tile(problem, target, processors)
    return config


@functools.lru_cache(maxsize=4096)
def _cheapest(gemm: Gemm, processors: int, hopper: bool) -> CudaConfig:
    """The tile with the least estimated time, in products per multiprocessor.

    A step of a wave of tiles takes the longer of the times of its products and of its loads; 64
    products take as long as loading one operand from L2 (1024 dense 16-bit products and 16 loaded
    elements per cycle). wgmma multiplies about 1.6 times as fast as mma.sync on the same chip.
    Filling the pipeline and the epilogue of a tile take about as long as four steps; on Hopper the
    next tile's steps hide that.
    """

    def cost(config: CudaConfig) -> float:
        tile = tiles()[config.tile]
        m, n = tile["block_m"], tile["block_n"]
        bulk = tile["architecture"] == 90
        over_n = math.ceil(gemm.K // gemm.groups / n) * gemm.groups
        waves = math.ceil(math.ceil(gemm.M / m) * over_n * config.splits / processors)
        per_step = max(m * n / (1.6 if bulk else 1.0), 64 * (m + n))
        steps = math.ceil(_steps(gemm) / config.splits)
        extra = 4 + waves * steps if bulk else waves * (steps + 4)
        # Splits write and read partial sums, estimated at 10 %.
        return extra * per_step * (1.0 if config.splits == 1 else 1.1)

    return min(_tile_configs(gemm, hopper), key=cost)


def pack_stem(weight: Tensor) -> Tensor:
    """weight (64, 3, 7, 7) -> (64, 7, 8, 4); the eighth tap and the fourth channel are zeros."""
    return F.pad(weight, (0, 1, 0, 0, 0, 1)).permute(0, 2, 3, 1).contiguous()


def run_stem(conv: Any, x: Tensor, pool: bool) -> Tensor:
    """x (N, 3, H, W) of any layout -> y (N, 64, P, Q), max-pooled if `pool`."""
    if x.dtype not in (torch.float32, conv.dtype):
        x = x.to(conv.dtype)
    weight = conv.cached("stem", lambda: pack_stem(conv.weight))
    return ops(x).stem(x, weight, conv.scale, conv.shift, pool)


def run_conv(
    conv: Any,
    x: Tensor,
    residual: Tensor | None,
    activation: Activation,
    y: Tensor,
    config: CudaConfig,
) -> None:
    """Writes the output of a `GpuConv` to y. x, residual, y: channels_last."""
    elements = 16 // x.element_size()
    weight = conv.weight  # (K, C / groups, R, S), (K, R, S, C / groups) in memory
    more = -weight.shape[1] % elements
    if more:
        x = F.pad(x, (0, 0, 0, 0, 0, more)).contiguous(memory_format=torch.channels_last)
        weight = conv.cached("native", lambda: F.pad(conv.weight, (0, 0, 0, 0, 0, more)))
    x, weight = aligned(x), aligned(weight.contiguous(memory_format=torch.channels_last))
    K, C, R, S = weight.shape
    rows = weight.as_strided((K, R, S, C), (R * S * C, S * C, C, 1))
    if residual is not None:
        residual = aligned(residual)
    ops(x).implicit_gemm(
        x, rows, conv.scale, conv.shift, residual, y, activation,
        *conv.geometry, config.tile, config.splits,
    )  # fmt: skip


def normalises(config: CudaConfig) -> bool:
    """Whether this tile has a kernel that applies a norm and a ReLU to its input as it reads it."""
    return config.tile != STEM and config.splits == 1 and bool(tiles()[config.tile]["normalises"])


def aligned(t: Tensor) -> Tensor:
    """t, or a copy of it, aligned to 16 bytes."""
    return t if t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.preserve_format)


def ops(x: Tensor) -> Any:
    """The CUDA kernels for x's device."""
    return registry.gpu_provider("native", x.device.type).kernels()


def target(device: torch.device) -> Target:
    """What the CUDA kernels for tensors on `device` run on."""
    return registry.gpu_provider("native", device.type).target(device)
