"""A block's training step without its tensors, and what its implementations share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet.kernels.training.protocol import Geometry, Norm, Passes
from fused_resnet.layers.shortcut import padded


class Spec(NamedTuple):
    """A block without its tensors. geometries, eps: one per unit (convolution and norm), the
    shortcut's last. shortcut: "identity", "projection" (a unit of its own), "pad" (a PadShortcut of
    this stride) or "none"."""

    kernels: Passes
    geometries: tuple[Geometry, ...]
    eps: tuple[float, ...]
    shortcut: str
    level: str
    dtype: torch.dtype  # of the activations
    groups: tuple[Any, ...]  # the norms' process groups, None where they need no other process
    stride: int = 1  # of a PadShortcut
    # Of norms that come first: whether the shortcut starts from the first of them, not from x.
    shared: bool = False


Units = list[tuple[Tensor, Norm]]


def units_of(spec: Spec, tensors: Sequence[Any]) -> Units:
    """tensors: weight (K, C/groups, R, S), norm weight and bias (K,) or None, unit by unit."""
    return [
        (tensors[3 * i], Norm(tensors[3 * i + 1], tensors[3 * i + 2], eps, group))
        for i, (eps, group) in enumerate(zip(spec.eps, spec.groups, strict=True))
    ]


def recomputed(spec: Spec, weights: Sequence[Tensor]) -> list[bool]:
    """For each unit, whether its convolution's output is computed again in backward."""
    found = [spec.level == "minimal"] * len(weights)
    if spec.level == "lower":
        last = len(weights) - 1
        if spec.shortcut == "projection":
            found[last] = True
            last -= 1
        pointwise = tuple(weights[last].shape[2:]) == (1, 1)
        found[last] = pointwise and last > 0
    return found


def free_shortcut(spec: Spec, x: Tensor, weight: Tensor) -> Tensor | None:
    """A shortcut without parameters, (N, K, P, Q), K being the channels of the last weight."""
    if spec.shortcut == "pad":
        return padded(x, weight.shape[0], spec.stride)
    return x if spec.shortcut == "identity" else None


def differentiable(
    spec: Spec, x: Tensor, tensors: Sequence[Any], dy: Tensor, needs: Sequence[bool],
    formula: Callable[[Spec, Tensor, Sequence[Any]], Tensor],
) -> list[Tensor | None]:  # fmt: skip
    """Backward where somebody wants to differentiate it, written in differentiable operations: the
    gradients of x and of tensors, as far as each needs one."""
    if any(group is not None for group in spec.groups):
        raise NotImplementedError(
            "fused_resnet: a synchronised batch norm is not differentiable twice; "
            "differentiate it in one process, or freeze it (eval)"
        )
    wanted = [t for t, need in zip((x, *tensors), needs, strict=True) if need]
    y = formula(spec, x, tensors)
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(grads) if need else None for need in needs]
