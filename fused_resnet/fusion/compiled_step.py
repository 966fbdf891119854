"""A module's training step in the graph of a compiler: the fused step that runs uncompiled.

    y, kept = module_step(x, parameters, buffers, number, autocast, needs, positions)
    module_statistics(written, kept, number, positions)               updates `written`, in place
    grads = module_step_backward(dy, kept, y, x, parameters, needs)

for the module of that number: a block, or a network's stem and stages without its head, which the
compiler traces. positions: of the buffers that the step updates.

`module_step` runs the module's own fused forward and keeps autograd's graph of it, which
`module_step_backward` runs through. It writes to nothing: running statistics are updated by
`module_statistics`, so that a compiler may drop, repeat or merge steps (activation checkpointing
does), and sees what is written. It reads nothing but its operands: other tensors than the module's,
as a compiler passes if the graph itself writes to them, run through the module by functional_call.

kept (1,) int64 is the step's number; its memory owns the step, which is freed with it. y, x and
parameters are operands of the backward op since the kept graph reads their memory, which a compiler
may otherwise use for something else."""

from __future__ import annotations

import contextlib
import itertools
import logging
import weakref
from collections.abc import Iterator, Sequence
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fused_resnet import layout
from fused_resnet.kernels.problem import output_shape, pair
from fused_resnet.kernels.training.native import Native
from fused_resnet.layers import norms
from fused_resnet.layers.planned import numbered
from fused_resnet.ops.library import register

from . import pooling
from .call import call_reason
from .description import Description, Names, describe, recipe_of
from .dtype_rules import output_dtype
from .network import NetworkNames, members_of
from .operands import are_own, operands_of, own_forward, own_tensors, structure_of
from .training.network import run_body
from .training.one_op import prepare_tracking
from .training.prepare import shape_after, step_for
from .training.units import reason_against_step, run_step

_log = logging.getLogger(__name__)
_numbers = itertools.count()
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class _Kept(bytearray):
    """What one step keeps, in the object that owns the memory of `kept`.

    y: its output with autograd's graph; inputs: the leaves of that graph that require gradients.
    updates: of the running statistics of the module's own norms; or values: those of all buffers
    after the step."""

    y: Tensor
    inputs: list[Tensor]
    updates: list[norms.Update]
    values: list[Tensor] | None = None


_steps: weakref.WeakValueDictionary[int, _Kept] = weakref.WeakValueDictionary()


def run(
    module: Any, names: Any, x: Tensor, number: int, parameters: list[Tensor],
    buffers: dict[str, Tensor], needs: list[bool],
) -> Tensor | None:  # fmt: skip
    """The output of a module that torch.compile traces, by the ops; None where the compiler traces
    the module's operations. buffers: by name."""
    if not _serves(number, x.device, x.dtype):
        return None
    device = x.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    ops, values = torch.ops.fused_resnet, list(buffers.values())
    tracking = []
    for name, m in module.named_modules():
        if isinstance(m, nn.BatchNorm2d) and m.training and m.track_running_stats:
            home = name + "." if name else ""
            tracking += [home + key for key in _STATISTICS]
    positions = [i for i, name in enumerate(buffers) if name in tracking]
    y: Tensor
    given = x, parameters, values, number, cast, needs, positions, structure_of(number)
    y, kept = ops.module_step(*given)
    if positions:
        ops.module_statistics([values[i] for i in positions], kept, number, positions)
    if isinstance(names, NetworkNames):
        y = module.fc(torch.flatten(module.avgpool(y), 1))
    return y


def _serves(number: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the module's step is fused for such an x. Asked while a compiler traces, and true
    then of the compiled code: the op asks anew."""
    module = numbered(number)
    reason = _reason(module, device, dtype)
    if reason is not None:
        _log.info("a training step of %s is not fused: %s", type(module).__name__, reason)
    return reason is None


# What torch.compiler.assume_constant_result sets; that also imports Dynamo, which takes a second.
_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _reason(module: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    if own_forward(module):
        return "its class has a forward of its own"
    parts = _parts(module)
    if isinstance(parts, str):
        return parts
    for description in parts:
        if isinstance(description, nn.Conv2d):
            continue
        why = reason_against_step(description, device, dtype)
        if why is None and len(parts) > 1 and description.survival != 1:
            why = "stochastic depth selects blocks at every step"
        if why is not None:
            return why
        dtype = output_dtype(dtype, device.type)
    last = torch.channels_last
    for p in module.parameters():
        if not p.is_contiguous() and not (p.dim() == 4 and p.is_contiguous(memory_format=last)):
            return "a parameter is not contiguous"
    return None


def _parts(module: Any) -> list[Any] | str:
    """The descriptions of a block, or of a network's stem (its first convolution if that has no
    norm) and blocks; or why there are none."""
    names, _ = recipe_of(module)
    found: list[Any] = []
    if isinstance(names, Names):
        found = [describe(module, names)]
    else:
        first, stages, _ = members_of(module, names)
        for member in (first, *itertools.chain.from_iterable(stages)):
            if member.names is not None:
                found.append(describe(member.module(module), member.names))
            elif member is first and type(getattr(module, names.stem)) is nn.Conv2d:
                found.append(getattr(module, names.stem))
            else:
                found.append("one of its parts is no block")
    return next((part for part in found if isinstance(part, str)), found)


class _Body(nn.Module):
    """The module's forward, of a network without its head, by PyTorch's operations where it is not
    fused, and without the module's own hooks: the compiler has traced those already."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        module: Any = self.module
        names, forward = recipe_of(module)
        if isinstance(names, Names):
            return forward(module, x)
        calls = [getattr(module, name) for name in (*names.first, *names.stages)]
        if names.running is not None:
            stages = getattr(module, names.running)()
            calls[len(names.first) :] = itertools.chain.from_iterable(stages)
        for call in (*calls, *(getattr(module, name) for name in names.norm or ())):
            x = call(x)
        return x


@contextlib.contextmanager
def _above_autograd() -> Iterator[None]:
    """Autograd sees operations, also in an op, which runs below it."""
    key = torch._C.DispatchKey
    inside, outside = (
        torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    )  # fmt: skip
    for name in (key.AutogradFunctionality, key.AutogradOther, key.AutogradNestedTensor):
        outside = outside.remove(name)
    outside, inside = outside.remove(key.ADInplaceOrView), inside.add(key.ADInplaceOrView)
    with torch._C._ForceDispatchKeyGuard(inside, outside):
        yield


def _step(
    x: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor], number: int,
    cast: torch.dtype | None, needs: Sequence[bool], positions: Sequence[int],
    structure: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    module: Any = numbered(number)
    kept = _Kept(next(_numbers).to_bytes(8, "little"))
    keys = _above_autograd() if any(needs) else contextlib.nullcontext()
    cast_to = torch.autocast(x.device.type, cast, cast is not None)
    with keys, torch.set_grad_enabled(any(needs)), cast_to:
        leaf = x.detach().requires_grad_(needs[0])
        y = _fused(module, leaf, parameters, buffers, needs[1:], positions, kept)
        if y is None:
            _log.info("a training step of %s runs PyTorch's operations", type(module).__name__)
            y = _composed(module, leaf, parameters, buffers, needs[1:], kept)
        kept.y = _laid_out(module, y, x)
    if any(needs):
        leaves = zip((leaf, *kept.inputs), needs, strict=True)
        kept.inputs = [t for t, need in leaves if need]
    _steps[int.from_bytes(kept, "little")] = kept
    return kept.y.detach(), torch.frombuffer(kept, dtype=torch.int64)


def _fused(
    module: Any, x: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor],
    needs: Sequence[bool], positions: Sequence[int], kept: _Kept,
) -> Tensor | None:  # fmt: skip
    """The output of the module's fused step; None where it has none, or not for these tensors."""
    names, body = _names_of(module)
    ignored = [len(parameters) + i for i in positions]  # batch statistics are read instead
    own = are_own(module, [*parameters, *buffers], body, ignored)
    if not own or call_reason(x, True) is not None:
        return None
    if any(needs) and list(map(attrgetter("requires_grad"), parameters)) != list(needs):
        return None
    # They run where the compiler's graph hands the gradient over.
    if any(map(attrgetter("_backward_hooks"), parameters)):
        return None
    try:
        with norms.postponing() as kept.updates:
            if body is not None:
                y: Any = run_body(module, names, x)
            else:
                step = step_for(module, names, x)
                y = None if isinstance(step, str) else run_step(step, x)
    except norms.Unfused:
        return None
    kept.inputs = list(parameters)
    return y


def _composed(
    module: Any, x: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor],
    needs: Sequence[bool], kept: _Kept,
) -> Any:  # fmt: skip
    """The output of the module's forward with these tensors, which it does not write to."""
    call = _Body(module)
    inputs, values = operands_of(call, _names_of(module)[1], "module.")
    kept.inputs = [t.detach().requires_grad_(n) for t, n in zip(parameters, needs, strict=True)]
    kept.values = [b.clone() for b in buffers]
    given = dict(zip(inputs, kept.inputs, strict=True))
    return functional_call(call, {**given, **dict(zip(values, kept.values, strict=True))}, (x,))


def _names_of(module: nn.Module) -> tuple[Any, tuple[str, ...] | None]:
    """The names registered for the module, and the submodules whose tensors are operands."""
    names, _ = recipe_of(module)
    return names, names.body if isinstance(names, NetworkNames) else None


def _laid_out(module: Any, y: Tensor, x: Tensor) -> Tensor:
    """y in the op's layout: as uncompiled a block's, and a network's features channels_last on the
    CPU, as they are computed."""
    memory_format = layout.memory_format(x)
    if isinstance(recipe_of(module)[0], Names):
        return layout.normed(y, memory_format)
    return layout.exactly(y, torch.channels_last if x.device.type == "cpu" else memory_format)


def _found(kept: Tensor) -> _Kept:
    found = _steps.get(int(kept))
    if found is None:
        raise RuntimeError(
            "module_step_backward: the step is no more; `kept` must be the tensor that module_step "
            "returned, or share its memory"
        )
    return found


def _statistics(
    written: Sequence[Tensor], kept: Tensor, number: int, positions: Sequence[int]
) -> None:
    found = _found(kept)
    if found.values is not None:
        for t, i in zip(written, positions, strict=True):
            t.copy_(found.values[i])
        return
    module = numbered(number)
    try:
        tracked = _tracked(module, found, written, positions, fresh=False)
    except KeyError:  # their places have changed
        tracked = _tracked(module, found, written, positions, fresh=True)
    together = None
    if all(u.update is Native.update_running for u in found.updates):
        together = prepare_tracking(tracked, [float(u.values) for u in found.updates])
    if together is not None:
        together.run([u.state[0] for u in found.updates])
        return
    for norm, u in zip(tracked, found.updates, strict=True):
        norms.track(norm, u.state, u.values, u.update)


def _tracked(
    module: nn.Module, found: _Kept, written: Sequence[Tensor], positions: Sequence[int],
    fresh: bool,
) -> list[Any]:  # fmt: skip
    """The norms of the step's updates with the tensors of `written` in place of their own."""
    own = [t for t in own_tensors(module, _names_of(module)[1], fresh) if type(t) is Tensor]
    places: dict[int, Any] = {id(own[i]): t for t, i in zip(written, positions, strict=True)}
    places[id(None)] = None
    return [
        SimpleNamespace(
            training=True, track_running_stats=True, momentum=norm.momentum,
            **{key: places[id(getattr(norm, key))] for key in _STATISTICS},
        )
        for norm, *_ in found.updates
    ]  # fmt: skip


def _backward(
    dy: Tensor, kept: Tensor, y: Tensor, x: Tensor, parameters: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients of those of x and parameters that `needs` selects."""
    found = _found(kept)
    with _above_autograd():
        # The graph stays: a compiler may merge equal steps, and ask each for its gradients.
        grads = torch.autograd.grad(found.y, found.inputs, dy, retain_graph=True, allow_unused=True)
    results, seen = [], {dy.data_ptr()}
    given = [t for t, need in zip((x, *parameters), needs, strict=True) if need]
    for grad, t in zip(grads, given, strict=True):
        like = _gradient_like(t, t is x)
        if grad is None:
            like.zero_()
        elif grad.stride() != like.stride() or grad.data_ptr() in seen:
            like.copy_(grad)  # an op returns new memory
        else:
            like = grad
        seen.add(like.data_ptr())
        results.append(like)
    return results


def _gradient_like(t: Tensor, is_image: bool) -> Tensor:
    """An uninitialised gradient of t."""
    if not is_image:
        return layout.empty_like(t)
    memory_format = layout.memory_format(t)
    return layout.exactly(layout.empty(t.shape, t, memory_format), memory_format)


def _fake_step(
    x: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor], number: int,
    cast: torch.dtype | None, needs: Sequence[bool], positions: Sequence[int],
    structure: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    module = numbered(number)
    shape: Any = x.shape
    dtype = x.dtype
    with torch.autocast(x.device.type, cast, cast is not None):
        parts: Any = _parts(module)
        for part in parts:
            if isinstance(part, Description):
                found = shape_after(part, shape, dtype)
                if found is not None and part.pool is not None:
                    found = pooling.pool_shape(part.pool, found)
            else:
                sizes = pair(part.stride), pair(part.padding), pair(part.dilation)
                found = output_shape(shape, part.weight.shape, *sizes, part.groups)
            if found is None:
                raise RuntimeError(
                    f"{type(module).__name__}: x of shape {tuple(x.shape)} and {x.dtype} does not "
                    "fit its convolutions"
                )
            shape, dtype = found, output_dtype(dtype, x.device.type)
    y = x.new_empty(shape, dtype=dtype)
    return _laid_out(module, y, x), torch.empty(1, dtype=torch.int64)


def _fake_backward(
    dy: Tensor, kept: Tensor, y: Tensor, x: Tensor, parameters: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    given = zip((x, *parameters), needs, strict=True)
    return [_gradient_like(t, t is x) for t, need in given if need]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, parameters, buffers, _, _, needs, positions, _ = inputs
    y, kept = output
    # What PyTorch requires of lists: a gradient for each tensor, [] for an empty list of numbers.
    ctx.needs, ctx.buffers = list(needs), [None] * len(buffers)
    ctx.positions = None if positions else []
    ctx.save_for_backward(kept, y, x, *parameters)


def _grad(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
    kept, y, x, *parameters = ctx.saved_tensors
    op = torch.ops.fused_resnet.module_step_backward
    found = iter(op(dy, kept, y, x, parameters, ctx.needs))
    dx, *grads = [next(found) if need else None for need in ctx.needs]
    return dx, grads, ctx.buffers, None, None, None, ctx.positions, None


def _once(ctx: Any, *_: Any) -> NoReturn:
    raise NotImplementedError(
        "fused_resnet: a compiled training step is differentiable once; for second derivatives "
        "call the uncompiled model"
    )


register(
    "module_step(Tensor x, Tensor[] parameters, Tensor[] buffers, int number, "
    "ScalarType? autocast, bool[] needs, int[] positions, str structure='') -> (Tensor, Tensor)",
    _step, _fake_step, _save, _grad,
)  # fmt: skip
register(
    "module_step_backward(Tensor dy, Tensor kept, Tensor y, Tensor x, Tensor[] parameters, "
    "bool[] needs) -> Tensor[]",
    _backward, _fake_backward, lambda ctx, inputs, output: None, _once,
)  # fmt: skip
register(
    "module_statistics(Tensor(a!)[] written, Tensor kept, int number, int[] positions) -> ()",
    _statistics, lambda written, kept, number, positions: None,
)  # fmt: skip
