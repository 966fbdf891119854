"""The linear layers of a fused model, as those of a detector's or VGG's head, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.fusion.call import matrix_reason
from fused_resnet.fusion.inference.head import is_read
from fused_resnet.kernels.cpu import onednn
from fused_resnet.layers.planned import LINEAR

from . import verify
from .installed import Installed

_FEWEST_PRODUCTS = 2**21  # some 20 us, beside which asking is cheap


class LinearRegion(Installed):
    """What runs in the place of an nn.Linear's call: oneDNN without gradients in float32, else the
    layer. It reads the layer's parameters at every call."""

    attribute = LINEAR

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self._module()
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if len(args) == 1 and not kwargs and not traced:
            (x,) = args
            if not verify.is_running() and _is_served(module, x):
                return onednn.linear(x, module.weight, module.bias)
        return module._call_impl(*args, **kwargs)


def _is_served(module: Any, x: Tensor) -> bool:
    # Types first: other classes see what they are asked, and their sizes may be symbols.
    weight = module._parameters.get("weight")
    if not _is_plain(x) or not _is_plain(weight) or x.dtype != torch.float32:
        return False
    if weight.dim() != 2 or x.numel() * len(weight) < _FEWEST_PRODUCTS:
        return False
    return (
        matrix_reason(x) is None
        and is_read(module, x, x.shape[-1])
        and onednn.linear_reason() is None
    )


def _is_plain(t: Any) -> bool:
    return type(t) in (Tensor, nn.Parameter)
