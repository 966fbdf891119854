"""The ResNet family: torchvision's signatures, module names, initialisation and state_dict.

He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385); the bottleneck
has its stride in the 3x3 convolution (ResNet v1.5). Xie et al. 2016 (1611.05431) for ResNeXt,
Zagoruyko and Komodakis 2016 (1605.07146) for the wide ones.

Each forward first tries `fusion`. If that returns None (under tracing, compilers and transforms,
and after model surgery), torchvision's path runs.
"""

# Annotations are evaluated, not strings, in the modules of models: torch.fx copies them into traced
# graphs, and TorchScript reads them there.
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, nn

from fused_resnet import fusion
from fused_resnet.fusion import Names, NetworkNames
from fused_resnet.layers.conv import conv1x1, conv3x3
from fused_resnet.layers.planned import Block, Planned

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "get_model",
    "list_models",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


BASIC = Names((("conv1", "bn1"), ("conv2", "bn2")))
BOTTLENECK = Names((("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")))
STEM = Names((("conv1", "bn1"),), downsample=None, pool="maxpool")
NETWORK = NetworkNames(STEM, ("layer1", "layer2", "layer3", "layer4"))


class FusedBlock(Block):
    """A block whose forward first tries `fusion` with the names of its submodules, then `_run`."""

    _names: Names

    def _run(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            y = fusion.run_block(self, self._names, x)
            if y is not None:
                return y
        return self._run(x)


class BasicBlock(FusedBlock):
    """y = relu(bn2(conv2(relu(bn1(conv1(x))))) + x), two 3x3 convolutions.

    x: (N, inplanes, H, W) -> (N, planes, H / stride, W / stride); downsample maps x to that shape
    where it differs. Only groups=1, base_width=64 and dilation=1 are supported, as in torchvision.
    """

    expansion: int = 1
    _names = BASIC

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: Optional[nn.Module] = None,  # noqa: UP045 - TorchScript reads it
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not that of a base in torchvision
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"BasicBlock only supports groups=1 and base_width=64, got {groups}, {base_width}"
            )
        if dilation > 1:
            raise NotImplementedError(f"BasicBlock only supports dilation=1, got {dilation}")
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def _run(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(FusedBlock):
    """y = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + x): 1x1, 3x3, 1x1.

    x: (N, inplanes, H, W) -> (N, 4 * planes, H / stride, W / stride). The stride is in the 3x3
    convolution (v1.5); the paper has it in the first.
    """

    expansion: int = 4
    _names = BOTTLENECK

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: Optional[nn.Module] = None,  # noqa: UP045 - TorchScript reads it
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not that of a base in torchvision
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def _run(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(Planned):
    """A residual network for images: stem, four stages of blocks, average pooling, classifier.

    x: (N, 3, H, W), usually 224 x 224, normalised -> (N, num_classes) logits.
    block: BasicBlock, Bottleneck or a subclass; layers: blocks per stage.
    replace_stride_with_dilation: for each of stages 2 to 4, whether dilation replaces the stride.
    norm_layer: called with the number of channels, returns a norm; blocks are fused with
    BatchNorm2d and FrozenBatchNorm2d.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: list[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: list[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not that of a base in torchvision
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        dilate = replace_stride_with_dilation or [False, False, False]
        if len(dilate) != 3:
            raise ValueError(
                f"replace_stride_with_dilation should be None or a 3-element tuple, got {dilate}"
            )
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.constant_(m.weight, 1)
                nn.init.constant_(m.bias, 0)
        # Each block starts as the identity (Goyal et al. 2017, arXiv 1706.02677, section 5.1).
        for m in self.modules():
            if zero_init_residual and isinstance(m, (BasicBlock, Bottleneck)):
                weight: Any = (m.bn3 if isinstance(m, Bottleneck) else m.bn2).weight
                if weight is not None:
                    nn.init.constant_(weight, 0)

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        downsample = None
        dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        if stride != 1 or self.inplanes != planes * block.expansion:
            downsample = nn.Sequential(
                conv1x1(self.inplanes, planes * block.expansion, stride),
                self._norm_layer(planes * block.expansion),
            )
        stage = nn.Sequential()
        for _ in range(max(1, blocks)):
            shape = (self.groups, self.base_width, dilation)
            stage.append(block(self.inplanes, planes, stride, downsample, *shape, self._norm_layer))
            self.inplanes, dilation = planes * block.expansion, self.dilation
            stride, downsample = 1, None
        return stage

    def _forward_impl(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            y = fusion.run_network(self, NETWORK, x)
            if y is not None:
                return y
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


fusion.register({BasicBlock: BASIC, Bottleneck: BOTTLENECK, ResNet: NETWORK})

# name -> block, blocks per stage, arguments that differ from ResNet's defaults
_MODELS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int], dict[str, int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2], {}),
    "resnet34": (BasicBlock, [3, 4, 6, 3], {}),
    "resnet50": (Bottleneck, [3, 4, 6, 3], {}),
    "resnet101": (Bottleneck, [3, 4, 23, 3], {}),
    "resnet152": (Bottleneck, [3, 8, 36, 3], {}),
    "resnext50_32x4d": (Bottleneck, [3, 4, 6, 3], {"groups": 32, "width_per_group": 4}),
    "resnext101_32x8d": (Bottleneck, [3, 4, 23, 3], {"groups": 32, "width_per_group": 8}),
    "resnext101_64x4d": (Bottleneck, [3, 4, 23, 3], {"groups": 64, "width_per_group": 4}),
    "wide_resnet50_2": (Bottleneck, [3, 4, 6, 3], {"width_per_group": 128}),
    "wide_resnet101_2": (Bottleneck, [3, 4, 23, 3], {"width_per_group": 128}),
}


def list_models() -> list[str]:
    """The names that `get_model` accepts."""
    return list(_MODELS)


def get_model(name: str, **config: Any) -> ResNet:
    """The model of that name; `config` as for the function of that name (weights, ...)."""
    if name.lower() not in _MODELS:
        raise ValueError(f"get_model: name must be one of {', '.join(_MODELS)}, got {name!r}")
    return globals()[name.lower()](**config)


def _weights(name: str, weights: Any) -> Any:
    """torchvision's weights enum member for any value that torchvision accepts."""
    if weights is None or weights is False:
        return None
    try:
        from torchvision.models import get_model_weights
    except Exception as error:  # not installed, or built for another torch
        raise RuntimeError(
            f"{name}: weights={weights!r} needs torchvision, which does not import here "
            f"({type(error).__name__}: {error}); pass weights=None and load a state_dict"
        ) from error
    enum = get_model_weights(name)
    if weights is True:  # torchvision's old pretrained=True
        return next(iter(enum))
    if isinstance(weights, str):
        return enum[weights.removeprefix(enum.__name__ + ".")]
    if not isinstance(weights, enum):
        raise TypeError(
            f"{name}: weights must be None, a name or a member of {enum.__name__}, got {weights!r}"
        )
    return weights


def _constructor(name: str, size: str) -> Callable[..., ResNet]:
    """The public function `name`."""
    block, layers, defaults = _MODELS[name]

    def build(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
        weights = _weights(name, weights)
        for key, value in defaults.items():
            if kwargs.setdefault(key, value) != value:
                raise ValueError(f"{name}: {key} must be {value}, got {kwargs[key]}")
        if weights is not None:
            classes = len(weights.meta["categories"])
            if kwargs.setdefault("num_classes", classes) != classes:
                raise ValueError(
                    f"{name}: num_classes must be {classes} with {weights}, "
                    f"got {kwargs['num_classes']}"
                )
        model = ResNet(block, layers, **kwargs)
        if weights is not None:
            model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{size} at 224 x 224.

    weights: torchvision's enum or its name, or None; kwargs: as for ResNet.
    """
    return build


resnet18 = _constructor("resnet18", "ResNet-18: 11.7 M parameters, 1.81 GMAC")
resnet34 = _constructor("resnet34", "ResNet-34: 21.8 M parameters, 3.66 GMAC")
resnet50 = _constructor("resnet50", "ResNet-50 v1.5: 25.6 M parameters, 4.09 GMAC")
resnet101 = _constructor("resnet101", "ResNet-101 v1.5: 44.5 M parameters, 7.80 GMAC")
resnet152 = _constructor("resnet152", "ResNet-152 v1.5: 60.2 M parameters, 11.5 GMAC")
resnext50_32x4d = _constructor("resnext50_32x4d", "ResNeXt-50 32x4d: 25.0 M parameters, 4.23 GMAC")
resnext101_32x8d = _constructor(
    "resnext101_32x8d", "ResNeXt-101 32x8d: 88.8 M parameters, 16.4 GMAC"
)
resnext101_64x4d = _constructor(
    "resnext101_64x4d", "ResNeXt-101 64x4d: 83.5 M parameters, 15.5 GMAC"
)
wide_resnet50_2 = _constructor("wide_resnet50_2", "Wide ResNet-50-2: 68.9 M parameters, 11.4 GMAC")
wide_resnet101_2 = _constructor(
    "wide_resnet101_2", "Wide ResNet-101-2: 126.9 M parameters, 22.8 GMAC"
)
