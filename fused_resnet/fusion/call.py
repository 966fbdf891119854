"""Whether a call may take a fused path, decided from its input and the global state alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.utils._device import DeviceContext

from fused_resnet.kernels import registry
from fused_resnet.layers import originals
from fused_resnet.layers.hooks import GLOBAL_HOOKS
from fused_resnet.ops.library import in_transform


def call_reason(x: Any, training: bool = False) -> str | None:
    """None when this call may take a fused path, else why it runs torchvision's. In training an
    empty batch is allowed, since another process's batch may not be empty."""
    reason = _reason(x)
    if reason is not None:
        return reason
    if x.dim() != 4 or 0 in x.shape[training:]:
        return f"x must be a dense, non-empty 4-D tensor, got shape {tuple(x.shape)}"
    return None


def matrix_reason(x: Any) -> str | None:
    """`call_reason` for a layer that takes matrices: x of any number of dimensions from two on."""
    reason = _reason(x)
    if reason is not None:
        return reason
    return None if x.dim() >= 2 and x.numel() else f"x has shape {tuple(x.shape)}"


def _reason(x: Any) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile or torch.export is tracing"
    name = originals.ALL.replaced()
    if name is not None:
        return f"{name} was replaced after fused_resnet was imported"
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"x is a {type(x).__name__}, not a plain Tensor"
    if x.device.type not in ("cpu", "cuda"):
        return f"{x.device.type} tensors are not supported"
    if x.layout != torch.strided or x.is_nested:
        return "x is not dense"
    if x.is_inference() and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return "x was made in inference mode, autograd may have to save it"
    if torch.jit.is_tracing():
        return "torch.jit.trace is tracing"
    if in_transform():
        return "inside a torch.func transform or forward-mode AD"
    if torch._C._len_torch_dispatch_stack() + _len_torch_dispatch_stack_pre_dispatch() > 0:
        return "a TorchDispatchMode is active"
    for i in range(torch._C._len_torch_function_stack()):
        mode = torch._C._get_function_stack_at(i)
        if type(mode) is not DeviceContext:  # of torch.set_default_device
            return f"{type(mode).__name__}, a TorchFunctionMode, is active"
    if any(GLOBAL_HOOKS):
        return "global module hooks are registered"
    if x.device.type == "cpu" and not torch.backends.mkldnn.enabled:
        return "oneDNN is switched off (torch.backends.mkldnn)"
    if registry.forced() == "reference":
        return "the reference backend is forced"
    return None


def asked(module: nn.Module, x: Any) -> tuple[str | None, bool]:
    """`call_reason` for a module's input, and whether autograd would record the call."""
    reason = call_reason(x, module.training)
    return reason, reason is None and wants_grad(module, x)


def wants_grad(block: nn.Module, x: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(p.requires_grad for p in block.parameters())
