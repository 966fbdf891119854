"""The activations that kernels apply as they store a result."""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Activation(enum.IntEnum):
    """An elementwise function at the end of an epilogue, by the numbers of csrc/activation.h.

    NONE is v, RELU is max(v, 0), of which NaN stays NaN. A public op's `relu` is one of them.
    """

    NONE = 0
    RELU = 1

    def __call__(self, v: Tensor) -> Tensor:
        """The reference: activation(v), of v's shape and dtype."""
        return _REFERENCE[self](v) if self else v


_REFERENCE = {Activation.RELU: torch.relu}

# Exact type of a module -> what it computes.
OF_MODULE: dict[type, Activation] = {nn.ReLU: Activation.RELU}

# Functions f(x) or f(x, inplace), and the names of methods of x.
_aten = torch.ops.aten
OF_FUNCTION: dict[Any, Activation] = dict.fromkeys(
    (
        functional.relu, functional.relu_, torch.relu, torch.relu_, _aten.relu.default,
        _aten.relu_.default,
    ),
    Activation.RELU,
)  # fmt: skip
OF_METHOD = {"relu": Activation.RELU, "relu_": Activation.RELU}
