"""Traces a module's forward by torch.fx into a graph of calls, or says why that cannot be done.

The graph is what the forward did for one structure of the model: plain Python has been executed.
A trace is therefore refused where the forward drew random numbers, changed an attribute or met a
tensor that is neither input, parameter nor buffer, and it is valid while the modules whose forward
was executed, their attributes and the code of their classes are unchanged (state.py). A module
whose forward does what a graph cannot hold (switches gradients or autocast, an autograd.Function,
checkpointing) is one call in the graph.
"""

from __future__ import annotations

import functools
import operator
import sys
import threading
from collections.abc import Callable
from operator import is_
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fused_resnet.fusion.description import Place, recipe_of
from fused_resnet.layers.hooks import patched
from fused_resnet.layers.norms import has_activation, is_frozen_bn
from fused_resnet.layers.originals import ALL

from .state import Code, Untouched, places_of, unknown_state

_DROPOUTS = (nn.Dropout, nn.Dropout2d)
for _class in (nn.Identity, *_DROPOUTS):  # left out of graphs where they do nothing
    ALL.remember(_class, "forward", "__call__")
_LIBRARY = ("torch.nn.", "torch.ao.")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Signature(NamedTuple):
    """The structure of a call's arguments and what is no tensor among them. tensors: the positions
    of the tensors among the leaves."""

    spec: Any
    constants: tuple[Any, ...]
    tensors: tuple[int, ...]
    kinds: tuple[Any, ...] = ()  # 2 and 2.0 are equal


_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


def signature_of(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Signature, list[Tensor]] | None:
    """The signature of a call, and its tensors in order; None if it has other arguments than
    tensors and constants."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return _ONE_TENSOR, [args[0]]
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    constants = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
    if not places or not all(type(constant) in _CONSTANTS for constant in constants):
        return None
    tensors = [leaves[i] for i in places]
    if len({*map(id, tensors)}) < len(tensors):
        return None  # a forward may ask whether two arguments are one
    kinds = tuple((type(constant), repr(constant)) for constant in constants)
    return Signature(spec, constants, places, kinds), tensors


_ONE_TENSOR = Signature(pytree.tree_flatten(((0,), {}))[1], (), (0,))


class Trace(NamedTuple):
    """graph: its placeholders are the call's tensors, its output is the list of the result's
    leaves. modules: of the nodes that call one. result: the structure of the result. places,
    code: what the trace depends on. lead: the position of the tensor whose layout stock's values
    have."""

    graph: fx.Graph
    modules: dict[fx.Node, nn.Module]
    root: nn.Module
    result: Any
    places: list[Place]
    code: Code
    lead: int = 0


def holds_work(module: nn.Module) -> bool:
    """Whether a convolution or a norm is anywhere in the module."""
    return any(
        isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) or is_frozen_bn(m) for m in module.modules()
    )


def is_composite(module: nn.Module) -> bool:
    """Whether the module's forward is worth tracing: it calls other modules or functions, and does
    not ask for fusion itself."""
    cls = type(module)
    if recipe_of(module)[0] is not None or is_frozen_bn(module):
        return False
    if cls.__module__.startswith(_LIBRARY) and not isinstance(module, _CONTAINERS):
        return False
    if isinstance(module, nn.BatchNorm2d):  # norms with an activation, as timm's
        return False
    return holds_work(module)


# Functions in these files do more than the operations that they call.
_NO_GRAPH = (torch.autograd.function.__file__, torch.utils.checkpoint.__file__)


def _modes() -> tuple[Any, ...]:
    """The modes that an operation in a graph would not know of."""
    autocast = [
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
    ]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast


# A trace replaces nn.Module.__call__ for the process while it runs: one at a time, and calls from
# other threads pass through.
_TRACING = threading.RLock()


class _Value(fx.Proxy):
    """A proxy whose operators in place are nodes of their own, as a tensor's write to it."""

    def __hash__(self) -> int:
        raise TypeError("a value of the graph cannot be a key")

    def __format__(self, spec: str) -> str:
        raise TypeError("a value of the graph has no text")

    __str__ = fx.Proxy.__repr__


def _in_place(name: str) -> Any:
    function = getattr(operator, name)

    def run(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return run


for _name in ("iadd", "isub", "imul", "itruediv", "ipow", "iand", "ior", "ixor", "ifloordiv"):
    setattr(_Value, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    """Executes the forward of composite modules; others become one call. So does a composite whose
    forward cannot be executed symbolically."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._modes = _modes()
        self._thread = threading.get_ident()
        self.composites: list[nn.Module] = []
        self.modules: dict[str, nn.Module] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if patched(m) is not None or recipe_of(m)[0] is not None or is_frozen_bn(m):
            return True
        if isinstance(m, nn.BatchNorm2d):  # with an activation, as timm's
            return True
        return type(m).__module__.startswith(_LIBRARY) and not isinstance(m, _CONTAINERS)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise ValueError("a forward that switches gradients or autocast")
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename not in _NO_GRAPH:
            frame = frame.f_back
        if frame is not None:
            raise ValueError("a forward with an autograd.Function or a checkpoint")
        return super().create_node(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        self.modules[path] = m
        if has_activation(m) and patched(m) is None and len(args) == 1 and not kwargs:
            return self._two_calls(m, path, args)
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        mark = next(reversed(self.graph.nodes), None)
        count = len(self.composites)
        self.composites.append(m)
        try:
            found = forward(*args, **kwargs)
            if self._constants_since(mark):
                raise ValueError("a tensor that is made from Python values")
            return found
        except Exception:
            del self.composites[count:]
            for node in list(reversed(self.graph.nodes)):
                if node is mark:
                    break
                self.graph.erase_node(node)
            return self.create_proxy("call_module", path, args, kwargs)

    def _two_calls(self, m: Any, path: str, args: Any) -> Any:
        """A norm with an activation as two nodes; the first calls BatchNorm2d's forward."""
        self.composites.append(m)
        normed = self.create_proxy("call_module", path, args, {})
        for name in ("drop", "act"):
            self.modules[f"{path}.{name}"] = getattr(m, name)
            normed = self.create_proxy("call_module", f"{path}.{name}", (normed,), {})
        return normed

    def _constants_since(self, mark: fx.Node | None) -> bool:
        for node in reversed(self.graph.nodes):
            if node is mark:
                return False
            if node.op == "get_attr" and "_tensor_constant" in str(node.target):
                return True
        return False


@functools.cache
def _root_class(count: int) -> type[nn.Module]:
    """A module whose forward takes `count` tensors."""
    names = ", ".join(f"x{i}" for i in range(count))
    forward = eval(f"lambda self, {names}: self.call([{names}])")  # fx reads its signature
    return type("_Root", (nn.Module,), {"forward": forward})


def trace(module: nn.Module, signature: Signature) -> Trace | str:
    """The graph of the forward for calls of this signature, or the reason why there is none."""
    if patched(module) is not None:
        return str(patched(module))
    why = unknown_state(module.modules())
    if why is not None:
        return why
    outer = _root_class(len(signature.tensors))()
    outer.inner = module
    structure: list[Any] = []

    def call(tensors: list[Any]) -> list[Any]:
        leaves, constants = [], iter(signature.constants)
        given = iter(tensors)
        for i in range(len(tensors) + len(signature.constants)):
            leaves.append(next(given) if i in signature.tensors else next(constants))
        args, kwargs = pytree.tree_unflatten(leaves, signature.spec)
        result = forward(*args, **kwargs)
        after, spec = pytree.tree_flatten((args, kwargs))
        if spec != signature.spec or not all(map(is_, after, leaves)):
            raise ValueError("a forward that changes an argument")
        known = {*map(id, leaves)}  # a value of the graph cannot be compared with another
        if any(result is v for v in (*args, *kwargs.values()) if id(v) not in known):
            raise ValueError("a forward that returns an argument")
        found, spec = pytree.tree_flatten(result)
        if not all(isinstance(v, fx.Proxy) or type(v) in _CONSTANTS for v in found):
            raise ValueError("a result that is neither tensor nor constant")
        structure.append(spec)
        return found

    tracer, forward = _Tracer(), module.forward
    object.__setattr__(outer, "call", call)
    with _TRACING:
        untouched = Untouched(list(module.modules()))
        try:
            graph = tracer.trace(outer)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return f"torch.fx cannot trace it: {lines[0].partition('. ')[0]}"
        finally:
            same = untouched.restored()
    if not same:
        return "its forward changes attributes or draws random numbers"
    if tracer._constants_since(None):
        return "its forward makes tensors from Python values"
    modules = {n: tracer.modules[n.target] for n in graph.nodes if n.op == "call_module"}
    # Also of modules that are not called but whose children or tensors are.
    homes = {module: None, **dict.fromkeys(tracer.composites)}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            parts = node.target.split(".")[:-1]
            for i in range(1, len(parts) + 1):
                homes[outer.get_submodule(".".join(parts[:i]))] = None
    places = places_of(list(homes))
    for node, m in list(modules.items()):
        idle = type(m) is nn.Identity or (type(m) in _DROPOUTS and not m.training)
        if idle and patched(m) is None and len(node.args) == 1:
            places.append(Place({"": m}, "", m, type(m)))
            places.append(Place(m.__dict__, "training", m.training, bool))
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            del modules[node]
    code = Code(dict.fromkeys(map(type, [module, *tracer.composites])))
    return Trace(graph, modules, outer, structure[0], places, code)
