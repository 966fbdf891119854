"""Finds the stem, the pooling, the stages and the blocks of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fused_resnet.layers.hooks import patched

from .structure import STEM, Names, Parts, Place, parse_block

# forward of a block's class -> the names of its submodules; filled by `register_blocks`.
FORWARDS: dict[Callable[..., Tensor], Names] = {}


def register_blocks(forwards: dict[Callable[..., Tensor], Names]) -> None:
    """Registers block classes by their forward, each with the names of its submodules."""
    FORWARDS.update(forwards)


_STAGES = ("layer1", "layer2", "layer3", "layer4")


def has_stem(model: Any) -> bool:
    """Whether norm and ReLU directly follow the first convolution."""
    return "bn1" in model._modules


def stages(model: Any) -> list[Any]:
    return [model._modules[name] for name in _STAGES if name in model._modules]


def whole(model: Any) -> tuple[Parts, list[tuple[nn.Module, Names]]] | None:
    """The parts of the whole network, and the modules (stem and blocks) that each get a plan;
    None if a stage or block is unknown, patched or cannot be fused."""
    members: list[tuple[nn.Module, Names]] = [(model, STEM)] if has_stem(model) else []
    places = []
    if "maxpool" in model._modules:
        places.append(Place(model._modules, "maxpool", model.maxpool, nn.MaxPool2d))
    for name in [name for name in _STAGES if name in model._modules]:
        stage = model._modules[name]
        places.append(Place(model._modules, name, stage, nn.Sequential))
        if type(stage) is not nn.Sequential:
            return None
        for key, block in stage._modules.items():
            names = FORWARDS.get(type(block).forward)
            if names is None:
                return None
            places.append(Place(stage._modules, key, block, type(block)))
            members.append((block, names))
    if [type(p.part) for p in places] != [p.kind for p in places]:
        return None
    if any(patched(p.part) is not None for p in places):
        return None
    pairs = []
    for module, names in members:
        parts = parse_block(module, names)
        if isinstance(parts, str):
            return None
        pairs += parts.pairs
        places += parts.places
    return Parts(pairs, "none", places), members
