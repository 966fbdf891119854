"""The ResNets for small images: He et al. 2015, "Deep Residual Learning for Image Recognition"
(1512.03385), section 4.2.

A 3x3 convolution with 16 channels and no pooling, then three stages of n basic blocks each, of 16,
32 and 64 channels; depth = 6n + 2. Shortcuts that change the shape are option A's: strided, padded
with zeros, without parameters. The stages are fused as in the other family.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, nn

from . import blocks, network, plans
from .resnet import BasicBlock, conv3x3, list_models
from .shortcut import PadShortcut

__all__ = ["CifarResNet", "cifar_resnet", "depth_of"]

WIDTHS = (16, 32, 64)  # channels of the three stages


class CifarResNet(nn.Module):
    """x: (N, 3, H, W), normalised, usually 32 x 32 -> (N, num_classes) logits.

    blocks_per_stage: n of the paper; norm_layer: as for ResNet.
    """

    def __init__(
        self,
        blocks_per_stage: int,
        num_classes: int = 10,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(3, WIDTHS[0])
        self.bn1 = norm_layer(WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(blocks_per_stage, WIDTHS[0], WIDTHS[0], 1, norm_layer)
        self.layer2 = _stage(blocks_per_stage, WIDTHS[0], WIDTHS[1], 2, norm_layer)
        self.layer3 = _stage(blocks_per_stage, WIDTHS[1], WIDTHS[2], 2, norm_layer)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(WIDTHS[-1], num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def train(self, mode: bool = True) -> CifarResNet:
        plans.forget(self)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        stem: Optional[Tensor] = None  # noqa: UP045 - TorchScript reads it
        if not torch.jit.is_scripting():
            y = network.run_resnet(self, x)
            if y is None:
                y = network.run_in_segments(self, x)
            if y is not None:
                return y
            stem = blocks.run_stem(self, x)
        if stem is not None:
            x = stem
        else:
            x = self.conv1(x)
            x = self.bn1(x)
            x = self.relu(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


def _stage(
    count: int, before: int, width: int, stride: int, norm_layer: Callable[..., nn.Module]
) -> nn.Sequential:
    """`count` blocks of `width` channels, the first of which comes from `before` channels."""
    shortcut = None if stride == 1 and before == width else PadShortcut(before, width, stride)
    first = BasicBlock(before, width, stride, shortcut, norm_layer=norm_layer)
    rest = (BasicBlock(width, width, norm_layer=norm_layer) for _ in range(count - 1))
    return nn.Sequential(first, *rest)


def cifar_resnet(depth: int, num_classes: int = 10, **config: Any) -> CifarResNet:
    """ResNet of `depth` = 6n + 2 layers for small images: 0.27 M parameters at depth 20, 0.46 M at
    32, 0.66 M at 44, 0.85 M at 56, 1.7 M at 110.

    x: (N, 3, H, W) -> (N, num_classes). config: as for CifarResNet. ValueError names the two
    nearest depths where there is none of this one.
    Source: He et al. 2015 (1512.03385), section 4.2 and table 6.
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 8 or depth % 6 != 2:
        raise ValueError(f"cifar_resnet: depth must be 6n + 2, {_nearest(depth)}, got {depth!r}")
    return CifarResNet((depth - 2) // 6, num_classes, **config)


def _nearest(depth: Any, taken: tuple[int, ...] = ()) -> str:
    """ "as 14 or 20", the two depths about `depth`; those in `taken` are another family's."""
    try:
        below = above = max(8, int(depth))
    except (TypeError, ValueError):
        return "as 20 or 56"
    while below > 8 and (below % 6 != 2 or below in taken):
        below -= 1
    above = max(above, below + 1)
    while above % 6 != 2 or above in taken:
        above += 1
    return f"as {below} or {above}"


def depth_of(name: str) -> int | None:
    """The depth of "resnet20" and the like; None where `name` is of the torchvision family, or no
    such name at all. ValueError where there is no such depth."""
    found = re.fullmatch(r"resnet(\d+)", name)
    if found is None or name in list_models():
        return None
    depth = int(found[1])
    if depth < 8 or depth % 6 != 2:
        named = [re.fullmatch(r"resnet(\d+)", n) for n in list_models()]
        taken = tuple(int(n[1]) for n in named if n is not None)
        raise ValueError(
            f"no ResNet has {depth} layers: for small images depth is 6n + 2, "
            f"{_nearest(depth, taken)}"
        )
    return depth
