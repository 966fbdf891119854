"""Constructors of the convolutions of a residual network."""

from __future__ import annotations

from torch import nn


def conv3x3(
    in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """3x3 convolution without bias, padded so that stride 1 preserves height and width."""
    padding = dilation
    return nn.Conv2d(in_planes, out_planes, 3, stride, padding, dilation, groups, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(in_planes, out_planes, kernel_size=1, stride=stride, bias=False)
