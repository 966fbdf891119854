"""The passes of a training step, implemented by the registered ops on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.training.protocol import Passes


class Portable(Passes):
    """Convolutions by PyTorch, norms by the provider selected for the ops."""

    def bn_add_relu(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
        eps: float, activation: Activation,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return torch.ops.fused_resnet.bn_add_relu(x, weight, bias, residual, eps, bool(activation))

    def bn_add_relu_backward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.fused_resnet.bn_add_relu_backward(*arguments)
