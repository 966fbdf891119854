"""The family in the registries of torchvision and timm, on request."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, Optional

from torch import nn

from fused_resnet.fusion import fuse

from . import resnet

PREFIX = "fused_"


def register_with_torchvision() -> list[str]:
    """Registers the family with `torchvision.models`, as "fused_resnet18" and so on.

    `torchvision.models.get_model("fused_resnet50", weights="DEFAULT")` then returns this package's
    ResNet-50 with torchvision's weights; `list_models` and `get_model_weights` know it too. Returns
    the names. Calling it again changes nothing. Raises ImportError without torchvision."""
    models = importlib.import_module("torchvision.models")
    register = importlib.import_module("torchvision.models._api").register_model
    registered = set(models.list_models())
    for name in resnet.list_models():
        if PREFIX + name not in registered:
            register(PREFIX + name)(_for_torchvision(name, models))
    return [PREFIX + name for name in resnet.list_models()]


def _for_torchvision(name: str, models: Any) -> Callable[..., nn.Module]:
    """The builder, with the annotation by which torchvision finds a model's weights."""
    build = getattr(resnet, name)

    def builder(*, weights: Any = None, progress: bool = True, **config: Any) -> nn.Module:
        return build(weights=weights, progress=progress, **config)

    enum = models.get_model_weights(name)
    parameters = inspect.signature(builder).parameters
    signature = [parameters["weights"].replace(annotation=Optional[enum])]  # noqa: UP045 - read
    signature += [parameters["progress"], parameters["config"]]
    builder.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    builder.__name__ = builder.__qualname__ = PREFIX + name
    builder.__doc__ = build.__doc__
    return builder


def register_with_timm() -> list[str]:
    """Registers fused models with timm, as "fused_resnet18" and so on.

    `timm.create_model("fused_resnet50", pretrained=True)` then returns timm's ResNet-50 with its
    weights, changed by `fuse`; every other argument of create_model works as for "resnet50".
    Returns the names. Calling it again changes nothing. Raises ImportError without timm."""
    timm = importlib.import_module("timm")
    names = [name for name in resnet.list_models() if timm.is_model(name)]
    for name in names:
        if not timm.is_model(PREFIX + name):
            timm.models.register_model(_for_timm(name, timm))
    return [PREFIX + name for name in names]


def _for_timm(name: str, timm: Any) -> Callable[..., nn.Module]:
    original = timm.model_entrypoint(name)

    def builder(pretrained: bool = False, **config: Any) -> nn.Module:
        return fuse(original(pretrained=pretrained, **config), inplace=True)

    builder.__name__ = builder.__qualname__ = PREFIX + name
    builder.__doc__ = original.__doc__
    return builder
