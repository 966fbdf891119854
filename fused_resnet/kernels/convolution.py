"""The base class of fused convolutions. Weights are packed once; batch normalisation, residual and
activation are applied as the result is stored.

    y = activation(conv(x, weight) * scale[k] + shift[k] + residual)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .activation import Activation
from .problem import Problem, output_shape

# Of a weight: a part of it, and a view of packed weights with the same shape, dtype and values.
Pairs = Sequence[tuple[Tensor, Tensor]]


class Unsupported(RuntimeError):
    """A library found no kernel for a problem that its provider supports in general; the message is
    the reason in one line."""


class FusedConv:
    """One convolution with folded batch normalisation and its weights packed in `problem.dtype`.

    weight: (K, C/groups, R, S); scale, shift: (K,).
    """

    # Whether `run` accepts x in any layout and floating dtype, not only channels_last of `dtype`.
    takes_any = False
    is_cached = False  # whether the convolution is reused by later calls
    tensors: Sequence[Tensor] = ()  # all that it keeps, where a graph can hold it

    def __init__(self, problem: Problem, weight: Tensor, scale: Tensor, shift: Tensor) -> None:
        assert problem.dtype is not None
        self.problem = problem
        self.dtype: torch.dtype = problem.dtype
        self.geometry = problem.geometry

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """(N, C, H, W) of x -> (N, K, P, Q); None if x is empty or does not fit."""
        return output_shape(shape, self.problem.weight_shape, *self.geometry)

    def holds(self, weight: Tensor) -> Callable[[Tensor], Pairs] | str:
        """What gives, for a tensor like `weight`, pairs of its parts and of views of what this
        convolution keeps that have the same bits in `weight`'s dtype; or the reason why none do.
        It keeps the packed weights alive, and nothing else."""
        return "what its convolution keeps of it has other values"

    def save_memory(self) -> None:
        """Drops what it keeps for speed alone, where that is large."""

    def move(self, memory: torch.UntypedStorage) -> bool:
        """Moves the packed weights into this memory, if they fill it; returns whether they do."""
        return False

    def run(
        self, x: Tensor, residual: Tensor | None, activation: Activation, overwrite: bool = False
    ) -> Tensor:
        """x: (N, C, H, W), residual: None or (N, K, P, Q), both channels_last of `dtype` ->
        (N, K, P, Q) channels_last. `overwrite` allows writing to the residual's memory."""
        raise NotImplementedError


# A subclass of `FusedConv`: problem, weight, scale, shift -> it.
Kind = Callable[[Problem, Tensor, Tensor, Tensor], FusedConv]
