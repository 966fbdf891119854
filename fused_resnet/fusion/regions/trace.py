"""Traces a module's forward by torch.fx into a graph of calls, or says why that cannot be done.

The graph is what the forward did for one structure of the model: plain Python has been executed.
A trace is therefore refused where the forward drew random numbers, changed an attribute or met a
tensor that is neither input, parameter nor buffer, and it is valid while the modules whose forward
was executed, their attributes (`places`) and their classes' forwards are unchanged. A module whose
forward does what a graph cannot hold (switches gradients or autocast, an autograd.Function,
checkpointing) is one call in the graph.
"""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections.abc import Callable, Sequence
from copy import copy
from operator import is_
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fused_resnet.fusion.description import Place, recipe_of
from fused_resnet.layers.hooks import patched
from fused_resnet.layers.norms import has_activation, is_frozen_bn
from fused_resnet.layers.planned import FUSED, MADE

# Attributes of nn.Module that a forward does not read, or that guards compare by themselves.
_OWN = frozenset(nn.Module().__dict__) - {"training"} | {MADE, FUSED}
_DROPOUTS = (nn.Dropout, nn.Dropout2d)
_LIBRARY = ("torch.nn.", "torch.ao.")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Signature(NamedTuple):
    """The structure of a call's arguments and what is no tensor among them. tensors: the positions
    of the tensors among the leaves."""

    spec: Any
    constants: tuple[Any, ...]
    tensors: tuple[int, ...]


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
    return Signature(spec, constants, places), [leaves[i] for i in places]


_ONE_TENSOR = Signature(pytree.tree_flatten(((0,), {}))[1], (), (0,))


class Trace(NamedTuple):
    """graph: its placeholders are the call's tensors, its output is the list of the result's
    leaves. modules: of the nodes that call one. result: the structure of the result. places,
    forwards: what the trace depends on; forwards are those of classes."""

    graph: fx.Graph
    modules: dict[fx.Node, nn.Module]
    root: nn.Module
    result: Any
    places: list[Place]
    forwards: list[tuple[Any, Any]]

    def holds(self) -> bool:
        """Whether the classes' forwards are those that were executed."""
        return all([cls.forward is forward for cls, forward in self.forwards])


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


class _Untouched:
    """What executing a forward must not change: random state, and the modules' attributes."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._attributes = [(m.__dict__, dict(m.__dict__)) for m in modules]
        self._containers = [
            (value, copy(value))
            for _, attributes in self._attributes
            for value in attributes.values()
            if type(value) in (list, dict, set)
        ]
        self._random = random.getstate(), torch.get_rng_state()
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state()

    def restored(self) -> bool:
        """Puts everything back; False if anything had changed."""
        same = random.getstate() == self._random[0]
        same = torch.equal(torch.get_rng_state(), self._random[1]) and same
        random.setstate(self._random[0])
        torch.set_rng_state(self._random[1])
        if self._numpy is not None:
            now = sys.modules["numpy"].random.get_state()
            same = same and now[2:] == self._numpy[2:] and bool((now[1] == self._numpy[1]).all())
            sys.modules["numpy"].random.set_state(self._numpy)
        for found, before in (*self._attributes, *self._containers):
            unchanged = len(found) == len(before) and all(map(is_, found, before))
            if unchanged and isinstance(found, dict):
                unchanged = all(map(is_, found.values(), before.values()))
            if unchanged:
                continue
            same = False
            found.clear()
            found.extend(before) if isinstance(found, list) else found.update(before)
        return same


def _places(composites: Sequence[nn.Module]) -> list[Place]:
    """The modules whose forwards were executed, and their attributes."""
    places = []
    for m in composites:
        places.append(Place({"": m}, "", m, type(m)))
        for name, child in m._modules.items():
            places.append(Place(m._modules, name, child, type(child)))
        for name, value in m.__dict__.items():
            if name not in _OWN:
                places.append(Place(m.__dict__, name, value, type(value)))
    return places


def trace(module: nn.Module, signature: Signature) -> Trace | str:
    """The graph of the forward for calls of this signature, or the reason why there is none."""
    if patched(module) is not None:
        return str(patched(module))
    outer = _root_class(len(signature.tensors))()
    outer.inner = module
    structure: list[Any] = []

    def call(tensors: list[Any]) -> list[Any]:
        leaves, constants = [], iter(signature.constants)
        given = iter(tensors)
        for i in range(len(tensors) + len(signature.constants)):
            leaves.append(next(given) if i in signature.tensors else next(constants))
        args, kwargs = pytree.tree_unflatten(leaves, signature.spec)
        found, spec = pytree.tree_flatten(forward(*args, **kwargs))
        structure.append(spec)
        return found

    tracer, forward = _Tracer(), module.forward
    object.__setattr__(outer, "call", call)
    with _TRACING:
        untouched = _Untouched(list(module.modules()))
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
    places = _places([module, *tracer.composites])
    for node, m in list(modules.items()):
        idle = type(m) is nn.Identity or (type(m) in _DROPOUTS and not m.training)
        if idle and patched(m) is None and len(node.args) == 1:
            places.append(Place({"": m}, "", m, type(m)))
            places.append(Place(m.__dict__, "training", m.training, bool))
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            del modules[node]
    classes: dict[Any, None] = dict.fromkeys(map(type, [module, *tracer.composites]))
    forwards = [(cls, cls.forward) for cls in classes]
    return Trace(graph, modules, outer, structure[0], places, forwards)
