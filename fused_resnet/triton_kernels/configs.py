"""Tile shapes for the convolution: a short list for each architecture, and how one is chosen.

A tile of BLOCK_M x BLOCK_N needs BLOCK_M * BLOCK_N float32 sums in registers and, at each of its
`stages` steps in flight, (BLOCK_M + BLOCK_N) * BLOCK_K operands in shared memory; it multiplies
BLOCK_M * BLOCK_N / (BLOCK_M + BLOCK_N) times per operand that it loads, so larger is better until
there are too few tiles to fill the chip. 128 x 256 spills registers on every architecture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple


class Problem(NamedTuple):
    """One convolution as a matrix product: M = N * P * Q pixels, K outputs, groups times C * R * S
    products each; stride over the width, which decides what a row of a tile reads; bytes per
    element."""

    M: int
    K: int
    C: int  # per group
    R: int
    S: int
    groups: int
    stride: int
    bytes: int


@dataclass(frozen=True)
class Config:
    """One way to run the kernel."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    splits: int = 1
    persistent: bool = False
    groups_per_tile: int = 1


# 16-bit operands. Shared memory per stage in KiB beside each; sm_80 has 164 (sm_86, sm_89 and
# sm_120: 100), sm_90 and sm_100 have 228.
SIXTEEN_BIT = (
    Config(128, 128, 64, 8, 3),  # 32: the usual one; two fit on a multiprocessor of sm_90
    Config(128, 64, 64, 4, 4),  # 24: layer1 and the narrow 1x1, K = 64
    Config(64, 128, 64, 4, 4),  # 24: few pixels, many outputs: layer4 at small batch
    Config(64, 64, 64, 4, 4),  # 16: small grids
    Config(32, 64, 64, 4, 4),  # 12: 7x7 pixels of one image; wgmma and tcgen05 need 64 rows
    Config(128, 32, 32, 4, 4),  # 10: narrow groups, the stem's runs of 28
    Config(64, 32, 32, 4, 4),  # 6: the same on small grids
)
# float32 in TF32, or as it is: half the elements in the same bytes.
THIRTY_TWO_BIT = (
    Config(128, 128, 32, 8, 3),  # 32
    Config(128, 64, 32, 4, 3),  # 24
    Config(64, 64, 32, 4, 3),  # 16
    Config(32, 64, 32, 4, 3),  # 12
    Config(64, 32, 32, 4, 3),  # 12: narrow groups
)
SMALL_SHARED_BYTES = 99 * 1024  # what a program may have on sm_86, sm_89 and sm_120


def shared_bytes(config: Config, element_bytes: int) -> int:
    """Shared memory that the operands of all stages take."""
    return (config.block_m + config.block_n) * config.block_k * element_bytes * config.stages


def configs(element_bytes: int, capability: tuple[int, int]) -> list[Config]:
    """The list for operands of so many bytes on such a GPU."""
    table = SIXTEEN_BIT if element_bytes == 2 else THIRTY_TWO_BIT
    if capability[0] in (9, 10):
        table = tuple(c for c in table if c.block_m >= 64)
    if capability in ((8, 6), (8, 9)) or capability[0] >= 12:
        fits = []
        for c in table:
            stages = c.stages
            while shared_bytes(replace(c, stages=stages), element_bytes) > SMALL_SHARED_BYTES:
                stages -= 1
            fits.append(replace(c, stages=stages))
        return fits
    return list(table)


def groups_per_tile(problem: Problem, block_n: int, block_k: int) -> int:
    """How many whole groups a tile covers; 1 where groups are wide or do not divide a tile."""
    outputs = problem.K // problem.groups
    if problem.groups == 1 or outputs >= block_n or block_k <= problem.C:
        return 1
    several = min(block_n // outputs, block_k // problem.C, problem.groups)
    several = 1 << (several.bit_length() - 1)
    return several if problem.groups % several == 0 else 1


def fitted(config: Config, problem: Problem) -> Config:
    """`config` with as many groups per tile as this problem allows."""
    several = groups_per_tile(problem, config.block_n, config.block_k)
    return replace(config, groups_per_tile=several)


def tiles(config: Config, problem: Problem) -> int:
    over_m = math.ceil(problem.M / config.block_m)
    if config.groups_per_tile > 1:
        return over_m * math.ceil(problem.groups / config.groups_per_tile)
    return over_m * problem.groups * math.ceil(problem.K // problem.groups / config.block_n)


def steps(config: Config, problem: Problem) -> int:
    channels = problem.C * config.groups_per_tile
    return problem.R * problem.S * math.ceil(channels / config.block_k)


def work(config: Config, problem: Problem, processors: int) -> float:
    """An estimate of time to compare configurations by, in products per multiprocessor: waves of
    tiles, each step's products or, where a step loads more than it multiplies, its loads."""
    shared_by = max(config.splits, 1)
    waves = math.ceil(tiles(config, problem) * shared_by / processors)
    per_step = (
        max(
            config.block_m * config.block_n,
            # 64 products in the time of one operand from L2: 1024 dense 16-bit products and 16
            # loaded elements a cycle.
            64 * (config.block_m + config.block_n),
        )
        * config.block_k
    )
    # Filling the pipeline and finishing a tile take about as long as four steps.
    return waves * (math.ceil(steps(config, problem) / shared_by) + 4) * per_step


MOST_SPLITS = 8


def candidates(problem: Problem, capability: tuple[int, int]) -> list[Config]:
    """Every configuration worth measuring for this problem."""
    found = []
    for listed in configs(problem.bytes, capability):
        config = fitted(listed, problem)
        splits = 1
        while splits <= MOST_SPLITS and (splits == 1 or steps(config, problem) >= 4 * splits):
            found.append(replace(config, splits=splits))
            splits *= 2
        if capability >= (9, 0):
            # Fewer, longer programs: a tile's finish overlaps the next one's first loads.
            found.append(replace(config, persistent=True))
    return found


def choose(problem: Problem, capability: tuple[int, int], processors: int) -> Config:
    """The configuration for a problem that nobody has measured: the least `work`."""

    def cost(config: Config) -> float:
        # Partial sums are written and read once more.
        return work(config, problem, processors) * (1.0 if config.splits == 1 else 1.1)

    return min((c for c in candidates(problem, capability) if not c.persistent), key=cost)
