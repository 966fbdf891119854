"""What `explain` lists of a model that `fuse` changed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet.fusion.dtype_rules import weights_fit
from fused_resnet.fusion.inference.make import kernels_for
from fused_resnet.fusion.inference.release import released
from fused_resnet.fusion.training.prepare import reason_against_step
from fused_resnet.kernels.problem import pair
from fused_resnet.layers.hooks import keeping_buffers, watching
from fused_resnet.layers.planned import FUSED

from . import backend
from .match import Found, Matcher
from .region import reason_against, records, trains
from .trace import Signature, Trace, signature_of, trace


class Call(NamedTuple):
    """How a region is called. reason: why no program runs such a call, whatever its forward is.
    records: whether autograd does. x: a tensor of the first one's dtype and device."""

    signature: Signature | None
    reason: str | None
    records: bool
    x: Tensor


class Calls(NamedTuple):
    """The first call of each region that a call of the model reaches. error: what it raised."""

    first: dict[nn.Module, Call]
    error: str | None

    def of(self, module: nn.Module) -> Call:
        unreached = self.error or "this call does not reach it"
        return self.first.get(module) or Call(None, unreached, False, torch.zeros(()))


class Part(NamedTuple):
    """A part of a model, by the name of its module or of the module that holds all of it. convs:
    the names of its convolutions. path: "inference", "training" or "stock"."""

    name: str
    path: str
    reason: str
    convs: list[str]


def parts_of(model: nn.Module, calls: Calls | None) -> Iterator[Part]:
    """The fused parts of the regions of `model`, then every other convolution, with the reason.
    calls: those that were seen in a call of the model; None for calls with a tensor of the weights'
    dtype, and without gradients in eval mode."""
    names = {m: name for name, m in model.named_modules()}
    default = (calls.error if calls else None) or "no region holds it"
    left = {m: default for m in names if isinstance(m, nn.Conv2d)}
    left = {m: reason for m, reason in left.items() if _in_region(model, names[m])}
    seen: set[str] = set()
    for part in _walk(model, calls, names, left):
        # A module that is called several times is listed once.
        if not seen.issuperset(part.convs) or not part.convs:
            yield part._replace(convs=[conv for conv in part.convs if conv not in seen])
        seen.update(part.convs)
    for m, reason in left.items():
        yield Part(names[m], "stock", reason, [names[m]])


def compiled_parts(model: nn.Module) -> Iterator[Part]:
    """The parts of the graphs that the backend compiled with tensors or modules of `model`, as they
    ran last; where a graph was not fused, its convolutions."""
    names = {id(m.weight): name for name, m in model.named_modules() if _is_conv(m)}
    for graph in list(backend.graphs):
        mine = [b for b in graph.bounds if any(id(t) in names for t in b.tensors.values())]
        for bound in mine:
            yield from _bound_parts(bound, names)
        if not mine:
            yield from _left_parts(graph, model)


def _bound_parts(bound: Any, names: dict[int, str]) -> Iterator[Part]:
    modules, program = bound.trace.modules, bound.program
    convs = {n: names.get(id(m.weight), n.name) for n, m in modules.items() if _is_conv(m)}
    if bound.reason or program is None:
        for name in convs.values():
            yield Part(name, "stock", bound.reason, [name])
        return
    path = "training" if program.differentiable else "inference"
    left = dict(convs)
    for found in program.matched.found:
        inside = [left.pop(n) for n in found.nodes if n in left]
        if inside:
            reason = program.reasons.get(found.nodes[0], "")
            yield Part(inside[0], "stock" if reason else path, reason, inside)
    for n, reason in bound.rejected.items():
        if n.target in _CONVS:
            yield Part(n.name, "stock", reason, [n.name])
    reasons = {r.node: r.reason for r in program.matched.rejected}
    for n, name in left.items():
        yield Part(name, "stock", reasons.get(n, "not part of a pattern"), [name])


def _left_parts(graph: Any, model: nn.Module) -> Iterator[Part]:
    """The convolutions of a graph without a program: those of modules of `model`, and those whose
    weights are attributes of one."""
    modules = {(str(id(m)), type(m)): name for name, m in model.named_modules()}
    tensors = {
        id(t): f"{name}.{key}" if name else key
        for name, m in model.named_modules()
        for home in (m._parameters, m._buffers, m.__dict__)
        for key, t in home.items()
        if isinstance(t, Tensor)
    }
    inputs = [n for n in graph.gm.graph.nodes if n.op == "placeholder"]
    weights = {inputs[i]: tensors.get(id(t)) for i, t in graph.weights().items()}
    for n in graph.gm.graph.nodes:
        if n.op != "call_function" or n.target not in _CONVS:
            continue
        # Dynamo's: the modules in whose forward the call is, by id, from the outermost.
        stack = () if graph.bounds else (n.meta.get("nn_module_stack") or {}).items()
        called = [modules.get((str(key), cls)) for key, (_, cls) in stack]
        name = next((name for name in reversed(called) if name is not None), None)
        if not name:
            read = [weights.get(m) for m in n.all_input_nodes]
            name = next(filter(None, read), n.name if name == "" else None)
        if name is not None:
            yield Part(name, "stock", graph.reason, [name])


_CONVS = (torch.conv2d, torch.ops.aten.conv2d.default)


def _is_conv(m: Any) -> bool:
    return isinstance(m, nn.Conv2d)


def _in_region(model: nn.Module, name: str) -> bool:
    """Whether a module that `fuse` changed holds the module of this name."""
    homes = name.split(".")[:-1]
    return any(
        FUSED in model.get_submodule(".".join(homes[:i])).__dict__ for i in range(len(homes) + 1)
    )


def _walk(
    module: nn.Module, calls: Calls | None, names: dict[nn.Module, str], left: dict[Any, str]
) -> Iterator[Part]:
    if FUSED not in module.__dict__:
        for child in module.children():
            yield from _walk(child, calls, names, left)
        return
    call = _assumed(module) if calls is None else calls.of(module)
    if call.reason is not None:
        why = call.reason
        if calls is not None and calls.error is not None:  # which that may explain
            calls = calls._replace(error=why)
    else:
        assert call.signature is not None
        traced = module.__dict__[FUSED].refused or trace(module, call.signature)
        if not isinstance(traced, str):
            yield from _traced_parts(traced, module, call, calls, names, left)
            return
        why = f"{type(module).__name__}: {traced}"
    for m in module.modules():
        if m in left:
            left[m] = why
    for child in module.children():  # they decide for themselves
        yield from _walk(child, calls, names, left)


def _traced_parts(
    traced: Trace,
    module: nn.Module,
    call: Call,
    calls: Calls | None,
    names: dict[nn.Module, str],
    left: dict[Any, str],
) -> Iterator[Part]:
    matched = Matcher(traced)
    for rejected in matched.rejected:
        alone = traced.modules.get(rejected.node)
        if alone in left:
            left[alone] = rejected.reason
    for found in matched.found:
        part = _part(found, traced, module, call, names)
        if part.path != "stock" and calls is not None and calls.error is not None:
            part = part._replace(path="stock", reason=calls.error)
        if part.path == "stock":
            for m in _convs(found, traced):
                left[m] = part.reason
            continue
        for m in _convs(found, traced):
            left.pop(m, None)
        yield part
    leaves = {m for m in traced.modules.values() if FUSED in m.__dict__}
    for m in leaves:  # their forward could not be traced
        yield from _walk(m, calls, names, left)


def _assumed(module: nn.Module) -> Call:
    """A call like the last one, or with a tensor of the weights' dtype; without gradients in eval
    mode."""
    weights = [p for p in module.parameters() if p.dim() == 4]
    x = _example(weights[0] if weights else torch.zeros(()))
    signature = module.__dict__[FUSED].signature
    if signature is None:
        (signature, _) = signature_of((x,), {}) or (None, [])
    return Call(signature, reason_against(module, [x]), False, x)


def _example(t: Tensor) -> Tensor:
    """A tensor like t, of which only dtype and device are read."""
    return torch.zeros(1, 1, 1, 1, dtype=t.dtype, device=t.device)


def _convs(found: Found, traced: Trace) -> list[nn.Module]:
    return [m for n in found.nodes if isinstance(m := traced.modules.get(n), nn.Conv2d)]


def _part(
    found: Found, traced: Trace, module: nn.Module, call: Call, names: dict[nn.Module, str]
) -> Part:
    inside = [names[traced.modules[n]] for n in found.nodes if n in traced.modules]
    convs = [names[m] for m in _convs(found, traced)]
    units = [] if found.description is None else found.description.units
    # A block by the module that holds it, other parts by their convolution.
    name = (convs or inside or [names[module]])[0]
    if len(convs) > 1:
        homes = [name.split(".") for name in inside]
        common = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*homes, strict=False))
        name = ".".join(level[0] for level in common)
    x, reason, differentiable = call.x, None, trains(traced, call.records)
    description = found.description
    if description is not None:
        given = found.source.op == "placeholder"  # else the forward may have converted it
        weight = units[0].conv.weight
        if not differentiable:
            kernels = kernels_for(description, x.dtype, x.device)
            reason = kernels if isinstance(kernels, str) else None
        elif given and not weights_fit(x.dtype, weight):
            reason = f"x is {x.dtype} and a weight is {weight.dtype}"
        else:
            reason = reason_against_step(description, x)
    if reason is not None:
        return Part(name, "stock", reason, convs)
    if differentiable:
        return Part(name, "training", "", convs)
    return Part(name, "inference", released(_convs(found, traced)), convs)


def seen(model: nn.Module, x: Any) -> tuple[dict[str, int], Calls]:
    """Of model(x): the number of multiplications of each convolution, by name, and the first call
    of each region. Runs the model once, unfused; its buffers stay, and nothing is saved for a
    backward pass. If it raises, what ran before is seen."""
    found: dict[str, int] = {}
    calls: dict[nn.Module, Call] = {}
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}

    def see(name: str, y: Tensor) -> None:
        conv = convs[name]
        R, S = pair(conv.kernel_size)
        work = y.numel() * (conv.in_channels // conv.groups) * R * S
        found[name] = found.get(name, 0) + work

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        call = signature_of(args, kwargs)
        if module in calls:
            return
        if call is None:
            calls[module] = Call(None, "its arguments are not tensors", False, torch.zeros(()))
            return
        signature, tensors = call
        reason = reason_against(module, tensors)
        calls[module] = Call(
            signature, reason, records(module, tensors),
            _example(tensors[0]) if reason is None else torch.zeros(()),
        )  # fmt: skip

    error = None
    with contextlib.ExitStack() as stack:
        for m in model.modules():
            if FUSED in m.__dict__:  # a region with a hook is not fused
                hook = m.register_forward_pre_hook(enter, with_kwargs=True)
                stack.callback(hook.remove)
        stack.enter_context(watching(convs.items(), see))
        stack.enter_context(keeping_buffers(model))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: None, _dropped))
        try:
            model(x)
        except Exception as raised:
            error = f"the call raises {type(raised).__name__}: {str(raised).partition(chr(10))[0]}"
    return found, Calls(calls, error)


def _dropped(saved: None) -> Tensor:
    raise RuntimeError("explain: the call's values were not saved for a backward pass")
