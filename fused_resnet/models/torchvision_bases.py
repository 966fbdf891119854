"""Makes the classes of the family subclasses of torchvision's where that is imported, so that tools
which look for its BasicBlock, Bottleneck and ResNet (canonisers, samplers of layers, scripts that
edit models) find them. torchvision itself is not imported: it takes half a second and may be
missing."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from .resnet import BasicBlock, Bottleneck, ResNet

_NAME = "torchvision.models.resnet"


def _link(theirs: ModuleType) -> None:
    """Their methods come last in the order of resolution, so only isinstance changes."""
    for cls in (BasicBlock, Bottleneck, ResNet):
        base = getattr(theirs, cls.__name__)
        if base not in cls.__mro__:
            cls.__bases__ = (*cls.__bases__, base)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Links the classes when torchvision's are imported, and then is done."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _link(module)

            loader.exec_module = exec_module
        return spec


if _NAME in sys.modules:
    _link(sys.modules[_NAME])
else:
    sys.meta_path.insert(0, _AfterImport())
