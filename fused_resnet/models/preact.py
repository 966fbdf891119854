"""Pre-activation blocks: He et al. 2016, "Identity Mappings in Deep Residual Networks"
(1603.05027).

Norm and ReLU come before each convolution, and nothing after the addition, so that the identity
path carries activations and gradients between any two blocks unchanged.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fused_resnet import fusion
from fused_resnet.layers.conv import conv1x1, conv3x3

from .resnet import BASIC, BOTTLENECK, FusedBlock

__all__ = ["PlainPreactBlock", "PlainPreactBottleneck", "PreactBlock", "PreactBottleneck"]

PREACT = BASIC._replace(norm_first=True)
PREACT_BOTTLENECK = BOTTLENECK._replace(norm_first=True)
PREACT_PLAIN = PREACT._replace(downsample=None)
PREACT_PLAIN_BOTTLENECK = PREACT_BOTTLENECK._replace(downsample=None)


class PreactBlock(FusedBlock):
    """y = conv2(relu(bn2(conv1(relu(bn1(x)))))) + x, two 3x3 convolutions.

    x: (N, inplanes, H, W) -> (N, planes, H / stride, W / stride). downsample: a PadShortcut or a
    1x1 convolution where the shapes differ. activation_shared: the input of the shortcut is
    relu(bn1(x)), as in a network's first block and where the shortcut is a convolution.
    """

    expansion: int = 1
    _names = PREACT

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        activation_shared: bool = False,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride
        self.activation_shared = activation_shared
        self.survival = 1.0
        self._add_layers(inplanes, planes, stride, norm_layer)

    def _add_layers(self, inplanes: int, planes: int, stride: int, norm_layer: Any) -> None:
        """Replaces and adds layers in the classes of other blocks."""

    def _shortcut(self, x: Tensor, h: Tensor) -> Tensor:
        source = h if self.activation_shared else x
        return source if self.downsample is None else self.downsample(source)

    def _residual(self, h: Tensor) -> Tensor:
        """The output of the residual branch; h (N, inplanes, H, W) is relu(bn1(x))."""
        z = self.conv2(self.relu(self.bn2(self.conv1(h))))
        return z / self.survival if self.training and self.survival < 1 else z

    def _run(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(x))
        return self._residual(h) + self._shortcut(x, h)

    def skip(self, x: Tensor) -> Tensor:
        """The block without its residual branch."""
        if not self.activation_shared:
            return self._shortcut(x, x)
        h = fusion.run_norm(self.bn1, self.relu, x)
        return self._shortcut(x, self.relu(self.bn1(x)) if h is None else h)


class PreactBottleneck(PreactBlock):
    """y = conv3(relu(bn3(conv2(relu(bn2(conv1(relu(bn1(x))))))))) + x: 1x1, 3x3, 1x1.

    x: (N, inplanes, H, W) -> (N, 4 * planes, H / stride, W / stride); the stride is in the 3x3
    convolution. Arguments as for PreactBlock.
    """

    expansion: int = 4
    _names = PREACT_BOTTLENECK

    def _add_layers(self, inplanes: int, planes: int, stride: int, norm_layer: Any) -> None:
        self.conv1 = conv1x1(inplanes, planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn3 = norm_layer(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)

    def _residual(self, h: Tensor) -> Tensor:
        z = self.conv2(self.relu(self.bn2(self.conv1(h))))
        z = self.conv3(self.relu(self.bn3(z)))
        return z / self.survival if self.training and self.survival < 1 else z


class PlainPreactBlock(PreactBlock):
    """PreactBlock's layers without its shortcut."""

    _names = PREACT_PLAIN

    def _run(self, x: Tensor) -> Tensor:
        return self._residual(self.relu(self.bn1(x)))


class PlainPreactBottleneck(PreactBottleneck):
    """PreactBottleneck's layers without its shortcut."""

    _names = PREACT_PLAIN_BOTTLENECK

    def _run(self, x: Tensor) -> Tensor:
        return self._residual(self.relu(self.bn1(x)))


for _block in (PreactBlock, PreactBottleneck, PlainPreactBlock, PlainPreactBottleneck):
    fusion.register({_block: _block._names})
