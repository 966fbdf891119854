"""The ops registered with PyTorch: one file per op with formula, reference, checks and derivatives.

All tensors are (N, C, H, W); the output has the layout of x. `kernels` chooses the provider of an
op. This module registers the reference and the portable training passes with it.
"""

from typing import Any

from fused_resnet.kernels.problem import Problem
from fused_resnet.kernels.registry import Provider, register
from fused_resnet.kernels.target import Target

from . import reference
from .add_relu import add_relu
from .bn_add_relu import bn_add_relu
from .conv_bn_relu import conv_bn_relu
from .conv_norm_relu import conv_norm_relu
from .portable import Portable

__all__ = ["add_relu", "bn_add_relu", "conv_bn_relu", "conv_norm_relu"]


class Reference(Provider):
    """The last resort for every problem."""

    name = "reference"

    def supports(self, problem: Problem, target: Target) -> None:
        return None

    def kernels(self) -> Any:
        return reference

    def passes(self) -> Portable:
        return _PORTABLE


_PORTABLE = Portable()
for _device in ("cpu", "cuda"):
    register("reference", _device, Reference())
