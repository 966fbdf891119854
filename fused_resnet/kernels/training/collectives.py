"""What a synchronised norm exchanges between processes: one collective per norm and pass.

    forward    all_gather of mean, M2 = sum (x - mean)^2 and count; every process merges them in the
               order of ranks, so that all get the same bits
    backward   all_reduce of sum g, sum g (x - mean), of both norms of a block's end at once

Sums of x and x^2 would need one all_reduce and cancel for a channel whose mean is large. Counts may
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
    processes, and how many values they have: a float64 of shape (). ValueError, on every process,
    where none of them has a value."""
    own = torch.cat([stats.flatten(), stats.new_tensor([float(count)])])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    mean = torch.zeros_like(stats[0])
    squares, total = torch.zeros_like(mean), 0.0
    for part in gathered:
        n = float(part[-1])
        if n == 0:
            continue
        other, variance = part[:-1].view(2, -1)
        total += n
        off = other - mean
        mean = mean + off * (n / total)
        squares = squares + variance * n + off.square() * (n * (total - n) / total)
    if total == 0:
        raise ValueError(
            "SyncBatchNorm: x must hold an image on one process at least, got none on all of "
            f"{len(gathered)}"
        )
    return torch.stack([mean, squares / total]), stats.new_tensor(total)


def reduce(sums: Tensor, group: Any) -> Tensor:
    """This process's sums (3, C) float64 -> those over all processes."""
    total = sums.clone()
    dist.all_reduce(total, group=group)
    return total
