"""Modules of this package in the graph of a compiler: their inference is one op.

    module_inference(x, tensors, number, autocast)
        = forward(module of that number, with these tensors, under that autocast)(x)

The op runs the module's own fused forward, whose plans are kept with the module, so a compiled and
an uncompiled call share packed weights, and everything that a plan guards is guarded here too. It
reads nothing but its operands: other tensors than the module's, as a compiler passes if the graph
itself writes to them, run stock's operations on them. In a graph that is the module's forward alone
nothing can write to them; there `tensors` is empty, for the module's own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fused_resnet.layers.planned import NUMBER, numbered
from fused_resnet.ops.library import register

from . import compiled_step
from .description import Names, describe, recipe_of
from .inference.make import kernels_for
from .network import NetworkNames
from .operands import are_own, operands_of, own_forward, structure_of

_log = logging.getLogger(__name__)


def run(module: Any, names: Any, x: Tensor) -> Tensor | None:
    """The output of a module that torch.compile traces, by an op; None where the compiler traces
    the module's operations: for torch.export, and where the op would not be fused."""
    if torch.compiler.is_exporting() or x.dim() != 4:
        return None
    number = getattr(module, NUMBER)
    grad = torch.is_grad_enabled()
    if module.training or (
        grad and (x.requires_grad or any([p.requires_grad for p in module.parameters()]))
    ):
        body = names.body if isinstance(names, NetworkNames) else None
        parameters, buffers = operands_of(module, body)
        needs = [grad and t.requires_grad for t in (x, *parameters.values())]
        operands = list(parameters.values()), buffers, needs
        return compiled_step.run(module, names, x, number, *operands)
    if not _serves(number, x.device, x.dtype):
        return None
    tensors = []
    if (
        grad
        or not isinstance(names, NetworkNames)
        or type(module.fc) is not nn.Linear
        or type(module.avgpool) is not nn.AdaptiveAvgPool2d
        # Dynamo guards what it reads: the result has the shape and dtype of the head's.
        or not all([p.dim() for p in module.fc.parameters()])
        or not _is_alone(number)
    ):
        tensors = [*module.parameters(), *module.buffers()]
    device = x.device.type
    # Compiled code runs without autocast.
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    structure, op = structure_of(number), torch.ops.fused_resnet.module_inference
    result: Tensor = op(x, tensors, number, cast, structure)
    return result


def _serves(number: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the module is fused for such an x. Asked while a compiler traces, and true then of
    the compiled code: the op asks anew."""
    module = numbered(number)
    reason = _reason(module, device, dtype)
    if reason is not None:
        _log.info("inference of %s is not fused: %s", type(module).__name__, reason)
    return reason is None


# What torch.compiler.assume_constant_result sets; that also imports Dynamo, which takes a second.
_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_alone(number: int) -> bool:
    """Whether the frame that Dynamo traces is the module's own forward. Then nothing else in the
    graph can write to the module's tensors, and they need not be operands of the op: Dynamo would
    guard each at every call, which takes as long as a block."""
    module = numbered(number)
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        output: Any = InstructionTranslator.current_tx().output
        root, own = output.root_tx.f_code, output.local_scope.get("self")
    except (ImportError, AttributeError):  # another version's
        return False
    return own is module and root is recipe_of(module)[1].__code__


_is_alone._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _reason(module: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    if own_forward(module):
        return "its class has a forward of its own"
    names, _ = recipe_of(module)
    blocks = [(module, names)]
    if isinstance(names, NetworkNames):
        blocks = [(m, recipe_of(m)[0]) for m in module.modules()][1:]
    for m, found in blocks:
        if not isinstance(found, Names):
            continue
        description = describe(m, found)
        if isinstance(description, str):
            return description
        kernels = kernels_for(description, dtype, device)
        if isinstance(kernels, str):
            return kernels
    return None


class _Call(nn.Module):
    """The registered forward of a module, without the module's own hooks: the compiler has traced
    those already."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return recipe_of(self.module)[1](self.module, x)


def _inference(
    x: Tensor, tensors: Sequence[Tensor], number: int, cast: torch.dtype | None, structure: str = ""
) -> Tensor:
    module: Any = numbered(number)
    with torch.no_grad(), _autocast(x, cast):
        if not tensors or are_own(module, tensors):
            y = recipe_of(module)[1](module, x)
        else:
            y = _with(_Call(module), tensors, x)
    # An op returns new memory.
    return y.clone() if y.data_ptr() == x.data_ptr() else y


def _autocast(x: Tensor, cast: torch.dtype | None) -> Any:
    device = x.device.type
    if cast is None and not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, cast, cast is not None)


def _with(call: _Call, tensors: Sequence[Tensor], x: Tensor) -> Any:
    names = [name for name, _ in (*call.named_parameters(), *call.named_buffers())]
    return functional_call(call, dict(zip(names, tensors, strict=True)), (x,))


def _fake(
    x: Tensor, tensors: Sequence[Tensor], number: int, cast: torch.dtype | None, structure: str = ""
) -> Tensor:
    module: Any = numbered(number)
    if not tensors:
        weight = module.fc.weight
        return x.new_empty((x.shape[0], weight.shape[0]), dtype=cast or weight.dtype)
    with torch.no_grad(), _autocast(x, cast):
        y: Tensor = _with(_Call(module), tensors, x)
    return y


register(
    "module_inference(Tensor x, Tensor[] tensors, int number, ScalarType? autocast, "
    "str structure='') -> Tensor",
    _inference,
    _fake,
)
