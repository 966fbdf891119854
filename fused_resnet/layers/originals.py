"""PyTorch's methods and functions as they were when this package was imported.

Tools replace them for the whole process: test-time adaptation the forward of a norm, profilers and
compressors functions such as `torch.nn.functional.conv2d`. Fused kernels would ignore that, so
while one of them is replaced nothing is fused. (A class that replaces `nn.Conv2d` itself is another
type, which descriptions refuse.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

# (owner, name, the object itself), in three lists: they are compared in every forward.
_owners: list[Any] = []
_names: list[str] = []
_objects: list[Any] = []
_CALL = nn.Module.__call__


def remember(owner: Any, *names: str) -> None:
    """Notes what `owner` has now under each of the names. A class may be noted while torch.fx
    traces, which replaces nn.Module.__call__ meanwhile: what is inherited is that of the import."""
    for name in names:
        found = getattr(owner, name)
        _owners.append(owner)
        _names.append(name)
        _objects.append(_CALL if found is nn.Module.__call__ else found)


def replaced() -> str | None:
    """The name of something that was replaced since it was noted, or None."""
    now = list(map(getattr, _owners, _names))
    if now == _objects:
        return None
    for owner, name, was, found in zip(_owners, _names, _objects, now, strict=True):
        if found != was:
            return f"{owner.__name__}.{name}"
    return None


for _class in (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.MaxPool2d, nn.Sequential):
    remember(_class, "forward", "__call__")
remember(nn.Module, "_call_impl", "__getattr__")
remember(nn.Conv2d, "_conv_forward")
remember(functional, "conv2d", "batch_norm", "relu", "relu_", "max_pool2d")
remember(torch, "batch_norm", "relu", "relu_", "conv2d", "max_pool2d")
remember(torch.Tensor, "__add__", "__iadd__", "__radd__", "add", "add_", "relu", "relu_")
