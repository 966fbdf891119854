"""Forwards for torchvision's residual blocks: pure layers, whose state is the adopting module's."""

from __future__ import annotations

from torch import Tensor, nn

from .functional import norm_add_relu


class BasicBlock(nn.Module):
    has_backward: bool = False
    conv1: nn.Module
    bn1: nn.Module
    conv2: nn.Module
    bn2: nn.Module
    downsample: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = norm_add_relu(self.conv1(x), self.bn1)
        return norm_add_relu(self.conv2(out), self.bn2, identity)


class Bottleneck(nn.Module):
    has_backward: bool = False
    conv1: nn.Module
    bn1: nn.Module
    conv2: nn.Module
    bn2: nn.Module
    conv3: nn.Module
    bn3: nn.Module
    downsample: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = norm_add_relu(self.conv1(x), self.bn1)
        out = norm_add_relu(self.conv2(out), self.bn2)
        return norm_add_relu(self.conv3(out), self.bn3, identity)
