"""The communication of a synchronised norm between processes: one collective per norm and pass.

    forward    all_gather of mean, biased variance and count; every process merges them in the order
               of ranks, so that all results are bitwise equal
    backward   all_reduce of sum g, sum g (x - mean), for both norms at a block's end at once

Sums of x and x^2 would need one all_reduce, but cancel for a channel with a large mean. Counts may
differ between processes, and be 0 on some (empty.py).

Source: Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def merge(stats: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor]:
    """This process's mean and biased variance over `count` values, (2, C) float64 -> those over all
    processes, and their total count: float64 of shape (). Raises ValueError on every process where
    the total is 0."""
    local = torch.cat([stats.flatten(), stats.new_tensor([float(count)])])
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    mean = torch.zeros_like(stats[0])
    squares, total = torch.zeros_like(mean), 0.0
    for part in gathered:
        n = float(part[-1])
        if n == 0:
            continue
        part_mean, variance = part[:-1].view(2, -1)
        total += n
        delta = part_mean - mean
        mean = mean + delta * (n / total)
        squares = squares + variance * n + delta.square() * (n * (total - n) / total)
    if total == 0:
        raise ValueError(
            "SyncBatchNorm: x must hold an image on at least one process, got none on all of "
            f"{len(gathered)}"
        )
    return torch.stack([mean, squares / total]), stats.new_tensor(total)


def reduce(sums: Tensor, group: Any) -> Tensor:
    """This process's sums (3, C) float64 -> the sums over all processes."""
    total = sums.clone()
    dist.all_reduce(total, group=group)
    return total
