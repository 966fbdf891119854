"""Whole models that were saved before their classes moved into folders still load and compute what
they did. tests/models/data/whole_models-0.1.pt holds, per network, the module as torch.save pickled
it at commit d27e6e5, an input and the output computed there."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path

import pytest
import torch

import fused_resnet as fr

FILE = Path(__file__).parent / "data" / "whole_models-0.1.pt"
CLASSES = {
    "basic": fr.ResNet,
    "bottleneck": fr.ResNet,
    "cifar": fr.CifarResNet,
    "cifar plain": fr.CifarResNet,
    "preact": fr.PreactResNet,
    "preact bottleneck": fr.PreactResNet,
    "synchronised": fr.CifarResNet,
}


@pytest.mark.parametrize("name", CLASSES)
def test_whole_models_of_version_0_1_load(name):
    entry = torch.load(FILE, weights_only=False)[name]
    model = entry["model"]
    assert type(model) is CLASSES[name]
    with torch.no_grad():
        torch.testing.assert_close(model(entry["x"]), entry["y"], rtol=1e-4, atol=0.0)
        with fr.use_backend("reference"):
            torch.testing.assert_close(model(entry["x"]), entry["y"], rtol=1e-4, atol=0.0)
    model.train()(entry["x"].repeat(2, 1, 1, 1)).sum().backward()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("resnet", "Bottleneck"),
        ("cifar", "PlainBlock"),
        ("preact", "PreactBottleneck"),
        ("shortcut", "PadShortcut"),
        ("sync_batch_norm", "SyncBatchNorm"),
        ("blocks", "Explanation"),
    ],
)
def test_old_module_names_are_aliases(module, name):
    old = getattr(importlib.import_module(f"fused_resnet.{module}"), name)
    assert pickle.loads(pickle.dumps(old)) is old
    assert old.__module__ != f"fused_resnet.{module}", "an alias, not the module itself"
