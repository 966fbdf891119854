"""Functional calls of a captured graph as calls of modules, so that one matcher reads the graphs of
torch.fx and those of Dynamo, in which parameters and buffers are inputs:

    conv2d(x, weight, bias, ...), batch_norm(x, mean, var, weight, bias, ...), max_pool2d(x, ...)
    adaptive_avg_pool2d(x, size), linear(x, weight, bias)

and the first three's ATen forms in the graphs of torch.export, in which parameters and buffers are
attributes.
A call becomes a module that holds the very tensors of one call of the graph. Where an operand is
neither, as a weight that the forward computes, the call stays."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fused_resnet.kernels.problem import pair

from .installed import install
from .linear import LinearRegion
from .state import Code
from .trace import Trace

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NORM = (
    "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
)  # fmt: skip
_ATEN_NORM = (
    "input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps",
)  # fmt: skip
_POOL = (
    "input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices",
)  # fmt: skip
# The modules made here, which own no tensor.
stand_ins: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_STATISTICS = ("running_mean", "running_var")


@dataclass(eq=False)
class Bound:
    """A graph with the tensors of one call in its modules. tensors: those, by the positions of the
    graph's inputs. rejected: calls that stay, and why. lead: the position of the input that the
    first convolution reads, or None. programs: those made from it. program: of the last call that
    had one; reason: why the last call was not fused. owners: the modules that have the tensors."""

    trace: Trace
    tensors: dict[int, Tensor]
    rejected: dict[fx.Node, str]
    lead: int | None
    programs: dict[Any, Any] = field(default_factory=dict)
    program: Any = None
    reason: str = ""
    owners: list[weakref.ref[nn.Module]] = field(default_factory=list)

    def is_owned(self) -> bool:
        """Whether the owners still have the tensors."""
        owners = [owner for ref in self.owners if (owner := ref()) is not None]
        homes = [home for m in owners for home in (m._parameters, m._buffers)]
        return {id(t) for home in homes for t in home.values()}.issuperset(
            map(id, self.tensors.values())
        )

    def fits(self, inputs: Sequence[Any]) -> bool:
        """Whether a call has the same tensors."""
        return all([inputs[i] is t for i, t in self.tensors.items()])


def bound(gm: fx.GraphModule, inputs: Sequence[Any]) -> Bound:
    """The module's graph, copied, for a call with `inputs`."""
    copied, root = fx.Graph(), nn.Module()
    copied.output(copied.graph_copy(gm.graph, {}))
    for node in copied.nodes:
        if node.op == "get_attr":
            setattr(root, node.target, operator.attrgetter(node.target)(gm))
    placeholders = [n for n in copied.nodes if n.op == "placeholder"]
    called = Calls(copied, root, dict(zip(placeholders, inputs, strict=True)))
    output = next(n for n in reversed(copied.nodes) if n.op == "output")
    leaves, spec = pytree.tree_flatten(output.args[0])
    output.args = (leaves,)
    positions = {n: i for i, n in enumerate(placeholders)}
    first = called.first_input()
    lead = None if first is None else positions.get(first)
    traced = Trace(copied, called.modules, root, spec, [], Code({}), lead or 0)
    tensors = {positions[n]: t for n, t in called.tensors.items()}
    return Bound(traced, tensors, called.rejected, lead)


class Calls:
    """Replaces functional calls in `graph`, whose root is `root`, by calls of modules.

    values: the values of nodes that may be parameters or buffers. Afterwards, modules: of the new
    nodes; tensors: of the nodes that became parts of modules; rejected: calls that stay, and why.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module, values: dict[fx.Node, Any]) -> None:
        self._graph, self._root, self._values = graph, root, values
        self.tensors: dict[fx.Node, Tensor] = {}
        self.modules: dict[fx.Node, nn.Module] = {}
        self.rejected: dict[fx.Node, str] = {}
        self._users = {n: list(n.users) for n in values}
        for node in list(graph.nodes):
            if not _is_call(node):
                continue
            make, names = _MAKERS[node.target]
            given = dict(zip(names, node.args, strict=False), **node.kwargs)
            try:
                module = make(self, given)
            except LookupError as error:
                self.rejected[node] = str(error.args[0])
            else:
                if module is not None:
                    self._put(node, given["input"], module)

    def operand(self, node: Any) -> Any:
        """The tensor of an operand that only such calls read; None of None. Raises LookupError with
        the reason if it is none."""
        if node is None:
            return None
        value, users = self._values.get(node), self._users.get(node, ())
        if node not in self._values:
            raise LookupError("a weight is computed in the forward")
        if not isinstance(value, Tensor) or not all(map(_is_call, users)):
            raise LookupError("a weight is read by other operations too")
        self.tensors[node] = value
        return value

    def _put(self, node: fx.Node, source: fx.Node, module: nn.Module) -> None:
        name = f"{type(module).__name__}_{len(self.modules)}"
        self._root.add_module(name, module)
        stand_ins.add(module)
        with self._graph.inserting_before(node):
            call = self._graph.call_module(name, (source,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        self._graph.erase_node(node)
        self.modules[call] = module

    def first_input(self) -> fx.Node | None:
        """The input of the graph that the first convolution reads."""
        for node, module in self.modules.items():
            source: Any = node.args[0] if isinstance(module, nn.Conv2d) else None
            while isinstance(source, fx.Node) and source.op != "placeholder":
                source = next(iter(source.all_input_nodes), None)
            if isinstance(source, fx.Node):
                return source
        return None


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _MAKERS


def value_of(node: fx.Node) -> Any:
    """What a compiler knows of the node's value: a tensor without data."""
    return node.meta.get("example_value", node.meta.get("val"))


def _ints(*values: Any) -> bool:
    return all(
        type(v) is int or (isinstance(v, (tuple, list)) and all(type(n) is int for n in v))
        for v in values
    )


def _conv(calls: Calls, given: dict[str, Any]) -> nn.Module:
    sizes = [given.get(name, i) for name, i in (("stride", 1), ("padding", 0), ("dilation", 1))]
    groups = given.get("groups", 1)
    if not _ints(*sizes, groups):
        raise LookupError("a convolution's padding is not a number of zeros")
    weight, bias = calls.operand(given["weight"]), calls.operand(given.get("bias"))
    if weight.dim() != 4:
        raise LookupError("not a convolution of images")
    K, C, R, S = weight.shape
    stride, padding, dilation = map(pair, sizes)
    conv = nn.Conv2d(
        C * groups, K, (R, S), stride, padding, dilation, groups, bias is not None, device="meta"
    )
    conv._parameters.update(weight=weight, bias=bias)
    return conv


def _norm(calls: Calls, given: dict[str, Any]) -> nn.Module:
    training, momentum = given.get("training", False), given.get("momentum", 0.1)
    eps = given.get("eps", 1e-5)
    if type(training) is not bool or type(momentum) is not float or type(eps) is not float:
        raise LookupError("a norm's settings are computed in the forward")
    tensors = {name: calls.operand(given.get(name)) for name in ("weight", "bias", *_STATISTICS)}
    value = value_of(given["input"])
    if not isinstance(value, Tensor) or value.dim() != 4 or type(value.shape[1]) is not int:
        raise LookupError("not a norm of images")
    norm = nn.BatchNorm2d(value.shape[1], eps, momentum, device="meta")
    norm.train(training)
    norm.track_running_stats = tensors["running_mean"] is not None
    norm._parameters.update({name: tensors[name] for name in ("weight", "bias")})
    # The count of batches is a call of its own in the graph.
    norm._buffers.update({name: tensors[name] for name in _STATISTICS}, num_batches_tracked=None)
    return norm


def _pool(calls: Calls, given: dict[str, Any]) -> nn.Module | None:
    stride = given.get("stride") or given["kernel_size"]
    sizes = [given["kernel_size"], stride, given.get("padding", 0), given.get("dilation", 1)]
    if not _ints(*sizes) or given.get("ceil_mode") or given.get("return_indices"):
        return None  # it runs as it is
    kernel, step, padding, dilation = map(pair, sizes)
    return nn.MaxPool2d(kernel, step, padding, dilation)


def _linear(calls: Calls, given: dict[str, Any]) -> nn.Module:
    weight, bias = calls.operand(given["weight"]), calls.operand(given.get("bias"))
    if weight.dim() != 2:
        raise LookupError("a linear layer's weight is no matrix")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer._parameters.update(weight=weight, bias=bias)
    install(layer, LinearRegion)
    return layer


def _average(calls: Calls, given: dict[str, Any]) -> nn.Module | None:
    size = given["output_size"]
    return nn.AdaptiveAvgPool2d(size) if _ints(size) else None


_aten = torch.ops.aten
_MAKERS: dict[Any, tuple[Callable[[Calls, dict[str, Any]], nn.Module | None], tuple[str, ...]]] = {
    torch.conv2d: (_conv, _CONV),
    _aten.conv2d.default: (_conv, _CONV),
    _aten.conv2d.padding: (_conv, _CONV),
    F.batch_norm: (_norm, _NORM),
    _aten.batch_norm.default: (_norm, _ATEN_NORM),
    F.max_pool2d: (_pool, _POOL),
    _aten.max_pool2d.default: (_pool, _POOL),
    F.adaptive_avg_pool2d: (_average, ("input", "output_size")),
    F.linear: (_linear, ("input", "weight", "bias")),
}
