"""ResNets for small images, of any depth: He et al. 2015, "Deep Residual Learning for Image
Recognition" (1512.03385), section 4.2, and He et al. 2016, "Identity Mappings in Deep Residual
Networks" (1603.05027).

A 3x3 convolution with 16 channels and no pooling, then three stages of n blocks each, of 16, 32 and
64 channels (four times as many for bottlenecks), and global average pooling.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet import fusion
from fused_resnet.checks import one_of
from fused_resnet.fusion import NetworkNames
from fused_resnet.layers.conv import conv1x1, conv3x3
from fused_resnet.layers.planned import Planned
from fused_resnet.layers.shortcut import PadShortcut
from fused_resnet.layers.sync_batch_norm import agreed

from .preact import PlainPreactBlock, PlainPreactBottleneck, PreactBlock, PreactBottleneck
from .resnet import BASIC, STEM, BasicBlock

__all__ = ["CifarBlock", "CifarResNet", "PlainBlock", "PreactResNet", "cifar_resnet"]

SHORTCUTS = ("identity", "projection", "none")
BLOCKS = ("basic", "preact", "preact_bottleneck")
PLAIN = BASIC._replace(downsample=None)
STAGES = ("layer1", "layer2", "layer3")
NETWORK = NetworkNames(STEM._replace(pool=None), STAGES, running="running")
PREACT_NETWORK = NetworkNames("conv1", STAGES, norm=("bn", "relu"), running="running")
WIDTHS = (16, 32, 64)  # planes of the three stages


class CifarBlock(BasicBlock):
    """y = relu(bn2(conv2(relu(bn1(conv1(x))))) + x), as BasicBlock.

    downsample: None, a PadShortcut, or a 1x1 convolution and its norm. survival: the probability
    with which the network runs the block's residual branch in a training step. The branch's output
    is divided by it, so that its expectation equals its output in inference.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.survival = 1.0

    def _residual(self, x: Tensor) -> Tensor:
        """The output of the residual branch."""
        z = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return z / self.survival if self.training and self.survival < 1 else z

    def _run(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self._residual(x) + shortcut)

    def skip(self, x: Tensor) -> Tensor:
        """The block without its residual branch; x (N, inplanes, H, W) is the output of a ReLU."""
        if self.downsample is None:
            return x
        if isinstance(self.downsample, PadShortcut):
            return self.downsample(x)
        y = fusion.run_projection(self, BASIC, x)
        return self.relu(self.downsample(x)) if y is None else y


class PlainBlock(CifarBlock):
    """BasicBlock's layers without its shortcut: y = relu(bn2(conv2(relu(bn1(conv1(x))))))."""

    _names = PLAIN

    def _run(self, x: Tensor) -> Tensor:
        return self.relu(self._residual(x))


class CifarResNet(Planned):
    """A residual network for small images, or a plain one.

    x: (N, 3, H, W), normalised, usually 32 x 32 -> (N, num_classes) logits.
    blocks_per_stage: n.
    shortcut: where shapes differ, "identity" (option A: strided, padded with zeros, no parameters)
    or "projection" (option B: a 1x1 convolution); or "none" (the plain network: the same layers
    without shortcuts).
    stochastic_depth: the probability with which the last block is skipped in a training step; it
    grows linearly from the first block (Huang et al. 2016, 1603.09382). A skipped block computes
    and saves nothing.
    zero_init_residual: each block starts as its shortcut. norm_layer: as for ResNet. block: "basic"
    (None). torch.jit.script is supported, except for training with stochastic depth.
    """

    kinds: tuple[str, ...] = ("basic",)  # allowed values of `block`, the default first
    first_norm = True  # whether norm and ReLU follow the first convolution
    __constants__ = ("first_norm",)

    def __init__(
        self,
        blocks_per_stage: int,
        num_classes: int = 10,
        shortcut: str = "identity",
        *,
        stochastic_depth: float = 0.0,
        zero_init_residual: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        block: str | None = None,
    ) -> None:
        super().__init__()
        block = self.kinds[0] if block is None else block
        if block not in self.kinds:
            raise ValueError(
                f"{type(self).__name__}: block must be {' or '.join(self.kinds)}, got {block!r}"
            )
        one_of("cifar_resnet: shortcut", shortcut, SHORTCUTS)
        if not 0 <= stochastic_depth < 1:
            raise ValueError(
                f"cifar_resnet: stochastic_depth must be in [0, 1), got {stochastic_depth}"
            )
        if stochastic_depth and shortcut == "none":
            raise ValueError("cifar_resnet: stochastic_depth needs a shortcut, got shortcut='none'")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(3, WIDTHS[0])
        if self.first_norm:
            self.bn1 = norm_layer(WIDTHS[0])
            self.relu = nn.ReLU(inplace=True)
        channels = WIDTHS[0]
        stages = [nn.Sequential() for _ in WIDTHS]
        for i, (width, stage) in enumerate(zip(WIDTHS, stages, strict=True)):
            for j in range(blocks_per_stage):
                stride = 2 if i > 0 and j == 0 else 1
                first = i == j == 0
                new = _make_block(block, shortcut, channels, width, stride, norm_layer, first)
                channels = width * new.expansion
                stage.append(new)
        self.layer1, self.layer2, self.layer3 = stages
        if not self.first_norm:
            self.bn = norm_layer(channels)
            self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        every = [b for stage in self.stages() for b in stage]
        for i, b in enumerate(every):
            b.survival = 1.0 - stochastic_depth * (i + 1) / len(every)
            if zero_init_residual and shortcut != "none":
                last: Any = b.bn2 if self.first_norm else (getattr(b, "conv3", None) or b.conv2)
                nn.init.zeros_(last.weight)
        self._drops = stochastic_depth > 0

    def stages(self) -> list[Any]:
        return [self.layer1, self.layer2, self.layer3]

    def running(self) -> list[list[Callable[[Tensor], Tensor]]]:
        """The callables that this forward runs per stage: blocks, or the shortcuts of blocks that
        stochastic depth skips."""
        if not (self.training and self._drops):
            return [list(stage) for stage in self.stages()]
        drawn = torch.rand(sum(map(len, self.stages())), device="cpu", dtype=torch.float32)
        draws = iter(agreed(drawn, self.modules(), self.conv1.weight.device).tolist())
        stages = []
        for stage in self.stages():
            calls: list[Callable[[Tensor], Tensor]] = []
            for b in stage:
                if next(draws) < b.survival:
                    calls.append(b)
                elif b.downsample is not None or getattr(b, "activation_shared", False):
                    calls.append(b.skip)
            stages.append(calls)
        return stages

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            y = fusion.run_network(self, NETWORK if self.first_norm else PREACT_NETWORK, x)
            if y is not None:
                return y
        x = self.conv1(x)
        if self.first_norm:
            x = self.relu(self.bn1(x))
        if torch.jit.is_scripting():
            assert not (self.training and self._drops), (
                "stochastic_depth is not supported by torch.jit.script: call eval()"
            )
            x = self.layer3(self.layer2(self.layer1(x)))
        else:
            for stage in self.running():
                for run in stage:
                    x = run(x)
        if not self.first_norm:
            x = self.relu(self.bn(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class PreactResNet(CifarResNet):
    """A network of pre-activation blocks: no norm and ReLU after the first convolution, but after
    the last block. Otherwise as CifarResNet.

    block: "preact" (None) or "preact_bottleneck". A projection has no norm, and its input is the
    output of the block's first ReLU, as for the identity shortcut of the network's first block.
    """

    kinds = BLOCKS[1:]
    first_norm = False


fusion.register(
    {
        CifarBlock: BASIC,
        PlainBlock: PLAIN,
        CifarResNet: NETWORK,
        PreactResNet: PREACT_NETWORK,
    }
)

_CLASSES: dict[str, tuple[Any, Any]] = {
    "basic": (CifarBlock, PlainBlock),
    "preact": (PreactBlock, PlainPreactBlock),
    "preact_bottleneck": (PreactBottleneck, PlainPreactBottleneck),
}


def _make_block(
    kind: str, shortcut: str, before: int, planes: int, stride: int, norm_layer: Any, first: bool
) -> Any:
    """A block with `before` input channels; first: whether it is the network's first block."""
    cls = _CLASSES[kind][shortcut == "none"]
    after = planes * cls.expansion
    downsample: nn.Module | None = None
    if shortcut != "none" and (before != after or stride != 1):
        if shortcut == "identity":
            downsample = PadShortcut(before, after, stride)
        else:
            downsample = conv1x1(before, after, stride)
    if kind == "basic":
        if isinstance(downsample, nn.Conv2d):
            downsample = nn.Sequential(downsample, norm_layer(after))
        return cls(before, planes, stride, downsample, norm_layer=norm_layer)
    shared = first or isinstance(downsample, nn.Conv2d)
    return cls(before, planes, stride, downsample, norm_layer, shared)


def cifar_resnet(
    depth: int,
    num_classes: int = 10,
    shortcut: str = "identity",
    block: str = "basic",
    **config: Any,
) -> CifarResNet:
    """ResNet of `depth` layers for small images, or a plain network of the same layers.

    depth: 6n + 2 (20, 32, 44, 56, 110, 1202, ...); with bottlenecks, which are four times as wide,
    9n + 2 (164, 1001, ...). shortcut: "identity", "projection" or "none"; block: "basic",
    "preact" or "preact_bottleneck"; config: stochastic_depth, zero_init_residual, norm_layer, as
    for CifarResNet.
    x: (N, 3, H, W) -> (N, num_classes). Parameters: 0.27 M at depth 20, 1.7 M at 110, 19.4 M at
    1202. Raises ValueError that names the allowed values, for depth the two nearest.
    Source: He et al. 2015 (1512.03385), section 4.2; He et al. 2016 (1603.05027), section 4.
    """
    one_of("cifar_resnet: block", block, BLOCKS)
    per_block = 9 if block == "preact_bottleneck" else 6
    whole = isinstance(depth, int) and not isinstance(depth, bool)
    if not whole or depth < per_block + 2 or depth % per_block != 2:
        below, above = nearest_depths(depth if whole else 20, per_block)
        raise ValueError(
            f"cifar_resnet: depth must be {per_block}n + 2, as {below} or {above}, got {depth!r}"
        )
    cls = CifarResNet if block == "basic" else PreactResNet
    n = (depth - 2) // per_block
    return cls(n, num_classes, shortcut, block=block, **config)


def nearest_depths(depth: int, per_block: int) -> tuple[int, int]:
    """The depths per_block * n + 2 around `depth`, lower and upper."""
    n = max(1, (depth - 2) // per_block)
    return n * per_block + 2, (n + 1) * per_block + 2


def named(name: str) -> int | None:
    """The depth in a name like "cifar_resnet20"; None for any other name.

    Raises ValueError if there is no network of that depth."""
    match = re.fullmatch(r"cifar_resnet(\d+)", name)
    if match is None:
        return None
    depth = int(match[1])
    if depth < 8 or depth % 6 != 2:
        below, above = nearest_depths(depth, 6)
        raise ValueError(
            f"{name}: depth must be 6n + 2, as cifar_resnet{below} or cifar_resnet{above}"
        )
    return depth
