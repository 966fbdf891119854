"""`export`: a model as a graph of this package's operations with packed weights, for torch.export,
AOTInductor and C++."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fused_resnet import layout
from fused_resnet.fusion.call import call_reason
from fused_resnet.fusion.description import Description
from fused_resnet.fusion.dtype_rules import output_dtype
from fused_resnet.fusion.inference.chain import run_stages, run_steps, stages_of, steps_of
from fused_resnet.fusion.inference.plan import Plan
from fused_resnet.kernels import native
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.convolution import FusedConv
from fused_resnet.kernels.cpu import fakes
from fused_resnet.kernels.cpu.convolution import NativeConv
from fused_resnet.kernels.problem import Problem

from .functional import Calls, value_of
from .match import Found, Matcher
from .program import InferenceProgram
from .state import Code
from .trace import Trace

_aten = torch.ops.aten
# Operations whose values do not depend on the layout of their inputs, which may keep it.
_ANY_LAYOUT = {
    _aten.relu.default, _aten.relu_.default, _aten.add.Tensor, _aten.add_.Tensor,
    _aten.mul.Tensor, _aten.mul_.Tensor, _aten.sigmoid.default, _aten.silu.default,
    _aten.silu_.default, _aten.hardswish.default, _aten.hardswish_.default,
    _aten.hardtanh.default, _aten.hardtanh_.default, _aten.gelu.default, _aten.cat.default,
    _aten.avg_pool2d.default, _aten.max_pool2d.default, _aten.upsample_bilinear2d.vec,
    _aten.upsample_nearest2d.vec, _aten.dropout.default,
}  # fmt: skip
# Those whose result has no layout.
_NO_LAYOUT = {_aten.adaptive_avg_pool2d.default, _aten.mean.dim, _aten.flatten.using_ints}


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> torch.export.ExportedProgram:
    """Exports a model in eval mode to a graph in which what `fuse` finds is an operation of this
    package, with folded norms and packed weights as constants; the rest are PyTorch's operations.

    args, kwargs, dynamic_shapes: as for torch.export.export, which gives the portable graph. The
    first image among them decides the dtype. The graph runs where this package's operations are
    loaded: by `fused_resnet.kernels.native.load()`, or in C++ by opening their library
    (examples/cpp); elsewhere torch.export.load raises RuntimeError ("error when deserializing").
    Compile it ahead of time by torch._inductor.aoti_compile_and_package. Weights written later are
    not in it.

    Raises ValueError if a norm is in training mode, if there is no image, or if nothing can be
    fused, with the reason; what torch.export raises besides.
    """
    missing = native.load()
    if missing is not None:
        raise ValueError(f"export: {missing}")
    portable = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    gm: Any = portable.module()
    fakes.register()
    _fuse(gm, pytree.tree_leaves((args, kwargs or {})))
    return torch.export.export(gm, args, kwargs, dynamic_shapes=dynamic_shapes)


def _fuse(gm: Any, inputs: Sequence[Any]) -> None:
    """Puts packed operations in the place of what can be fused in the graph of torch.export."""
    images = [t for t in inputs if isinstance(t, Tensor) and t.dim() == 4 and t.is_floating_point()]
    if not images:
        raise ValueError("export: args hold no image (N, C, H, W) of a floating dtype")
    x = images[0]
    reason = call_reason(x)
    if reason is None and x.device.type != "cpu":
        reason = (
            f"the operations that keep packed weights in a graph are the CPU's, x is {x.device}"
        )
    if reason is not None:
        raise ValueError(f"export: {reason}")
    graph: fx.Graph = gm.graph
    attributes = [n for n in graph.nodes if n.op == "get_attr"]
    called = Calls(graph, gm, {n: operator.attrgetter(n.target)(gm) for n in attributes})
    norms = [m for m in called.modules.values() if isinstance(m, nn.BatchNorm2d)]
    if any(norm.training and norm.track_running_stats for norm in norms):
        raise ValueError("export: a norm is in training mode; call model.eval() first")
    traced = Trace(graph, called.modules, gm, None, [], Code({}))
    matched = Matcher(traced)
    program = InferenceProgram(traced, matched, x)
    groups = [group for group in program.groups() if _keeps_dtype(group[0])]
    kept = [[_plan(program.plan(f), f.description) for f in group] for group in groups]
    together = [(g, plans) for g, plans in zip(groups, kept, strict=True) if all(plans)]
    if not together:
        reasons = [*program.reasons.values(), *called.rejected.values()]
        if len(groups) < len(program.groups()):
            reasons.append("an addition has another dtype than its operands, as under autocast")
        reasons = [*dict.fromkeys([*reasons, *(r.reason for r in matched.rejected)])]
        raise ValueError(f"export: nothing in the model can be fused: {'; '.join(reasons)}")
    order = {n: i for i, n in enumerate(graph.nodes)}
    together.sort(key=lambda entry: order[entry[0][-1].nodes[-1]])
    fused = {n for group, _ in together for f in group for n in f.nodes}
    replaced: dict[fx.Node, fx.Node] = {}
    for count, (group, plans) in enumerate(together):
        found, last = group[0], group[-1].nodes[-1]
        free = all(_any_layout(user, fused) for user in last.users)
        gm.add_module(f"fused_{count}", Packed(plans, x.dtype, free))
        reads = [found.source] if found.residual is None else [found.source, found.residual]
        operands = tuple(replaced.get(n, n) for n in reads)
        with graph.inserting_after(last):
            call = graph.call_module(f"fused_{count}", operands)
        call.meta = dict(last.meta)
        last.replace_all_uses_with(call)
        replaced[last] = call
        for f in reversed(group):
            for n in reversed(f.nodes):
                graph.erase_node(n)
    graph.lint()
    gm.delete_all_unused_submodules()
    gm.recompile()


def _keeps_dtype(found: Found) -> bool:
    added = None if found.residual is None else value_of(found.residual)
    return not found.promotes or found.keeps_dtype(value_of(found.source), added)


def _plan(plan: Plan | None, description: Description | None) -> Plan | None:
    """The plan, with PyTorch's operations for convolutions whose weights no graph can hold."""
    if plan is None or description is None or plan.packed is not None:
        return plan
    chosen = [(p, kind if kind is NativeConv else Composed) for p, kind in plan.kernels]
    made = Plan(description, plan.guard, chosen, plan.usual_dtype)
    return None if made.packed is None else made


class Composed(FusedConv):
    """A convolution by PyTorch's operations, which a compiler fuses."""

    def __init__(self, problem: Problem, weight: Tensor, scale: Tensor, shift: Tensor) -> None:
        super().__init__(problem, weight, scale, shift)
        weight = weight.detach().to(self.dtype).contiguous(memory_format=torch.channels_last)
        self.tensors = [weight, scale.detach().float(), shift.detach().float()]

    def run(
        self, x: Tensor, residual: Tensor | None, activation: Activation, overwrite: bool = False
    ) -> Tensor:
        weight, scale, shift = self.tensors
        y = F.conv2d(x, weight, None, *self.geometry)
        y = (y * scale[:, None, None] + shift[:, None, None]).to(self.dtype)
        return activation(y if residual is None else y + residual)


def _any_layout(node: fx.Node, fused: set[fx.Node]) -> bool:
    """Whether no value of the graph's result depends on the layout that the node reads."""
    if node in fused or node.target in _NO_LAYOUT:
        return True
    known = node.target in _ANY_LAYOUT or (node.op == "call_module" and node.target != "_guards_fn")
    return known and all(_any_layout(user, fused) for user in node.users)


class Packed(nn.Module):
    """Consecutive plans by the CPU's operations. x: (N, C, H, W) -> (N, K, P, Q) of x's layout, or
    channels_last if `free`. Its buffers are the packed weights."""

    def __init__(self, plans: Sequence[Any], dtype: torch.dtype, free: bool) -> None:
        super().__init__()
        self._plans, self._dtype, self._free = list(plans), output_dtype(dtype, "cpu"), free
        self._names: list[list[str]] = []
        for i, plan in enumerate(plans):
            self._names.append([f"packed_{i}_{j}" for j in range(len(plan.packed))])
            for name, t in zip(self._names[-1], plan.packed, strict=True):
                self.register_buffer(name, t)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        memory_format = layout.memory_format(x)
        kept = [[self.get_buffer(name) for name in names] for names in self._names]
        plans = [plan.over(tensors) for plan, tensors in zip(self._plans, kept, strict=True)]
        if added is not None:
            x = plans[0].run(self._entered(x), False, self._entered(added))
        elif all(type(size) is int for size in x.shape):
            x = run_stages(stages_of(plans, x.shape), x, writes=False)
        else:
            x = x if plans[0].takes_any else self._entered(x)
            x = run_steps(steps_of(plans), x, owned=False, writes=False)
        x = x if x.dtype == self._dtype else x.to(self._dtype)
        return x if self._free else x.contiguous(memory_format=memory_format)

    def _entered(self, x: Tensor) -> Tensor:
        return x.to(self._plans[0].dtype).contiguous(memory_format=torch.channels_last)
