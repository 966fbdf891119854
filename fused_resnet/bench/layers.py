"""Lists the convolutions of a model with the shapes their kernels receive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet.kernels.problem import Problem, convolution
from fused_resnet.models.resnet import get_model


def layers_of(model: str, batch: int, dtype: torch.dtype, size: int = 224) -> list[Problem]:
    """Every convolution of the named model in `dtype`, in order, for `batch` images of size x
    size."""
    layers: list[Problem] = []

    def hook(conv: Any, inputs: Any, output: Tensor) -> None:
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        problem = convolution(conv.weight.shape, dtype, *geometry)
        layers.append(problem._replace(x_shape=tuple(inputs[0].shape)))

    with torch.device("meta"), torch.no_grad():
        net = get_model(model).eval()
        for m in net.modules():
            if isinstance(m, torch.nn.Conv2d):
                m.register_forward_hook(hook)
        net(torch.empty(batch, 3, size, size))
    return layers
