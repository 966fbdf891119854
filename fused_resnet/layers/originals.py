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

_CALL = nn.Module.__call__


class Originals:
    """What some owners had under some names."""

    def __init__(self) -> None:
        # Three lists: they are compared in every forward.
        self._owners: list[Any] = []
        self._names: list[str] = []
        self._objects: list[Any] = []

    def remember(self, owner: Any, *names: str) -> None:
        """Notes what `owner` has now under each of the names. A class may be noted while torch.fx
        traces, which replaces nn.Module.__call__ meanwhile: what is inherited is that of the
        import."""
        for name in names:
            found = getattr(owner, name)
            self._owners.append(owner)
            self._names.append(name)
            self._objects.append(_CALL if found is nn.Module.__call__ else found)

    def replaced(self) -> str | None:
        """The name of something that was replaced since it was noted, or None."""
        now = list(map(getattr, self._owners, self._names))
        if now == self._objects:
            return None
        for owner, name, was, found in zip(
            self._owners, self._names, self._objects, now, strict=True
        ):
            if found != was:
                return f"{owner.__name__}.{name}"
        return None


# Of everything that is fused; and of a network's head besides.
ALL, HEAD = Originals(), Originals()

for _class in (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.MaxPool2d, nn.Sequential):
    ALL.remember(_class, "forward", "__call__")
ALL.remember(nn.Module, "_call_impl", "__getattr__")
ALL.remember(nn.Conv2d, "_conv_forward")
ALL.remember(functional, "conv2d", "batch_norm", "relu", "relu_", "max_pool2d")
ALL.remember(torch, "batch_norm", "relu", "relu_", "conv2d", "max_pool2d")
ALL.remember(torch.Tensor, "__add__", "__iadd__", "__radd__", "add", "add_", "relu", "relu_")

HEAD.remember(nn.Linear, "forward", "__call__")
HEAD.remember(nn.AdaptiveAvgPool2d, "forward", "__call__")
HEAD.remember(functional, "linear", "adaptive_avg_pool2d")
HEAD.remember(torch, "flatten")
