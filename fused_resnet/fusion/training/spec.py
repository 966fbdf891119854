"""The description of a block's training step without its tensors, and helpers for its executors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet.kernels.training.protocol import Geometry, Norm, Passes
from fused_resnet.layers.shortcut import padded


class Spec(NamedTuple):
    """A block without its tensors. geometries, eps: one per unit (convolution and norm), the
    shortcut's last. shortcut: "identity", "projection" (one more unit), "pad" (a PadShortcut of
    `stride`) or "none"."""

    kernels: Passes
    geometries: tuple[Geometry, ...]
    eps: tuple[float, ...]
    shortcut: str
    level: str
    dtype: torch.dtype  # of the activations
    groups: tuple[Any, ...]  # the norms' process groups; None if not synchronised
    stride: int = 1  # of a PadShortcut
    shared: bool = False  # pre-activation: the shortcut reads the first ReLU's output, not x


Units = list[tuple[Tensor, Norm]]


def units_of(spec: Spec, tensors: Sequence[Any]) -> Units:
    """Weight and norm of each unit. tensors: weight (K, C/groups, R, S), norm weight and bias (K,)
    or None, for each unit."""
    return [
        (tensors[3 * i], Norm(tensors[3 * i + 1], tensors[3 * i + 2], eps, group))
        for i, (eps, group) in enumerate(zip(spec.eps, spec.groups, strict=True))
    ]


def recomputed(spec: Spec, weights: Sequence[Tensor]) -> list[bool]:
    """For each unit, whether backward recomputes its convolution's output."""
    flags = [spec.level == "minimal"] * len(weights)
    if spec.level == "lower":
        last = len(weights) - 1
        if spec.shortcut == "projection":
            flags[last] = True
            last -= 1
        pointwise = tuple(weights[last].shape[2:]) == (1, 1)
        flags[last] = pointwise and last > 0
    return flags


def free_shortcut(spec: Spec, x: Tensor, weight: Tensor) -> Tensor | None:
    """The output (N, K, P, Q) of a shortcut without parameters, or None if there is none. weight:
    the last one, of K output channels."""
    if spec.shortcut == "pad":
        return padded(x, weight.shape[0], spec.stride)
    return x if spec.shortcut == "identity" else None


def differentiable(
    spec: Spec, x: Tensor, tensors: Sequence[Any], dy: Tensor, needs: Sequence[bool],
    formula: Callable[[Spec, Tensor, Sequence[Any]], Tensor],
) -> list[Tensor | None]:  # fmt: skip
    """A differentiable backward, for double backward: the gradients of x and tensors by autograd
    through `formula`, None where not needed."""
    if any(group is not None for group in spec.groups):
        raise NotImplementedError(
            "fused_resnet: a synchronised batch norm is not differentiable twice; "
            "differentiate it in one process, or freeze it (eval)"
        )
    inputs = [t for t, need in zip((x, *tensors), needs, strict=True) if need]
    y = formula(spec, x, tensors)
    grads = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    return [next(grads) if need else None for need in needs]
