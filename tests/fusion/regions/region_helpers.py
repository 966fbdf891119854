"""Blocks of users, and how results are compared."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.fusion.regions.program import Program
from fused_resnet.fusion.regions.region import regions_of
from tests.models.model_helpers import agree

LAST = torch.channels_last


def calibrated(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with norms like a trained one's, in eval mode."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                if m.affine:
                    m.weight.uniform_(0.5, 1.5)
                    m.bias.normal_(0, 0.3)
                if m.running_var is not None:
                    m.running_mean.normal_(0, 0.3)
                    m.running_var.uniform_(0.5, 2)
    return model.eval()


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **{"bias": False, **options})


class Residual(nn.Module):
    """A user's block, in functional style."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.first, self.second = conv(channels, channels), conv(channels, channels)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.first(x)))
        return torch.relu(torch.add(self.norm2(self.second(y)), x))


def leaves(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value)


def outputs_agree(mine: Any, stock: Any) -> None:
    assert torch.utils._pytree.tree_structure(mine) == torch.utils._pytree.tree_structure(stock)
    for a, b in zip(leaves(mine), leaves(stock), strict=True):
        if isinstance(b, Tensor):
            assert a.stride() == b.stride() and a.dtype == b.dtype
            agree(a, b)
        else:
            assert a == b


def programs(model: nn.Module) -> list[Program]:
    found = [p for *_, region in regions_of(model) for p in region._programs.values()]
    return [p for p in found if isinstance(p, Program)]
