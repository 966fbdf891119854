"""The models that commands build by name: ours, torchvision's and timm's."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

import fused_resnet as fr


def build(name: str, weights: str | None = None) -> nn.Module:
    """The model of that name, in eval mode, fused: "resnet50" of this package,
    "torchvision:fasterrcnn_resnet50_fpn", or "timm:resnet50d". weights: for torchvision's and ours
    a name of its enum, for timm any text: its pretrained ones. Raises ValueError."""
    library, _, model = name.rpartition(":")
    if library not in ("", "torchvision", "timm"):
        raise ValueError(f"--model must be NAME, torchvision:NAME or timm:NAME, got {name!r}")
    try:
        if library == "timm":
            timm = importlib.import_module("timm")
            built = timm.create_model(model, pretrained=weights is not None)
        elif library == "torchvision":
            models = importlib.import_module("torchvision.models")
            options: dict[str, Any] = {"weights": weights}
            if weights is None and model in models.list_models(models.detection):
                options["weights_backbone"] = None
            if weights is None and model in models.list_models(models.segmentation):
                options["weights_backbone"] = None
            built = models.get_model(model, **options)
        else:
            return fr.get_model(model, weights=weights).eval()
    except ImportError as error:
        raise ValueError(f"--model {name} needs {library}: {error}") from None
    except (RuntimeError, KeyError) as error:  # of an unknown model or name of weights
        raise ValueError(f"--model {name}: {error}") from None
    return fr.fuse(built.eval(), inplace=True)


def load(model: nn.Module, path: Path, name: str) -> None:
    """Loads a checkpoint; one with another number of classes gets a classifier of that size."""
    from fused_resnet.parity.checkpoint import load_checkpoint, load_into

    state = load_checkpoint(path)
    classifier = getattr(model, "fc", None)
    bias = state.get("fc.bias")
    if isinstance(classifier, nn.Linear) and bias is not None:
        model.fc = nn.Linear(classifier.in_features, len(bias))
    load_into(model, state, name, path)
    model.eval()
