"""A network's stem in training: convolution, norm, ReLU and max pooling as one autograd node."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fused_resnet.fusion import pooling
from fused_resnet.fusion.call import call_reason
from fused_resnet.fusion.structure import STEM, parse_block
from fused_resnet.kernels.problem import output_shape

from .block import StepFunction
from .prepare import prepare
from .units import run_unit, units_pay


def run_pooled_stem(model: Any, x: Tensor) -> Tensor | None:
    """maxpool(relu(bn1(conv1(x)))) of a network in training as one node of autograd's graph; None
    where not supported: use `run_stem` or torchvision's path, then pooling."""
    pool = model.maxpool
    if call_reason(x) is not None or not pooling.is_plain(pool):
        return None
    parts = parse_block(model, STEM)
    if isinstance(parts, str) or not units_pay(parts, x):
        return None
    prepared = prepare(model, STEM, parts, x)
    if prepared is None or not prepared.spec.kernels.pools:
        return None
    (conv, _), geometry = parts.pairs[0], prepared.spec.geometries[0]
    conv_shape = output_shape(x.shape, conv.weight.shape, *geometry)
    window = [n for sizes in pooling.window(pool) for n in sizes]
    if conv_shape is None or pooling.pool_shape(pool, conv_shape) is None:
        return None
    if window[0] * window[1] > 256:  # a tap's index is one byte
        return None
    states: list[Any] = []
    spec = prepared.spec._replace(window=window)
    y = StepFunction.apply(spec, states, prepared.enter(x), *prepared.tensors())
    prepared._replace(fused=None).track(states)
    return y


def run_stem(model: nn.Module, x: Tensor) -> Tensor | None:
    """relu(bn1(conv1(x))) of a network by a fused path; None: use torchvision's."""
    if call_reason(x, model.training) is not None:
        return None
    parts = parse_block(model, STEM)
    if isinstance(parts, str) or not units_pay(parts, x):
        return None
    # The output stays in the prepared layout, which the blocks also compute in.
    prepared = prepare(model, STEM, parts, x)
    return run_unit(*parts.pairs[0], x, None, True) if prepared is None else prepared.run(x)


def stem_and_pool(model: Any, x: Tensor) -> Tensor:
    """A network's stem and its pooling, if any, by the fastest supported path."""
    pool = model._modules.get("maxpool")
    y = None if pool is None else run_pooled_stem(model, x)
    if y is None:
        y = run_stem(model, x)
        y = model.relu(model.bn1(model.conv1(x))) if y is None else y
        y = y if pool is None else pool(y)
    return y
