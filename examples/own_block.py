"""A network of one's own: blocks in functional style, one of which decides by its input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + x)


class Early(nn.Module):
    """Stops early where the features are small: torch.fx cannot trace this."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(32), Block(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x if x.mean() < 0.1 else self.second(x)


model = fr.fuse(nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), Early()).eval())
with torch.inference_mode():
    print(model(torch.randn(2, 3, 64, 64)).shape)
for part in fr.explain(model):
    print(part.name, part.path, part.reason)
