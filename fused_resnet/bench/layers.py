"""Lists the convolutions of a model with the shapes their kernels receive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet.kernels.problem import Geometry, Layer
from fused_resnet.models.resnet import get_model


def layers_of(model: str, batch: int, size: int = 224) -> list[Layer]:
    """Every convolution of the named model, in order, for `batch` images of size x size."""
    layers: list[Layer] = []

    def hook(conv: Any, inputs: Any, output: Tensor) -> None:
        geometry = Geometry(conv.stride, conv.padding, conv.dilation)
        x_shape, y_shape = tuple(inputs[0].shape), tuple(output.shape)
        layers.append(Layer(x_shape, tuple(conv.weight.shape), y_shape, geometry, conv.groups))

    with torch.device("meta"), torch.no_grad():
        net = get_model(model).eval()
        for m in net.modules():
            if isinstance(m, torch.nn.Conv2d):
                m.register_forward_hook(hook)
        net(torch.empty(batch, 3, size, size))
    return layers
