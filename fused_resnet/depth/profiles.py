"""Profiles of a network by layer. The model is unchanged afterwards: parameters, buffers, .grad and
training modes are bitwise equal to those before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet.layers.hooks import keeping_buffers, watching

Loss = Callable[[nn.Module], Tensor]


class Layer(NamedTuple):
    """name: as in named_modules(); value: the measured value of the layer."""

    name: str
    value: float


def gradient_profile(model: nn.Module, loss: Loss) -> list[Layer]:
    """The gradient norm |d loss / d W| of the weight of every layer, in the order of the layers.

    loss: takes the model, runs it in its current mode and returns a scalar:
    `lambda m: cross_entropy(m(x), y)`. Layers are modules with a weight of two or more dimensions
    (convolutions, linear layers). The value is 0 if the loss does not depend on the weight; frozen
    layers are omitted. Raises ValueError if loss does not return a scalar or no layer's weight
    requires grad.
    """
    layers = [
        (name, m.weight)
        for name, m in model.named_modules()
        if isinstance(getattr(m, "weight", None), Tensor)
        and m.weight.dim() > 1
        and m.weight.requires_grad
    ]
    if not layers:
        raise ValueError("gradient_profile: model must have a layer whose weight requires grad")
    with keeping_buffers(model), torch.enable_grad():
        value = _scalar("gradient_profile", loss(model))
        weights = [weight for _, weight in layers]
        grads = torch.autograd.grad(value, weights, allow_unused=True)
    norms = [0.0 if g is None else float(g.detach().double().norm()) for g in grads]
    return [Layer(name, norm) for (name, _), norm in zip(layers, norms, strict=True)]


@torch.no_grad()
def response_profile(model: nn.Module, x: Tensor) -> list[Layer]:
    """The standard deviation of the output of every norm, in the order of the calls.

    x: input of the model. Norms are PyTorch's batch, group, layer and instance norms; their output
    is measured before the addition and ReLU: He et al. 2015 (1512.03385), figure 7. Raises
    ValueError if the model has no norm.
    """
    kinds = (
        nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm,
        nn.modules.instancenorm._InstanceNorm,
    )  # fmt: skip
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, kinds)]
    if not norms:
        raise ValueError("response_profile: model must have a norm, got none")
    responses: list[Layer] = []

    def see(name: str, y: Tensor) -> None:
        responses.append(Layer(name, float(y.double().std(correction=0))))

    with keeping_buffers(model), watching(norms, see):
        model(x)
    return responses


@torch.no_grad()
def loss_along(
    model: nn.Module, loss: Loss, distances: Sequence[float], seed: int = 0
) -> list[float]:
    """The loss at w + t d for each t of `distances`, where d is a random direction normalized per
    filter: d[k] = |w[k]| r[k] / |r[k]| for the k-th filter of a weight of two or more dimensions,
    r normally distributed; d = 0 for biases and norms.

    loss: as in gradient_profile. seed: of the direction. Raises ValueError if loss does not return
    a scalar. Source: Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets" (1712.09913),
    section 4.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = [p for p in model.parameters() if p.dim() > 1]
    start = [p.clone() for p in weights]
    directions = [_filter_normalized(p, generator) for p in weights]
    values = []
    try:
        for t in distances:
            with keeping_buffers(model):
                for p, w, d in zip(weights, start, directions, strict=True):
                    p.copy_(w + t * d)
                values.append(float(_scalar("loss_along", loss(model))))
    finally:
        for p, w in zip(weights, start, strict=True):
            p.copy_(w)
    return values


def _filter_normalized(weight: Tensor, generator: torch.Generator) -> Tensor:
    """weight (K, ...) -> a random direction whose K filters have the norms of the weight's."""
    r = torch.randn(weight.shape, generator=generator).to(weight)
    dims = tuple(range(1, weight.dim()))
    norms = torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
    return r * (norms / torch.linalg.vector_norm(r, dim=dims, keepdim=True).clamp_min(1e-12))


def _scalar(what: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what}: loss must return a scalar, got {got}")
    return value
