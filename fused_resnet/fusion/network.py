"""A whole network as a sequence of members: its stem and its blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import Sequential

from fused_resnet.layers.hooks import patched

from .description import ATTRIBUTES, Names, Place, attributes_of, own_recipe


class NetworkNames(NamedTuple):
    """The names of a network's submodules. stem: of its first unit and pooling, or the name of a
    first convolution alone. stages: of the Sequential modules of blocks. norm: of the norm and the
    ReLU after the last stage. running: the method that returns what a forward runs of each stage,
    blocks and other callables; None: all blocks. The head is avgpool, flatten and fc."""

    stem: Names | str
    stages: tuple[str, ...]
    norm: tuple[str, str] | None = None
    running: str | None = None

    @property
    def first(self) -> tuple[str, ...]:
        """The submodules before the stages, in the order in which they run."""
        if isinstance(self.stem, str):
            return (self.stem,)
        pool = () if self.stem.pool is None else (self.stem.pool,)
        return (*self.stem.pairs[0], self.stem.relu, *pool)

    @property
    def body(self) -> tuple[str, ...]:
        """All submodules before the head."""
        return (*self.first, *self.stages, *(self.norm or ()))


class Member(NamedTuple):
    """One part of a network's forward: a block or another module, or the names of the network's
    submodules that run one after the other. names: as for `describe`, None if it is not fused."""

    target: nn.Module | tuple[str, ...]
    names: Names | None

    def call(self, model: Any, x: Tensor) -> Tensor:
        """Runs the modules as torchvision does; a block then decides for itself."""
        if not isinstance(self.target, tuple):
            return self.target(x)
        for name in self.target:
            x = getattr(model, name)(x)
        return x

    def module(self, model: nn.Module) -> nn.Module:
        """The module to describe: the block, or the network for its stem."""
        return self.target if isinstance(self.target, nn.Module) else model


def members_of(model: Any, names: NetworkNames) -> tuple[Member, list[list[Member]], list[Place]]:
    """The members of the network's forward: its stem with the pooling, and those of each stage; and
    the places that decide which modules these are."""
    stem, places = names.stem, []
    first = Member(names.first, None if isinstance(stem, str) else stem)
    if not isinstance(stem, str) and stem.pool is not None:
        pool = stem.pool
        places.append(Place(model._modules, pool, model._modules.get(pool), object))
    stages = []
    for name in names.stages:
        stage = getattr(model, name)
        places.append(Place(model._modules, name, stage, Sequential))
        if type(stage) is not Sequential or patched(stage) is not None:
            stages.append([Member(stage, None)])
            continue
        blocks = stage._modules
        stages.append([])
        for key, block in blocks.items():
            recipe = own_recipe(block)
            stages[-1].append(Member(block, recipe))
            places.append(Place(blocks, key, block, type(block)))
            if recipe is not None:
                settings = zip(ATTRIBUTES, attributes_of(block), strict=True)
                places += [Place(block.__dict__, *setting, object) for setting in settings]
    return first, stages, places
