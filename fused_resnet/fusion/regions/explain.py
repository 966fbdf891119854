"""What `explain` lists of a model that `fuse` changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_resnet.fusion.call import call_reason
from fused_resnet.fusion.inference.make import kernels_for
from fused_resnet.fusion.inference.release import released
from fused_resnet.fusion.training.prepare import step_of
from fused_resnet.kernels.problem import pair
from fused_resnet.layers.hooks import keeping_buffers, watching
from fused_resnet.layers.norms import uses_batch_statistics
from fused_resnet.layers.planned import FUSED

from . import backend
from .match import Found, Matcher
from .trace import Trace, signature_of, trace


class Part(NamedTuple):
    """A part of a model, by the name of its module or of the module that holds all of it. convs:
    the names of its convolutions. path: "inference", "training" or "stock"."""

    name: str
    path: str
    reason: str
    convs: list[str]


def parts_of(model: nn.Module, x: Any) -> Iterator[Part]:
    """The fused parts of the regions of `model` for a call model(x) now, then every other
    convolution, with the reason. x: None for a call with a tensor of the weights' dtype."""
    names = {m: name for name, m in model.named_modules()}
    left = {m: "no region holds it" for m in names if isinstance(m, nn.Conv2d)}
    left = {m: reason for m, reason in left.items() if _in_region(model, names[m])}
    seen: set[str] = set()
    for part in _walk(model, x, names, left):
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
    module: nn.Module, x: Any, names: dict[nn.Module, str], left: dict[Any, str]
) -> Iterator[Part]:
    if FUSED not in module.__dict__:
        for child in module.children():
            yield from _walk(child, None, names, left)
        return
    example = _example(module) if x is None else x
    signature = module.__dict__[FUSED].signature
    if signature is None or x is not None:
        call = signature_of((example,), {})
        signature = None if call is None else call[0]
    traced: Trace | str = "its arguments are not tensors"
    if signature is not None:
        traced = module.__dict__[FUSED].refused or trace(module, signature)
    if isinstance(traced, str):
        for m in module.modules():
            if m in left:
                left[m] = f"{type(module).__name__}: {traced}"
        for child in module.children():
            yield from _walk(child, None, names, left)
        return
    matched = Matcher(traced)
    for rejected in matched.rejected:
        alone = traced.modules.get(rejected.node)
        if alone in left:
            left[alone] = rejected.reason
    tensors = [t for t in pytree.tree_leaves(example) if isinstance(t, Tensor)]
    for found in matched.found:
        part = _part(found, traced, module, tensors[0], names)
        if part.path == "stock":
            for m in _convs(found, traced):
                left[m] = part.reason
            continue
        for m in _convs(found, traced):
            left.pop(m, None)
        yield part
    leaves = {m for m in traced.modules.values() if FUSED in m.__dict__}
    for m in leaves:  # their forward could not be traced
        yield from _walk(m, None, names, left)


def _example(module: nn.Module) -> Tensor:
    """A tensor like the module's weights, of which only dtype and device are read."""
    for p in module.parameters():
        if p.dim() == 4:
            return torch.zeros(1, 1, 1, 1, dtype=p.dtype, device=p.device)
    return torch.zeros(1, 1, 1, 1)


def _convs(found: Found, traced: Trace) -> list[nn.Module]:
    return [m for n in found.nodes if isinstance(m := traced.modules.get(n), nn.Conv2d)]


def _part(
    found: Found, traced: Trace, module: nn.Module, x: Tensor, names: dict[nn.Module, str]
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
    reason = call_reason(x, module.training)
    norms = [unit.norm for unit in units if unit.norm is not None]
    norms += [] if found.norm is None else [found.norm]
    batch = any(map(uses_batch_statistics, norms))
    if reason is None and not batch and found.description is not None:
        kernels = kernels_for(found.description, x.dtype, x.device)
        reason = kernels if isinstance(kernels, str) else None
    elif reason is None and found.description is not None:
        step = step_of(module, found.description, x)
        reason = step if isinstance(step, str) else None
    if reason is not None:
        return Part(name, "stock", reason, convs)
    if batch:
        return Part(name, "training", "", convs)
    return Part(name, "inference", released(_convs(found, traced)), convs)


def multiplications(model: nn.Module, x: Any) -> dict[str, int]:
    """The number of multiplications of each convolution of `model` in model(x), by name. Runs the
    model once, without gradients; its buffers stay."""
    found: dict[str, int] = {}
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}

    def see(name: str, y: Tensor) -> None:
        conv = convs[name]
        R, S = pair(conv.kernel_size)
        work = y.numel() * (conv.in_channels // conv.groups) * R * S
        found[name] = found.get(name, 0) + work

    with torch.no_grad(), keeping_buffers(model), watching(convs.items(), see):
        model(x)
    return found
