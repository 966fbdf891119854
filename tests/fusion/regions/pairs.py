"""Pairs of a stock and a fused model with one forward."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import fused_resnet as fr


def images(seed: int = 0, n: int = 2) -> Tensor:
    return torch.randn(n, 16, 8, 8, generator=torch.Generator().manual_seed(seed))


class Pairs(nn.Module):
    """Two convolutions with norms; `body` is what a test tries."""

    flag = False

    def __init__(self, body: Any, **attributes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c1, self.c2 = (nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2))
        self.n1, self.n2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.relu, self.extra = nn.ReLU(inplace=True), nn.Dropout(0.0)
        for norm in (self.n1, self.n2):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
        for name, value in attributes.items():
            setattr(self, name, value)
        self.body = body

    def u1(self, x: Tensor) -> Tensor:
        return self.n1(self.c1(x))

    def u2(self, x: Tensor) -> Tensor:
        return self.n2(self.c2(x))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


def pair(body: Any, training: bool = False, **attributes: Any) -> list[nn.Module]:
    """[fused, stock]"""
    stock = Pairs(body, **attributes).train(training)
    return [fr.fuse(copy.deepcopy(stock)), stock]


def same(found: Any, want: Any) -> None:
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)


# --- writes in place ---
