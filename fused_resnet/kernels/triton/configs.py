"""Tile shapes of the Triton convolution: a short list per architecture, and a heuristic.

A tile of BLOCK_M x BLOCK_N needs BLOCK_M * BLOCK_N float32 sums in registers (in tensor memory on
sm_100) and, for each of its `stages` steps in flight, (BLOCK_M + BLOCK_N) * BLOCK_K operands in
shared memory. It computes BLOCK_M * BLOCK_N / (BLOCK_M + BLOCK_N) products per loaded operand, so
larger tiles are better until there are too few to fill the chip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fused_resnet.kernels import tuning
from fused_resnet.kernels.problem import Gemm
from fused_resnet.kernels.target import Target


@dataclass(frozen=True)
class Config:
    """The tile, launch options and variant of the kernel."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    resident: int = 2  # programs per multiprocessor, which limits the registers of each
    group_m: int = 8
    splits: int = 1
    persistent: bool = False
    groups_per_tile: int = 1

    def label(self) -> str:
        how = [f"{self.block_m}x{self.block_n}x{self.block_k}", f"{self.warps} warps"]
        how += [f"{self.splits} splits"] if self.splits > 1 else []
        how += ["persistent"] if self.persistent else []
        return ", ".join(how)

    @property
    def registers(self) -> int:
        """The limit of registers per thread. Always set: by default ptxas optimises for more
        resident programs than shared memory allows, and spills."""
        return min(255, REGISTERS // (self.resident * self.warps * 32))


REGISTERS = 65536  # of a multiprocessor, on every architecture here

# The comments give the shared memory of all stages in KiB (16-bit operands; Triton needs one stage
# less if operands are loaded by cp.async and multiplied by mma.sync) and the purpose of the tile.
_MMA_SYNC = (  # sm_80 to sm_89 and sm_120: sums and operands in registers, 164 or 100 KiB
    Config(128, 128, 64, 8, 3, resident=1),  # 64: the default
    Config(128, 64, 64, 4, 4),  # 72: layer1 and narrow 1x1 convolutions, K = 64
    Config(64, 128, 64, 4, 4),  # 72: few pixels, many outputs: layer4 at small batch
    Config(64, 64, 64, 4, 4),  # 48: small grids
    Config(32, 64, 64, 4, 4),  # 36: 7x7 pixels of one image
    Config(128, 64, 32, 4, 4),  # 36: the stem, runs of 28 values
    Config(128, 32, 32, 8, 4, resident=1),  # 30: narrow groups
    Config(64, 32, 32, 4, 4),  # 18: narrow groups on small grids
)
_WARPGROUP = (  # sm_90 (wgmma) and sm_100 (tcgen05): at least 64 rows, 228 KiB
    Config(128, 256, 64, 8, 3, resident=1),  # 144: fewest loads per product, K >= 256
    Config(128, 128, 64, 8, 3),  # 96: the default; one program loads while another finishes
    Config(128, 64, 64, 4, 4),  # 96: layer1 and narrow 1x1 convolutions, K = 64
    Config(64, 128, 64, 4, 4),  # 96: few pixels, many outputs: layer4 at small batch
    Config(64, 64, 64, 4, 4, resident=3),  # 64: small grids
    Config(128, 64, 32, 4, 4),  # 48: the stem, runs of 28 values
    Config(128, 32, 32, 8, 4, resident=1),  # 40: narrow groups
    Config(64, 32, 32, 4, 4),  # 24: narrow groups on small grids
)
# TF32 operands: the same bytes hold half as many elements.
_MMA_SYNC_TF32 = (
    Config(128, 128, 32, 8, 3, resident=1),  # the default
    Config(128, 64, 32, 4, 3),  # K = 64, the stem
    Config(64, 64, 32, 4, 3),  # small grids
    Config(32, 64, 32, 4, 3),  # 7x7 pixels of one image
    Config(64, 32, 32, 4, 3),  # narrow groups
)
_WARPGROUP_TF32 = (
    Config(128, 128, 32, 8, 3, resident=1),  # the default; x is rounded in registers
    Config(128, 64, 32, 4, 3),  # K = 64, the stem
    Config(64, 64, 32, 4, 3),  # small grids
    Config(64, 32, 32, 4, 3),  # narrow groups
)
# float32 without tensor cores: a thread holds its operands of a whole step in registers, so steps
# are short.
_FLOAT32 = (
    Config(64, 64, 16, 8, 3),  # larger tiles spill
    Config(64, 32, 16, 8, 3, resident=1),  # narrow groups, small grids
)
SMALL_SHARED_BYTES = 99 * 1024  # limit per program on sm_86, sm_89 and sm_120
AMD_SHARED_BYTES = 64 * 1024


def shared_bytes(config: Config, operands: str) -> int:
    """Bytes of shared memory of the operands of all stages."""
    element_bytes = 4 if operands in ("tf32", "float32") else 2
    return (config.block_m + config.block_n) * config.block_k * element_bytes * config.stages


def configs(operands: str, target: Target) -> list[Config]:
    """The configurations for operands (see `Gemm`) on the target."""
    if operands == "float32":
        return list(_FLOAT32)
    capability = target.capability
    if capability[0] in (9, 10):
        return list(_WARPGROUP_TF32 if operands == "tf32" else _WARPGROUP)
    table = _MMA_SYNC_TF32 if operands == "tf32" else _MMA_SYNC
    if capability[0] == 8 and capability not in ((8, 6), (8, 9)):
        return list(table)
    limit = AMD_SHARED_BYTES if target.vendor == "amd" else SMALL_SHARED_BYTES
    return [
        replace(c, stages=min(c.stages, limit // shared_bytes(replace(c, stages=1), operands)))
        for c in table
    ]


def groups_per_tile(gemm: Gemm, block_n: int, block_k: int) -> int:
    """The number of whole groups per tile; 1 if groups are wide or do not divide a tile."""
    outputs = gemm.K // gemm.groups
    if gemm.groups == 1 or outputs >= block_n or block_k <= gemm.C:
        return 1
    max_groups = min(block_n // outputs, block_k // gemm.C, gemm.groups)
    return math.gcd(1 << (max_groups.bit_length() - 1), gemm.groups)


def fitted(config: Config, gemm: Gemm) -> Config:
    """`config` with as many groups per tile as this problem allows."""
    groups = groups_per_tile(gemm, config.block_n, config.block_k)
    return replace(config, groups_per_tile=groups)


def tiles(config: Config, gemm: Gemm) -> int:
    over_m = math.ceil(gemm.M / config.block_m)
    if config.groups_per_tile > 1:
        return over_m * math.ceil(gemm.groups / config.groups_per_tile)
    return over_m * gemm.groups * math.ceil(gemm.K // gemm.groups / config.block_n)


def steps(config: Config, gemm: Gemm) -> int:
    channels = gemm.C * config.groups_per_tile
    return gemm.R * gemm.S * math.ceil(channels / config.block_k)


def work(config: Config, gemm: Gemm, processors: int) -> float:
    """The estimated time, in products per multiprocessor, for comparing configurations: waves of
    tiles, each of whose steps takes the longer of the times of its products and of its loads."""
    waves = math.ceil(tiles(config, gemm) * config.splits / processors)
    per_step = (
        max(
            config.block_m * config.block_n,
            # 64 products take as long as loading one operand from L2: 1024 dense 16-bit products
            # and 16 loaded elements per cycle.
            64 * (config.block_m + config.block_n),
        )
        * config.block_k
    )
    # Filling the pipeline and the epilogue of a tile take about as long as four steps.
    return waves * (math.ceil(steps(config, gemm) / config.splits) + 4) * per_step


def candidates(gemm: Gemm, target: Target) -> list[Config]:
    """Every configuration worth measuring for this problem."""
    result = []
    for listed in configs(gemm.operands, target):
        config = fitted(listed, gemm)
        splits = tuning.splits(config.block_m, steps(config, gemm))
        result += [replace(config, splits=s) for s in splits]
        if target.capability >= (9, 0):
            # The epilogue of a tile overlaps the first loads of the next.
            result.append(replace(config, persistent=True))
    return result


def choose(gemm: Gemm, target: Target, processors: int) -> Config:
    """The configuration for a problem without measurements: the one with the least `work`."""

    def cost(config: Config) -> float:
        # Splits write and read partial sums, estimated at 10 %.
        return work(config, gemm, processors) * (1.0 if config.splits == 1 else 1.1)

    return min((c for c in candidates(gemm, target) if not c.persistent), key=cost)
