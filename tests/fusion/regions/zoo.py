"""Modules of users that `fuse` and the compiler's backend are tried on, by name."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr
from tests.fusion.regions.region_helpers import Residual, conv


class Gated(Residual):
    """Control flow that depends on data: torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() > 0 else self.inner(x)


class Twice(nn.Module):
    """A convolution used twice, once before a norm; a norm's output read before its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(16, 16), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return F.relu(y) + self.conv(y) + y.sigmoid()


class InPlace(nn.Module):
    """Values that are written after they were read, and read after they were written."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.third, self.norm = conv(16, 16), conv(16, 16), nn.BatchNorm2d(16)
        self.last = Residual()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = y + 1
        y.relu_()
        w = self.norm(self.third(y))
        v = w.view(w.shape)
        w.mul_(2)
        return self.last(F.relu(v + z) + y)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.norm = (
            conv(16, 32),
            nn.ConvTranspose2d(32, 16, 2, 2),
            nn.BatchNorm2d(16),
        )
        self.down = conv(16, 16, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.up(self.conv(input=x)))
        return {
            "low": F.relu(F.max_pool2d(y, 2) + self.down(x)),
            "high": [y.flatten(1), y.shape[2]],
        }


class Folded(nn.Module):
    """As exported networks are: no norm is left."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (conv(16, 16, bias=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return F.relu(self.c(F.relu(self.b(y))) + y)


class Dense(nn.Module):
    """Norms first, features concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(16), conv(16, 16)
        self.norm2, self.conv2 = nn.BatchNorm2d(32), conv(32, 16)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu(self.norm1(x)))
        y = torch.cat([x, y], 1)
        return F.interpolate(self.conv2(self.relu(self.norm2(y))), scale_factor=2.0)


def sequential(activation: nn.Module | None = None, **norm: Any) -> nn.Module:
    return nn.Sequential(
        conv(16, 32), nn.BatchNorm2d(32, **norm), activation or nn.ReLU(inplace=True),
        nn.Dropout(0.5), nn.Sequential(conv(32, 16, 1), nn.BatchNorm2d(16)),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(),
    )  # fmt: skip


MODELS: dict[str, Any] = {
    "residual": Residual, "data-dependent": Gated, "used twice": Twice, "in place": InPlace,
    "keywords": Keywords, "folded": Folded, "norms first": Dense, "sequential": sequential,
    "no affine": lambda: sequential(affine=False), "cumulative": lambda: sequential(momentum=None),
    "no statistics": lambda: sequential(track_running_stats=False),
    **{type(a).__name__: (lambda a=a: sequential(copy.deepcopy(a)))
       for a in (nn.GELU(), nn.SiLU(), nn.ReLU6(), nn.LeakyReLU(0.1))},
    "torchvision block": lambda: nn.Sequential(conv(16, 16), fr.BasicBlock(16, 16), Residual()),
}  # fmt: skip
