"""Finds what can be fused in a traced graph, as descriptions.

    convolution (-> norm) (-> addition) (-> ReLU)      a description of one unit
    the residual blocks among them                     one description of all units
    norm (-> addition) -> ReLU,   addition -> ReLU     without a convolution

Every other node stays as it is. What is fused runs at the place of its last node, so a value that
is written in place between its first and its last node is left alone.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fused_resnet.fusion import pooling
from fused_resnet.fusion.description import Description, Place, Unit, finished
from fused_resnet.fusion.dtype_rules import output_dtype
from fused_resnet.kernels.activation import OF_FUNCTION, OF_METHOD, OF_MODULE, Activation
from fused_resnet.layers.hooks import patched
from fused_resnet.layers.norms import is_frozen_bn

from .trace import Trace

_aten = torch.ops.aten
_ADD = {operator.add, operator.iadd, torch.add, _aten.add.Tensor, _aten.add_.Tensor}
_ADD_METHODS = {"add", "add_", "__add__", "__iadd__"}
# Functions and methods that return new memory.
_FRESH = {
    F.interpolate,
    F.max_pool2d,
    F.avg_pool2d,
    torch.cat,
    torch.mul,
    operator.mul,
    torch.matmul,
}
# ATen operations that may return their input although their schema does not say so.
_MAY_ALIAS = {
    getattr(_aten, name).default for name in ("contiguous", "reshape", "dropout", "batch_norm")
} | {_aten.flatten.using_ints, _aten.to.dtype, _aten.to.device, _aten.to.dtype_layout}
_FRESH_MODULES = (
    nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.Linear,
)  # fmt: skip


class Found(NamedTuple):
    """A fused part of the graph. description: None if there is no convolution. source: the node
    that it reads. residual: a node that is added before the activation. norm: without a
    convolution, the module or None. nodes: what it replaces, in order; the last is its value.
    promotes: whether the addition is out of place, and so may return another dtype."""

    description: Description | None
    source: fx.Node
    residual: fx.Node | None
    norm: Any
    activation: Activation
    nodes: list[fx.Node]
    promotes: bool = False

    def keeps_dtype(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether stock's result has the convolution's dtype: an addition out of place promotes."""
        added = residual
        if self.description is not None and self.description.shortcut == "identity":
            added = x
        return added is None or added.dtype == output_dtype(x.dtype, x.device.type)


class Rejected(NamedTuple):
    """A convolution or norm that stays as it is, and why."""

    node: fx.Node
    reason: str


class _End(NamedTuple):
    """A unit without its addition: the node of its convolution and its last node."""

    conv: fx.Node
    node: fx.Node
    unit: Unit
    nodes: list[fx.Node]


def _only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads this one, and reads it once; else None."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if user.all_input_nodes and _count(user, node) == 1 else None


def _count(user: fx.Node, node: fx.Node) -> int:
    found = 0

    def see(n: fx.Node) -> fx.Node:
        nonlocal found
        found += n is node
        return n

    fx.node.map_arg((user.args, user.kwargs), see)
    return found


class Matcher:
    """The fused parts of one trace."""

    def __init__(self, traced: Trace) -> None:
        self._modules = traced.modules
        self._nodes = list(traced.graph.nodes)
        self._order = {node: i for i, node in enumerate(self._nodes)}
        self._writings: list[tuple[int, set[fx.Node]]] = []  # place of a write, what it changes
        self._unsafe = self._written()
        self._ends: dict[fx.Node, _End] = {}  # last node of a unit -> it
        self._taken: set[fx.Node] = set()
        self.found: list[Found] = []
        self.rejected: list[Rejected] = []
        self._find_units()
        self._find_additions()
        self._find_rest()

    # --- kinds of nodes ---

    def _module(self, node: fx.Node | None) -> Any:
        return None if node is None else self._modules.get(node)

    def _is_norm(self, node: fx.Node | None) -> bool:
        m = self._module(node)
        if m is None or node is None or len(node.args) != 1 or node.kwargs:
            return False
        return isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm)) or is_frozen_bn(m)

    def _activation(self, node: fx.Node | None) -> Activation | None:
        """What the node applies to its only operand, if that is an activation of the kernels."""
        if node is None or not node.args:
            return None
        m = self._module(node)
        if m is not None:
            alone = len(node.args) == 1 and not node.kwargs and patched(m) is None
            return OF_MODULE.get(type(m)) if alone else None
        if node.op == "call_function" and node.target in OF_FUNCTION:
            known = len(node.args) <= 2 and not set(node.kwargs) - {"inplace"}
            return OF_FUNCTION[node.target] if known else None
        if node.op == "call_method" and len(node.args) == 1 and not node.kwargs:
            return OF_METHOD.get(str(node.target))
        return None

    def _operands(self, node: fx.Node | None) -> tuple[fx.Node, fx.Node] | None:
        """The two tensors that the node adds, if it does."""
        if node is None or node.kwargs or len(node.args) != 2:
            return None
        a, b = node.args
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return None
        adds = node.op == "call_function" and node.target in _ADD
        adds = adds or (node.op == "call_method" and node.target in _ADD_METHODS)
        return (a, b) if adds else None

    # --- writes in place ---

    def _writes(self, node: fx.Node) -> bool:
        m = self._module(node)
        if m is not None:
            return bool(getattr(m, "inplace", False))
        if isinstance(node.target, torch._ops.OpOverload):
            return node.target._schema.is_mutable
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op not in ("call_function", "call_method"):
            return False
        inplace = node.kwargs.get("inplace", False) or (
            node.target in OF_FUNCTION and len(node.args) > 1 and node.args[1]
        )
        own = name.startswith("i") and getattr(operator, name, None) is node.target
        out = "out" in node.kwargs
        return (
            bool(inplace)
            or out
            or own
            or (name.endswith("_") and not name.endswith("__"))
            or (name in ("__iadd__", "__imul__", "__isub__", "__setitem__", "setitem"))
        )

    def _fresh(self, node: fx.Node) -> bool:
        m = self._module(node)
        if m is not None:
            return isinstance(m, _FRESH_MODULES) or is_frozen_bn(m)
        if self._writes(node):
            return False
        if isinstance(node.target, torch._ops.OpOverload):
            returns = node.target._schema.returns
            return node.target not in _MAY_ALIAS and all(r.alias_info is None for r in returns)
        adds = self._operands(node) is not None
        known = node.target in _FRESH or node.target in OF_FUNCTION
        return adds or (node.op == "call_function" and known)

    def _written(self) -> set[fx.Node]:
        """The nodes whose memory is written after their value was made, and read after that by a
        node that does not read the result of the write."""
        group: dict[fx.Node, set[fx.Node]] = {}
        unsafe: set[fx.Node] = set()
        for node in self._nodes:
            mine = {node}
            writes = self._writes(node)
            if not self._fresh(node):
                sources = node.all_input_nodes[:1] if writes else node.all_input_nodes
                for source in sources:
                    mine |= group[source]
            for member in mine:
                group[member] = mine
            if writes:
                before = mine - {node}
                self._writings.append((self._order[node], before))
                if any(self._order[u] > self._order[node] for g in before for u in g.users):
                    unsafe |= mine
        return unsafe

    # --- units ---

    def _find_units(self) -> None:
        for node in self._nodes:
            conv = self._module(node)
            if type(conv) is not nn.Conv2d:
                continue
            if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
                self.rejected.append(Rejected(node, "its input is a keyword argument"))
                continue
            nodes, norm = [node], None
            user = _only_user(node)
            if self._is_norm(user):
                assert user is not None
                norm = self._module(user)
                nodes.append(user)
            end = _End(node, nodes[-1], Unit(conv, norm, Activation.NONE), nodes)
            if not self._safe([node.args[0], *nodes]):
                self.rejected.append(Rejected(node, "a value is written in place"))
                continue
            self._ends[nodes[-1]] = end

    def _safe(self, nodes: Iterable[Any]) -> bool:
        return not self._unsafe.intersection(nodes)

    def _activated(self, end: fx.Node) -> tuple[Activation, list[fx.Node]]:
        """The activation that alone reads `end`, and its node."""
        user = _only_user(end)
        activation = self._activation(user)
        if activation is None or user is None or not self._safe([user]):
            return Activation.NONE, []
        return activation, [user]

    def _before(self, source: fx.Node) -> tuple[_End, Unit, list[fx.Node]] | None:
        """The unit, with its activation, whose value is `source` and that one node alone reads."""
        if _only_user(source) is None or source in self._taken:
            return None
        end, nodes, activation = self._ends.get(source), [source], Activation.NONE
        if end is None:
            found = self._activation(source)
            inner = source.args[0] if source.args else None
            if found is None or not isinstance(inner, fx.Node) or _only_user(inner) is not source:
                return None
            end, activation = self._ends.get(inner), found
            if end is None or inner in self._taken:
                return None
        else:
            nodes = []
        return end, end.unit._replace(activation=activation), [*end.nodes, *nodes]

    # --- additions ---

    def _find_additions(self) -> None:
        for node in self._nodes:
            operands = self._operands(node)
            if operands is None or not self._safe([node, *operands]):
                continue
            ends = [n for n in operands if _only_user(n) is node and n in self._ends]
            ends = [n for n in ends if n not in self._taken]
            activation, after = self._activated(node)
            best: Found | None = None
            for n in ends:
                other = operands[1] if n is operands[0] else operands[0]
                found = self._block(self._ends[n], other, node, activation, after)
                if found is not None and (best is None or len(found.nodes) > len(best.nodes)):
                    best = found
            if best is not None:
                self._take(best)

    def _block(
        self, last: _End, other: fx.Node, add: fx.Node, activation: Activation, after: list[fx.Node]
    ) -> Found | None:
        """The block that ends with this addition; else its last unit, with a residual."""
        branch = self._ends.get(other)
        if branch is not None and (branch.unit.norm is None or _only_user(other) is not add):
            branch = None
        if other in self._taken:
            branch = None
        units, nodes, source = (
            [last.unit._replace(activation=activation)],
            [*last.nodes],
            last.conv.args[0],
        )
        while True:
            assert isinstance(source, fx.Node)
            if source is other or (branch is not None and source is branch.conv.args[0]):
                projection = [] if branch is None or source is other else [branch.unit]
                kind = "projection" if projection else "identity"
                described = _described([*units, *projection], kind)
                if isinstance(described, str):
                    break
                inner = [] if not projection or branch is None else branch.nodes
                every = sorted({*nodes, *inner, add, *after}, key=self._order.__getitem__)
                promotes = not self._writes(add)
                return Found(described, source, None, None, activation, every, promotes)
            before = self._before(source)
            if before is None:
                break
            end, unit, more = before
            units.insert(0, unit)
            nodes = [*more, *nodes]
            source = end.conv.args[0]
        first = last.conv.args[0]
        described = _described([last.unit._replace(activation=activation)], "none")
        if isinstance(described, str) or not isinstance(first, fx.Node):
            return None
        every = sorted({*last.nodes, add, *after}, key=self._order.__getitem__)
        return Found(described, first, other, None, activation, every, not self._writes(add))

    def _take(self, found: Found) -> None:
        """Notes a part, unless something that it reads is written before its last node, where it
        will run."""
        begin, end = (self._order[found.nodes[i]] for i in (0, -1))
        reads = {found.source, found.residual, *found.nodes}
        for place, changed in self._writings:
            if begin < place < end and self._nodes[place] not in found.nodes and changed & reads:
                self.rejected.append(Rejected(found.nodes[0], "an input is written meanwhile"))
                return
        self.found.append(found)
        self._taken.update(found.nodes)

    # --- what is left ---

    def _find_rest(self) -> None:
        for end in list(self._ends.values()):
            if end.node in self._taken:
                continue
            activation, after = self._activated(end.node)
            nodes = [*end.nodes, *after]
            user, pool = _only_user(nodes[-1]), None
            if end.unit.norm is not None and activation and user is not None:
                module = self._module(user)
                if (
                    pooling.is_plain(module)
                    and self._safe([user])
                    and len(user.args) == 1
                    and not user.kwargs
                ):
                    pool = module
                    nodes.append(user)
            described = _described([end.unit._replace(activation=activation)], "none", pool)
            source = end.conv.args[0]
            if isinstance(described, str):
                self.rejected.append(Rejected(end.conv, described))
            elif isinstance(source, fx.Node):
                self._take(Found(described, source, None, None, activation, nodes))
        for node in self._nodes:
            if node in self._taken:
                continue
            if self._is_norm(node) and self._safe([node, *node.args]):
                self._norm_first(node)
            operands = self._operands(node)
            activation, after = self._activated(node)
            relu = activation == Activation.RELU  # add_relu and bn_add_relu compute no other
            if operands is not None and relu and self._safe([node, *operands]):
                self._take(Found(None, operands[0], operands[1], None, activation, [node, *after]))

    def _norm_first(self, node: fx.Node) -> None:
        """norm (-> addition) -> ReLU behind something else than a convolution."""
        nodes, residual = [node], None
        user = _only_user(node)
        operands = self._operands(user)
        if operands is not None and user is not None and self._safe([user, *operands]):
            residual = operands[1] if operands[0] is node else operands[0]
            nodes.append(user)
        activation, after = self._activated(nodes[-1])
        source = node.args[0]
        if activation != Activation.RELU or self._taken.intersection(nodes):
            return
        if not isinstance(source, fx.Node):
            return
        self._take(Found(None, source, residual, self._module(node), activation, [*nodes, *after]))


def _described(units: list[Unit], shortcut: str, pool: Any = None) -> Description | str:
    places = []
    for conv, norm, _ in units:
        places.append(Place({"": conv}, "", conv, nn.Conv2d))
        if norm is not None:
            places.append(Place({"": norm}, "", norm, nn.BatchNorm2d))
    if pool is not None:
        places.append(Place({"": pool}, "", pool, nn.MaxPool2d))
    return finished(Description(units, shortcut, places, [], pool=pool))
