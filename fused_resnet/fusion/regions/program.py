"""Runs a traced forward with its fused parts: a list of steps over named values.

Between fused parts nothing is converted: values stay channels_last as long as only operations read
them that accept any layout. Others, and the caller, get what stock's would be.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fused_resnet import layout, ops
from fused_resnet.fusion import pooling, store
from fused_resnet.fusion.description import Description, Place, tensors_of
from fused_resnet.fusion.dtype_rules import output_dtype
from fused_resnet.fusion.guard import Guard
from fused_resnet.fusion.inference.chain import Chain
from fused_resnet.fusion.inference.head import is_global_pool, is_one_pixel, run_head, run_mean
from fused_resnet.fusion.inference.make import plan_of
from fused_resnet.fusion.inference.norm import normed
from fused_resnet.fusion.inference.plan import Plan
from fused_resnet.fusion.training.prepare import Step, converted, step_of
from fused_resnet.fusion.training.units import convolve, norm_step, run_step
from fused_resnet.kernels import registry
from fused_resnet.layers.hooks import patched
from fused_resnet.layers.norms import has_activation

from .match import Found, Matcher
from .trace import Trace

# Operations whose values do not depend on the layout of their inputs, and which keep it.
_KEEP = {
    operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, torch.add, torch.mul,
    torch.relu, torch.relu_, F.relu, F.relu_, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.sigmoid,
    torch.sigmoid, F.interpolate, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, torch.cat,
    F.leaky_relu, F.relu6, F.pad,
}  # fmt: skip
_KEEP_METHODS = {
    "relu",
    "relu_",
    "add",
    "add_",
    "mul",
    "mul_",
    "sigmoid",
    "__add__",
    "__iadd__",
    "clamp",
}
_KEEP_MODULES = (
    nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish,
    nn.Hardsigmoid, nn.LeakyReLU, nn.GELU, nn.Sigmoid, nn.MaxPool2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Identity, nn.Upsample,
    nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d,
)  # fmt: skip
# Operations that read only sizes, or whose values do not depend on the layout of their inputs and
# whose result has no layout.
_REDUCE = {torch.flatten, torch.mean, getattr}
_REDUCE_METHODS = {"size", "dim", "mean", "flatten", "expand_as"}
_IMAGE = (["2", "3"], ["-1", "-2"])


_normalise: Any = nn.BatchNorm2d.forward


def _keeps(node: fx.Node, module: Any) -> bool:
    """Whether the node's value does not depend on the layout of its inputs, which it keeps."""
    if module is not None:
        return isinstance(module, _KEEP_MODULES)
    if node.target in ("mean", "amax", torch.mean, torch.amax):
        return node.kwargs.get("keepdim") is True
    return node.target in (_KEEP if node.op == "call_function" else _KEEP_METHODS)


def _reduces(node: fx.Node, module: Any) -> bool:
    """Whether the node is one of these, and its result is not of four dimensions."""
    if _flattens(node, module):
        return True
    known = _REDUCE if node.op == "call_function" else _REDUCE_METHODS
    if module is not None or node.target not in known or node.kwargs.get("keepdim"):
        return False
    if node.target in ("mean", torch.mean):
        dims = node.args[1] if len(node.args) == 2 else node.kwargs.get("dim")
        return isinstance(dims, (tuple, list)) and sorted(map(str, dims)) in _IMAGE
    return node.target not in ("flatten", torch.flatten)


def _flattens(node: fx.Node, module: Any) -> bool:
    """Whether the node is (N, C, H, W) -> (N, C H W)."""
    if module is not None:
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    named = node.target in ("flatten", torch.flatten)
    return named and node.args[1:] == (1,) and not node.kwargs


def _keeps_mean(node: fx.Node, module: Any) -> bool | None:
    """Of a mean over an image's pixels: whether it keeps their dimensions. None of other nodes."""
    if module is not None:
        single = len(node.args) == 1 and not node.kwargs
        return True if is_global_pool(module) and single else None
    if node.target is F.adaptive_avg_pool2d:
        sizes = [*node.args[1:], *node.kwargs.values()]
        return True if len(node.args) > 0 and len(sizes) == 1 and is_one_pixel(sizes[0]) else None
    if node.target not in ("mean", torch.mean) or len(node.args) + len(node.kwargs) > 3:
        return None
    named = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    dims, keeps = named.pop("dim", None), named.pop("keepdim", False)
    image = isinstance(dims, (tuple, list)) and sorted(map(str, dims)) in _IMAGE
    return keeps if image and not named and isinstance(keeps, bool) else None


def _mean(call: Callable[..., Any], keeps: bool, x: Any, *args: Any, **kwargs: Any) -> Any:
    """call(x, ...), a mean over an image's pixels, by the op where it serves."""
    hooked = isinstance(call, nn.Module) and patched(call) is not None
    y = None if hooked else run_mean(x)
    if y is None:
        return call(x, *args, **kwargs)
    return y[:, :, None, None] if keeps else y


Values = dict[fx.Node, Any]
# Makes one function of consecutive nodes without a fused counterpart, or returns None.
Rest = Callable[[list[fx.Node], Trace], "Callable[..., Any] | None"]


class Program:
    """A trace, its fused parts and how they run. `guard` covers what all of them were made from."""

    guard: Guard
    reasons: dict[fx.Node, str]
    differentiable = False
    is_cached = True
    generation = -1
    _unchanged: Callable[[], bool]

    def holds(self) -> bool:
        """Whether nothing changed that the program was made from."""
        return self.traced.code.holds() and self._unchanged()

    def __init__(self, traced: Trace, matched: Matcher, rest: Rest | None = None) -> None:
        self.traced = traced
        self._rest = rest
        self.text = f"{type(self).__name__} {traced.graph}"
        self.matched = matched
        self._inputs = [n for n in traced.graph.nodes if n.op == "placeholder"]
        (self._output,) = [n for n in traced.graph.nodes if n.op == "output"]
        self._steps: list[tuple[Callable[..., None], list[fx.Node]]] = []
        self._root = traced.root
        self._kept: set[fx.Node] = set()  # values that may have another layout than stock's

    # --- construction ---

    def _build(self, fused_step: Callable[[list[Found]], Callable[..., None]]) -> None:
        """One step per fused part (or chain of them) and per other node, with the values that no
        later step reads."""
        first: dict[fx.Node, list[Found]] = {}
        heads = self._heads()
        skipped: set[fx.Node] = {n for nodes in heads.values() for n in nodes}
        for group in self.groups():
            first[group[-1].nodes[-1]] = group
            skipped.update(n for found in group for n in found.nodes)
        steps: list[tuple[Callable[..., None], list[fx.Node], list[fx.Node]]] = []
        others: list[fx.Node] = []  # since the last fused part
        for node in self.traced.graph.nodes:
            ends = node in first or node in heads
            if node.op == "placeholder" or (node in skipped and not ends):
                continue
            if node.op == "output" or ends:
                steps += self._others(others)
                others = []
            else:
                others.append(node)
            if node in heads:
                nodes = heads[node]
                steps.append((self._head(nodes), [*nodes[0].all_input_nodes], [node]))
            elif node in first:
                group = first[node]
                reads = [group[0].source]
                reads += [f.residual for f in group if f.residual is not None]
                steps.append((self._returned(node, fused_step(group)), reads, [node]))
        last: dict[fx.Node, int] = {n: len(steps) for n in self._output.all_input_nodes}
        for i, (_, reads, made) in enumerate(steps):
            for n in (*reads, *made):
                last[n] = max(last.get(n, 0), i)
        dead: list[list[fx.Node]] = [[] for _ in range(len(steps) + 1)]
        for n, i in last.items():
            dead[i].append(n)
        self._steps = [(run, dead[i]) for i, (run, *_) in enumerate(steps)]

    def _heads(self) -> dict[fx.Node, list[fx.Node]]:
        """Of each head that runs as one op: its last node, and its nodes."""
        return {}

    def _head(self, nodes: list[fx.Node]) -> Callable[..., None]:
        """A step for global average pooling, flattening and a linear layer."""
        pool, flatten, linear = map(self._module, nodes)
        source, node, otherwise = nodes[0].args[0], nodes[-1], self._unfused(nodes)
        assert isinstance(source, fx.Node)

        def run(values: Values, stock: Any) -> None:
            y = None
            if flatten is None or patched(flatten) is None:
                y = run_head(pool, linear, values[source])
            if y is None:
                otherwise(values, stock)
            else:
                values[node] = y

        return run

    def _others(self, nodes: list[fx.Node]) -> list[Any]:
        """The steps of consecutive nodes that are not fused."""
        run = None if self._rest is None else self._rest(nodes, self.traced)
        if run is None:
            return [(self._plain(node), node.all_input_nodes, [node]) for node in nodes]
        inside = set(nodes)
        reads = [n for n in dict.fromkeys(m for n in nodes for m in n.all_input_nodes)]
        reads = [n for n in reads if n not in inside]
        made = [n for n in nodes if not inside.issuperset(n.users)]
        kept = self._kept.intersection(reads)
        keep = all(
            _keeps(n, self._module(n)) or _reduces(n, self._module(n))
            for n in nodes
            if n.op != "get_attr"
        )
        if keep and kept:
            self._kept.update(made)

        def segment(values: Values, stock: Callable[[Any], Any]) -> None:
            if not keep:
                for n in kept:
                    values[n] = stock(values[n])
            values.update(zip(made, run(*[values[n] for n in reads]), strict=True))

        return [(segment, reads, made)]

    def _returned(self, node: fx.Node, step: Callable[..., None]) -> Callable[..., None]:
        """The step; with its value as stock's where the caller gets it, so that the tensor in
        autograd's graph is the caller's."""
        if node not in self._output.all_input_nodes:
            self._kept.add(node)
            return step

        def run(values: Values, stock: Callable[[Any], Any]) -> None:
            step(values, stock)
            values[node] = stock(values[node])

        return run

    def groups(self) -> list[list[Found]]:
        return [[found] for found in self.matched.found]

    def _plain(self, node: fx.Node) -> Callable[..., None]:
        """A step that runs the node as it is."""
        target, module = node.target, self.traced.modules.get(node)
        call: Any = target
        if node.op == "get_attr":
            return self._attribute(node)
        keeps, reduces = _keeps(node, module), _reduces(node, module)
        if type(module) is nn.Conv2d and self.differentiable:
            call = functools.partial(convolve, module)
        elif module is not None:
            # Its activation is a node of its own.
            bare = has_activation(module) and patched(module) is None
            call = functools.partial(_normalise, module) if bare else module
        elif node.op == "call_method":
            name = str(target)
            call = lambda t, *args, **kwargs: getattr(t, name)(*args, **kwargs)  # noqa: E731
        keeps_mean = _keeps_mean(node, module)
        if keeps_mean is not None:
            call = functools.partial(_mean, call, keeps_mean)
        kept = self._kept.intersection(node.all_input_nodes)
        if keeps and kept:
            self._kept.add(node)
        convert = bool(kept) and not keeps and not reduces
        arguments: Any = (node.args, node.kwargs)
        only: Any = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if isinstance(only, fx.Node) and not convert:

            def run_one(values: Values, stock: Any) -> None:
                values[node] = call(values[only])

            return run_one

        def run(values: Values, stock: Callable[[Any], Any]) -> None:
            def value(n: fx.Node) -> Any:
                if convert and n in kept:  # for all readers: this one may write
                    values[n] = stock(values[n])
                return values[n]

            given, named = fx.node.map_arg(arguments, value)
            values[node] = call(*given, **named)

        return run

    def _guarded(self, parts: Collection[Plan | Step]) -> None:
        """Guards the parts, and what the program depends on besides."""
        absorbed = {m: None for f in self.matched.found for n in f.nodes if (m := self._module(n))}
        places = self.traced.places + [Place({"": m}, "", m, type(m)) for m in absorbed]
        of_parts = [part.guard for part in parts]
        self.is_cached = all(part.is_cached for part in parts)
        own = Guard([], places, values=False, beside=of_parts)
        self.guard = Guard.combined([own, *of_parts])

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.traced.modules.get(node)

    def _attribute(self, node: fx.Node) -> Callable[..., None]:
        owner, _, name = str(node.target).rpartition(".")
        home = self._root.get_submodule(owner)

        def run(values: Values, stock: Any) -> None:
            values[node] = getattr(home, name)

        return run

    def _unfused(self, nodes: Sequence[fx.Node]) -> Callable[..., None]:
        """Runs the nodes of a fused part as they are."""
        steps = [self._plain(node) for node in nodes]

        def run(values: Values, stock: Any) -> None:
            for step in steps:
                step(values, stock)
            for node in nodes[:-1]:
                del values[node]

        return run

    # --- execution ---

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """The result of the forward for these tensors."""
        values: Values = dict(zip(self._inputs, tensors, strict=True))
        memory_format = layout.memory_format(tensors[self.traced.lead])

        def stock(t: Any) -> Any:
            """A value as stock's operations would return it."""
            if isinstance(t, Tensor) and t.dim() == 4:
                return layout.exactly(converted(t, memory_format), memory_format)
            return t

        for step, dead in self._steps:
            step(values, stock)
            for node in dead:
                del values[node]
        kept = self._kept
        leaves = fx.node.map_arg(
            self._output.args[0], lambda n: stock(values[n]) if n in kept else values[n]
        )
        return pytree.tree_unflatten(list(leaves), self.traced.result)


# Plans in use. Programs for several graphs of one model, as for other input sizes, share them.
_plans: weakref.WeakValueDictionary[Any, Plan] = weakref.WeakValueDictionary()


def _plan_of(description: Description, dtype: torch.dtype, device: torch.device) -> Plan | str:
    """A plan of the description's tensors and settings, in use elsewhere or made now."""
    pool = description.pool
    key = (
        store.generation(), dtype, device, torch.is_autocast_enabled(device.type),
        registry.choose("conv_bn_relu", device.type), registry.forced(), description.shortcut,
        tuple(description.geometries), None if pool is None else str(pooling.window(pool)),
        *((unit.activation, getattr(unit.norm, "eps", None)) for unit in description.units),
        *(id(t) for unit in description.units for _, t in tensors_of(unit.conv, unit.norm)),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is not None and plan.holds():
        return plan
    made = plan_of(description, dtype, device)
    if isinstance(made, Plan) and made.is_cached:
        _plans[key] = made
    return made


class InferenceProgram(Program):
    """Without gradients and with running statistics: convolutions packed with folded norms."""

    def __init__(
        self, traced: Trace, matched: Matcher, x: Tensor, rest: Rest | None = None
    ) -> None:
        super().__init__(traced, matched, rest)
        self.reasons = {}
        self._plans: dict[int, Plan] = {}
        for i, found in enumerate(matched.found):
            if found.description is None:
                continue
            dtype = (
                output_dtype(x.dtype, x.device.type)
                if found.source not in self._inputs
                else x.dtype
            )
            plan = _plan_of(found.description, dtype, x.device)
            if isinstance(plan, str):
                self.reasons[found.nodes[0]] = plan
            else:
                self._plans[i] = plan
        self._guarded(self._plans.values())
        self._unchanged = self.guard.holds
        self._index = {id(found): i for i, found in enumerate(matched.found)}
        self._build(self._fused)

    def _heads(self) -> dict[fx.Node, list[fx.Node]]:
        heads = {}
        for node in self.traced.graph.nodes:
            if not is_global_pool(self._module(node)) or node.kwargs or len(node.args) != 1:
                continue
            nodes = [node]
            while len(nodes) < 3 and len(nodes[-1].users) == 1:
                nodes.extend(nodes[-1].users)
            plain = all(len(n.all_input_nodes) == 1 for n in nodes) and len(nodes) == 3
            last = self._module(nodes[-1])
            if plain and _flattens(nodes[1], self._module(nodes[1])) and type(last) is nn.Linear:
                heads[nodes[-1]] = nodes
        return heads

    def plan(self, found: Found) -> Plan | None:
        return self._plans.get(self._index[id(found)])

    def groups(self) -> list[list[Found]]:
        """Consecutive plans are one chain where nothing else reads what is between them."""
        order = {node: i for i, node in enumerate(self.traced.graph.nodes)}
        groups: list[list[Found]] = []
        by_value: dict[fx.Node, list[Found]] = {}
        for found in sorted(self.matched.found, key=lambda f: order[f.nodes[-1]]):
            before = by_value.get(found.source)
            readers = {n for n in found.nodes if found.source in n.all_input_nodes}
            joins = (
                before is not None
                and self.plan(found) is not None
                and self.plan(before[-1]) is not None
                and found.residual is None
                and before[-1].residual is None
                and set(found.source.users) == readers
                and not self._pools_after(before[-1])
            )
            if joins and before is not None:
                before.append(found)
                group = before
            else:
                group = [found]
                groups.append(group)
            by_value[found.nodes[-1]] = group
        return groups

    def _pools_after(self, found: Found) -> bool:
        plan = self.plan(found)
        return (
            plan is not None
            and found.description is not None
            and (found.description.pool is not None and not plan.pools)
        )

    def _fused(self, group: list[Found]) -> Callable[..., None]:
        found, node = group[0], group[-1].nodes[-1]
        source, residual = found.source, found.residual
        if found.description is None:
            return self._elementwise(found)
        plans = [self.plan(f) for f in group]
        otherwise = self._unfused([n for f in group for n in f.nodes])
        if plans[0] is None:
            return otherwise
        chain = Chain()
        chain.plans = [plan for plan in plans if plan is not None]
        pool = (
            group[-1].description.pool
            if group[-1].description and self._pools_after(group[-1])
            else None
        )

        def run(values: Values, stock: Any) -> None:
            x, y = values[source], None
            added = None if residual is None else values[residual]
            fits = not found.promotes or found.keeps_dtype(x, added)
            if added is not None and added.requires_grad and torch.is_grad_enabled():
                fits = False
            if fits and chain.accepts(x):
                y = chain.run(x, residual=added, keep=True)
            if y is None:
                otherwise(values, stock)
                return
            values[node] = y if pool is None else pool(y)

        return run

    def _elementwise(self, found: Found) -> Callable[..., None]:
        return _elementwise(found, self._unfused(found.nodes), normed)


class TrainingProgram(Program):
    """Differentiable: blocks as one node of autograd's graph, other parts unit by unit."""

    differentiable = True

    def __init__(
        self,
        traced: Trace,
        matched: Matcher,
        module: nn.Module,
        x: Tensor,
        rest: Rest | None = None,
    ) -> None:
        super().__init__(traced, matched, rest)
        self.reasons = {}
        self._steps_of: dict[int, Step] = {}
        for found in matched.found:
            if found.description is None:
                continue
            step = step_of(module, found.description, x)
            if isinstance(step, str):
                self.reasons[found.nodes[0]] = step
            else:
                self._steps_of[id(found)] = step
        self._guarded(self._steps_of.values())
        self._unchanged = self.guard.structure_holds
        self._build(self._fused)

    def _fused(self, group: list[Found]) -> Callable[..., None]:
        (found,) = group
        node, source, residual = found.nodes[-1], found.source, found.residual
        otherwise = self._unfused(found.nodes)
        if found.description is None:
            return _elementwise(found, otherwise, norm_step)
        step = self._steps_of.get(id(found))
        if step is None:
            return otherwise

        def run(values: Values, stock: Any) -> None:
            x, y = values[source], None
            added = None if residual is None else values[residual]
            in_place = residual is None and not found.promotes
            if in_place or found.keeps_dtype(x, added):
                y = run_step(step, x, added)
            if y is None:
                otherwise(values, stock)
            else:
                values[node] = y

        return run


def _adds(x: Any, other: Any) -> bool:
    """Whether add_relu computes relu(x + other) in stock's dtype and layout."""
    if not isinstance(x, Tensor) or not isinstance(other, Tensor) or x.dim() != 4:
        return False
    same = x.shape == other.shape and x.dtype == other.dtype and x.device == other.device
    return same and x.is_floating_point() and x.stride() == other.stride()


def _elementwise(
    found: Found, otherwise: Callable[..., None], normalise: Callable[..., Tensor | None]
) -> Callable[..., None]:
    """A part without a convolution: activation(norm(x) + residual) or activation(x + residual)."""
    node, source, residual, norm = found.nodes[-1], found.source, found.residual, found.norm

    def run(values: Values, stock: Any) -> None:
        x = values[source]
        other = None if residual is None else values[residual]
        y = None
        if norm is not None:
            y = normalise(norm, x, other)
        elif other is not None and _adds(x, other):
            y = ops.add_relu(x, other)
        if y is None:
            otherwise(values, stock)
        else:
            values[node] = y

    return run
