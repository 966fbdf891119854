"""Modules of this package in the graph of a compiler: their inference is one op.

    module_inference(x, tensors, number, autocast)
        = forward(module of that number, with these tensors, under that autocast)(x)

The op runs the module's own fused forward, whose plans are kept with the module, so a compiled and
an uncompiled call share packed weights, and everything that a plan guards is guarded here too. It
reads nothing but its operands: other tensors than the module's, as a compiler passes if the graph
itself writes to them, run stock's operations on them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fused_resnet.layers.planned import NUMBER, SLOTS, numbered
from fused_resnet.ops.library import register

from .call import call_reason
from .description import Names, describe, recipe_of
from .inference.make import kernels_for
from .network import NetworkNames


def run(module: Any, x: Tensor) -> Tensor | None:
    """The output of a module that torch.compile traces, by the op; None where the compiler traces
    the module's operations: in training, where gradients are wanted, for torch.export."""
    if torch.compiler.is_exporting() or module.training or x.dim() != 4:
        return None
    number = getattr(module, NUMBER)
    if not _serves(number, x.device, x.dtype):
        return None
    tensors = [*module.parameters(), *module.buffers()]
    if torch.is_grad_enabled():
        for t in (x, *tensors):
            if t.requires_grad:
                return None
    device = x.device.type
    # Compiled code runs without autocast.
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    result: Tensor = torch.ops.fused_resnet.module_inference(x, tensors, number, cast)
    return result


def _serves(number: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the module is fused for such an x. Asked while a compiler traces, and true then of
    the compiled code: the op asks anew."""
    module = numbered(number)
    names, _ = recipe_of(module)
    for cls in type(module).__mro__[: _depth(module)]:
        if cls.__dict__.keys() & {"forward", "_forward_impl"}:
            return False
    blocks = [(module, names)]
    if isinstance(names, NetworkNames):
        blocks = [(m, recipe_of(m)[0]) for m in module.modules()][1:]
    for m, found in blocks:
        if not isinstance(found, Names):
            continue
        description = describe(m, found)
        if isinstance(description, str):
            return False
        if isinstance(kernels_for(description, dtype, device), str):
            return False
    return True


# What torch.compiler.assume_constant_result sets; that also imports Dynamo, which takes a second.
_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _depth(module: Any) -> int:
    """The number of classes before the one that is registered."""
    _, forward = recipe_of(module)
    return next(
        i for i, cls in enumerate(type(module).__mro__) if cls.__dict__.get("forward") is forward
    )


class _Call(nn.Module):
    """The registered forward of a module, without the module's own hooks: the compiler has traced
    those already."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return recipe_of(self.module)[1](self.module, x)


def _inference(
    x: Tensor, tensors: Sequence[Tensor], number: int, cast: torch.dtype | None
) -> Tensor:
    module: Any = numbered(number)
    call = _Call(module)
    with torch.no_grad(), torch.autocast(x.device.type, cast, cast is not None):
        own = _are_own(module, tensors) and call_reason(x) is None
        y = call(x) if own else _with(call, tensors, x)
    # An op returns new memory.
    return y.clone() if y.data_ptr() == x.data_ptr() else y


def _are_own(module: nn.Module, tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors are the module's parameters and buffers, in order."""
    homes, names = module.__dict__.get(SLOTS, ((), ()))
    if len(homes) == len(tensors) and all(map(is_, map(dict.get, homes, names), tensors)):
        return True
    found: dict[int, tuple[dict[str, Any], str]] = {}
    for kind in ("_parameters", "_buffers"):
        for m in module.modules():
            for name, t in getattr(m, kind).items():
                if t is not None:
                    found.setdefault(id(t), (getattr(m, kind), name))
    homes, names = zip(*found.values(), strict=True) if found else ((), ())
    module.__dict__[SLOTS] = homes, names
    return len(homes) == len(tensors) and all(map(is_, map(dict.get, homes, names), tensors))


def _with(call: _Call, tensors: Sequence[Tensor], x: Tensor) -> Any:
    names = [name for name, _ in (*call.named_parameters(), *call.named_buffers())]
    return functional_call(call, dict(zip(names, tensors, strict=True)), (x,))


def _fake(x: Tensor, tensors: Sequence[Tensor], number: int, cast: torch.dtype | None) -> Tensor:
    with torch.no_grad(), torch.autocast(x.device.type, cast, cast is not None):
        y: Tensor = _with(_Call(numbered(number)), tensors, x)
    return y


register(
    "module_inference(Tensor x, Tensor[] tensors, int number, ScalarType? autocast) -> Tensor",
    _inference,
    _fake,
)
