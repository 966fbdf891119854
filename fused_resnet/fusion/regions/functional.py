"""Functional calls of a captured graph as calls of modules, so that one matcher reads the graphs of
torch.fx and those of Dynamo, in which parameters and buffers are inputs:

    conv2d(x, weight, bias, ...), batch_norm(x, mean, var, weight, bias, ...), max_pool2d(x, ...)

A call becomes a module that holds the very tensors of one call of the graph. Where an operand is
not an input of the graph, as a weight that the forward computes, the call stays."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .state import Code
from .trace import Trace

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NORM = (
    "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
)  # fmt: skip
_POOL = (
    "input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices",
)  # fmt: skip
# The modules made here, which own no tensor.
stand_ins: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_STATISTICS = ("running_mean", "running_var")


class Bound(NamedTuple):
    """A graph with the tensors of one call in its modules. tensors: those, by the positions of the
    graph's inputs. rejected: calls that stay, and why. lead: the position of the input that the
    first convolution reads, or None. programs: those made from it."""

    trace: Trace
    tensors: dict[int, Tensor]
    rejected: dict[fx.Node, str]
    lead: int | None
    programs: dict[Any, Any]

    def fits(self, inputs: Sequence[Any]) -> bool:
        """Whether a call has the same tensors."""
        return all([inputs[i] is t for i, t in self.tensors.items()])


def bound(gm: fx.GraphModule, inputs: Sequence[Any]) -> Bound:
    """The module's graph, copied, for a call with `inputs`."""
    copied, root = fx.Graph(), nn.Module()
    copied.output(copied.graph_copy(gm.graph, {}))
    builder = _Builder(copied, inputs, root)
    for node in copied.nodes:
        if node.op == "get_attr":
            setattr(root, node.target, operator.attrgetter(node.target)(gm))
    for node in list(copied.nodes):
        make = _MAKERS.get(node.target) if node.op == "call_function" else None
        if make is None:
            continue
        made = make(builder, node)
        if isinstance(made, str):
            builder.rejected[node] = made
        elif made is not None:
            builder.put(node, made)
    output = next(n for n in reversed(copied.nodes) if n.op == "output")
    leaves, spec = pytree.tree_flatten(output.args[0])
    output.args = (leaves,)
    lead = builder.lead()
    traced = Trace(copied, builder.modules, root, spec, [], Code({}), lead or 0)
    return Bound(traced, builder.tensors, builder.rejected, lead, {})


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _MAKERS


class _Builder:
    def __init__(self, graph: fx.Graph, inputs: Sequence[Any], root: nn.Module) -> None:
        self.graph, self.root = graph, root
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self._inputs = {
            n: (i, v) for i, (n, v) in enumerate(zip(placeholders, inputs, strict=True))
        }
        self.tensors: dict[int, Tensor] = {}
        self.modules: dict[fx.Node, nn.Module] = {}
        self.rejected: dict[fx.Node, str] = {}
        self._users = {n: list(n.users) for n in placeholders}

    def operand(self, node: Any, written: bool = False) -> Any:
        """The tensor of an operand that only such calls read (one call, if it writes to it); None
        of None. Raises LookupError with the reason if it is none."""
        if node is None:
            return None
        if node not in self._inputs:
            raise LookupError("a weight is computed in the forward")
        i, value = self._inputs[node]
        users = self._users[node]
        if not isinstance(value, Tensor) or not all(map(_is_call, users)):
            raise LookupError("a weight is read by other operations too")
        if written and len(users) > 1:
            raise LookupError("running statistics are updated by more than one norm")
        self.tensors[i] = value
        return value

    def put(self, node: fx.Node, module: nn.Module) -> None:
        """Replaces the call by a call of the module."""
        name = f"{type(module).__name__}_{len(self.modules)}"
        self.root.add_module(name, module)
        stand_ins.add(module)
        with self.graph.inserting_before(node):
            call = self.graph.call_module(
                name, (node.args[0] if node.args else node.kwargs["input"],)
            )
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        self.graph.erase_node(node)
        self.modules[call] = module

    def lead(self) -> int | None:
        for node, module in self.modules.items():
            if not isinstance(module, nn.Conv2d):
                continue
            source = node.args[0]
            while isinstance(source, fx.Node) and source not in self._inputs:
                source = next(iter(source.all_input_nodes), None)
            if isinstance(source, fx.Node) and isinstance(self._inputs[source][1], Tensor):
                return self._inputs[source][0]
        return None


def _arguments(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False), **node.kwargs)


def _ints(*values: Any) -> bool:
    return all(
        type(v) is int or (isinstance(v, (tuple, list)) and all(type(n) is int for n in v))
        for v in values
    )


def _pair(v: Any) -> Any:
    values = tuple(v) if isinstance(v, (tuple, list)) else (v, v)
    return values * 2 if len(values) == 1 else values


def _conv(builder: _Builder, node: fx.Node) -> nn.Module | str:
    given = _arguments(node, _CONV)
    sizes = [given.get(name, i) for name, i in (("stride", 1), ("padding", 0), ("dilation", 1))]
    groups = given.get("groups", 1)
    if not _ints(*sizes, groups):
        return "a convolution's padding is not a number of zeros"
    try:
        weight, bias = builder.operand(given["weight"]), builder.operand(given.get("bias"))
    except LookupError as error:
        return str(error)
    if weight.dim() != 4:
        return "not a convolution of images"
    K, C, R, S = weight.shape
    stride, padding, dilation = map(_pair, sizes)
    conv = nn.Conv2d(
        C * groups, K, (R, S), stride, padding, dilation, groups, bias is not None, device="meta"
    )
    conv._parameters.update(weight=weight, bias=bias)
    return conv


def _norm(builder: _Builder, node: fx.Node) -> nn.Module | str:
    given = _arguments(node, _NORM)
    training, momentum, eps = (
        given.get("training", False),
        given.get("momentum", 0.1),
        given.get("eps", 1e-5),
    )
    if type(training) is not bool or type(momentum) is not float or type(eps) is not float:
        return "a norm's settings are computed in the forward"
    try:
        tensors = {
            name: builder.operand(given.get(name), training and name in _STATISTICS)
            for name in _NORM[1:5]
        }
    except LookupError as error:
        return str(error)
    value = given["input"].meta.get("example_value")
    if not isinstance(value, Tensor) or value.dim() != 4 or type(value.shape[1]) is not int:
        return "not a norm of images"
    norm = nn.BatchNorm2d(value.shape[1], eps, momentum, device="meta")
    norm.train(training)
    norm.track_running_stats = tensors["running_mean"] is not None
    norm._parameters.update({name: tensors[name] for name in ("weight", "bias")})
    # The count of batches is a call of its own in the graph.
    norm._buffers.update({name: tensors[name] for name in _STATISTICS}, num_batches_tracked=None)
    return norm


def _pool(builder: _Builder, node: fx.Node) -> nn.Module | None:
    given = _arguments(node, _POOL)
    sizes = [
        given["kernel_size"],
        given.get("stride"),
        given.get("padding", 0),
        given.get("dilation", 1),
    ]
    if sizes[1] is None:
        sizes[1] = sizes[0]
    if not _ints(*sizes) or given.get("ceil_mode") or given.get("return_indices"):
        return None  # it runs as it is
    return nn.MaxPool2d(*sizes)


_MAKERS: dict[Any, Callable[[_Builder, fx.Node], nn.Module | str | None]] = {
    torch.conv2d: _conv,
    F.batch_norm: _norm,
    F.max_pool2d: _pool,
}
