"""`torch.compile(model, backend="fused_resnet")`: what `fuse` finds runs on this package's kernels,
the rest by Inductor.

Dynamo hands over the graph of a forward with parameters and buffers as inputs. For the tensors of
the first call a program is made as for `fuse` (functional.py, match.py, program.py), and used while
the tensors are the same objects and unchanged; weights that were written to are seen. Everything
else is compiled by Inductor: parts without a fused counterpart, and whole graphs that switch
gradients or autocast. TORCH_LOGS="fused_resnet" prints a line for each graph."""

from __future__ import annotations

import functools
import gc
import logging
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fused_resnet.fusion import store
from fused_resnet.fusion.call import call_reason
from fused_resnet.fusion.training.prepare import setting
from fused_resnet.layers.norms import uses_batch_statistics

from .functional import Bound, bound, stand_ins
from .match import Matcher
from .program import InferenceProgram, Program, TrainingProgram
from .trace import Trace

_log = logging.getLogger(__name__)
_MAX_PROGRAMS = 4
_MAX_BOUNDS = 4  # models of one class that share a graph, as a student and its teacher
_OTHERS = "its weights are others at every call"
_OWNERLESS = "its weights belong to no module"

# Calls that switch what operations after them do.
_SWITCHES = (
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
)
# Calls that Inductor does not make faster by themselves.
_ALONE = {
    torch.conv2d, F.linear, F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d, F.batch_norm,
    torch.flatten, torch.cat, torch.matmul, operator.getitem, operator.matmul, getattr,
    F.scaled_dot_product_attention, F.dropout,
}  # fmt: skip
_ALONE_METHODS = {
    "size", "view", "reshape", "flatten", "permute", "transpose", "contiguous", "detach", "dim",
    "unsqueeze", "squeeze", "chunk", "split", "add_",
}  # fmt: skip


def backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], mode: Any = None, options: Any = None
) -> Callable[..., Any]:
    """The backend's entry: a captured graph -> what computes it. mode, options: Inductor's, for
    what is left to it."""
    from torch._inductor import list_mode_options  # imported by torch.compile alone

    settings = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    reason = "it has no convolution or batch norm"
    for node in gm.graph.nodes:
        higher = isinstance(node.target, torch._ops.HigherOrderOperator)
        if higher or node.op == "call_module" or node.target in _SWITCHES:
            reason = f"it has {getattr(node.target, '__name__', node.target)}"
            break
        if node.target in (torch.conv2d, F.batch_norm):
            reason = ""
    if not reason:
        return FusedGraph(gm, functools.partial(_inductor, options=settings))
    _log.info("Inductor compiles a graph: %s", reason)
    return LeftGraph(gm, reason, _inductor_now(gm, example_inputs, settings))


def _inductor(graph: fx.GraphModule, options: dict[str, Any]) -> Callable[..., Any]:
    """A function for inputs of any size, compiled when it is called."""
    return torch.compile(graph, options=options or None)


def _inductor_now(
    graph: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]
) -> Callable[..., Any]:
    """A function for such inputs, while Dynamo compiles for them."""
    from torch._inductor import compile

    return compile(graph, list(inputs), options=options or None)


def _owners(tensors: Sequence[Tensor]) -> list[nn.Module] | None:
    """The modules of which the tensors are parameters or buffers; None if one has no such module.
    Whoever keeps tensors of a model must know when the model is no more."""
    left, found = {id(t) for t in tensors}, []
    for module in gc.get_objects():
        if not issubclass(type(module), nn.Module) or module in stand_ins:
            continue
        if "_parameters" not in module.__dict__:  # not initialised yet
            continue
        own = {id(t) for t in (*module._parameters.values(), *module._buffers.values())}
        if own & left:
            found.append(module)
            left -= own
            if not left:
                break
    return None if left else found


def _refer_to(seen: dict[int, weakref.ref[Tensor]], tensors: dict[int, Tensor]) -> bool:
    return len(seen) == len(tensors) and all([seen[i]() is t for i, t in tensors.items()])


def _worth(node: fx.Node) -> bool:
    """Whether Inductor may fuse the node with others."""
    if node.op == "call_method":
        return node.target not in _ALONE_METHODS
    return node.op == "call_function" and node.target not in _ALONE


class LeftGraph:
    """A captured graph that Inductor computes, and why."""

    bounds = ()

    def __init__(self, gm: fx.GraphModule, reason: str, run: Callable[..., Any]) -> None:
        self.gm, self.reason, self._run = gm, reason, run
        graphs.add(self)

    def __call__(self, *inputs: Any) -> Any:
        return self._run(*inputs)

    def weights(self) -> dict[int, Tensor]:
        return {}


class FusedGraph:
    """What runs in the place of one captured graph."""

    def __init__(
        self, gm: fx.GraphModule, rest: Callable[[fx.GraphModule], Callable[..., Any]]
    ) -> None:
        self.gm, self._rest = gm, rest
        self.bounds: list[Bound] = []  # the last one used first
        self.reason = "it was not called"  # why the last call was not fused
        self._misses = 0  # consecutive calls with other tensors
        # Weak references to the weights, by input, of the last calls that did not fit.
        self._seen: list[dict[int, weakref.ref[Tensor]]] = []
        self._ownerless = False
        self._compiled: Callable[..., Any] | None = None
        self._lock = threading.Lock()
        graphs.add(self)

    def __call__(self, *inputs: Any) -> Any:
        program = self._program(inputs)
        if isinstance(program, Program):
            self.reason, self._misses = "", 0
            return program.run(inputs)
        self.reason = program
        if program == _OTHERS:
            self._misses += 1
            if self._misses == 1:  # as after load_state_dict(assign=True)
                return self.gm(*inputs)
        return self._otherwise(program)(*inputs)

    def _otherwise(self, reason: str) -> Callable[..., Any]:
        """The whole graph by Inductor."""
        if self._compiled is None:
            _log.info("Inductor compiles a graph: %s", reason)
            self._compiled = self._rest(self.gm)
        return self._compiled

    def _program(self, inputs: Sequence[Any]) -> Program | str:
        """The program for a call, kept or made now; or why there is none."""
        bounds = self.bounds
        now: Bound | str = bounds[0] if bounds and bounds[0].fits(inputs) else ""
        if not isinstance(now, Bound):
            with self._lock:
                now = self._rebound(inputs)
        if isinstance(now, str):
            return now
        found = self._program_of(now, inputs)
        now.reason = found if isinstance(found, str) else ""
        return found

    def _program_of(self, now: Bound, inputs: Sequence[Any]) -> Program | str:
        x = None if now.lead is None else inputs[now.lead]
        reason = "nothing in it can be fused" if x is None else call_reason(x, training=True)
        if reason is not None or x is None:
            return str(reason)
        grad = torch.is_grad_enabled() and any(
            [isinstance(t, Tensor) and t.requires_grad for t in inputs]
        )
        modes = torch.is_inference_mode_enabled(), torch.get_default_dtype()
        key = (grad, *modes, *setting(x))
        kept: Program | None = now.programs.get(key)
        if kept is not None and kept.generation == store.generation() and kept.holds():
            return kept
        made = self._made(now, x, grad, key)
        if isinstance(made, Program):
            now.program = made
        return made

    def _made(self, now: Bound, x: Tensor, grad: bool, key: Any) -> Program | str:
        generation = store.generation()
        matched = Matcher(now.trace)
        if not matched.found:
            return "nothing in it can be fused"
        norms = [m for m in now.trace.modules.values() if isinstance(m, nn.BatchNorm2d)]
        program: Program
        if grad or any(map(uses_batch_statistics, norms)):
            program = TrainingProgram(now.trace, matched, now.trace.root, x, self._segment)
        else:
            program = InferenceProgram(now.trace, matched, x, self._segment)
            program.guard.forget_modules()  # stand-ins: that the tensors are these, `fits` has seen
        program.generation = generation
        _log.info("%d parts of a graph are fused", len(matched.found))
        if program.is_cached:
            while len(now.programs) >= _MAX_PROGRAMS:
                now.programs.pop(next(iter(list(now.programs))), None)
            now.programs[key] = program
        return program

    def _rebound(self, inputs: Sequence[Any]) -> Bound | str:
        """The graph with the tensors of this call. Where they are others than before, only if two
        calls have the same: tensors made for each call would be packed for each."""
        for kept in self.bounds:
            if kept.fits(inputs):
                self.bounds = [kept, *(b for b in self.bounds if b is not kept)]
                return kept
        if self._ownerless:  # looking for owners takes long
            return _OWNERLESS
        now = bound(self.gm, inputs)
        mine = list(now.tensors.values())
        again = any(_refer_to(seen, now.tensors) for seen in self._seen)
        self._seen = self._seen[1 - _MAX_BOUNDS :]
        self._seen.append({i: weakref.ref(t) for i, t in now.tensors.items()})
        if self.bounds and not again:
            return _OTHERS
        owners = _owners(mine)
        if owners is None:
            self._ownerless = not self.bounds
            return _OWNERLESS
        me = weakref.ref(self)
        for owner in owners:
            weakref.finalize(owner, _forget, me, id(now)).atexit = False
        now.owners = list(map(weakref.ref, owners))
        others = [b for b in self.bounds if b.is_owned()]
        self.bounds = [now, *others[: _MAX_BOUNDS - 1]]
        return now

    def _segment(self, nodes: list[fx.Node], traced: Trace) -> Callable[..., Any] | None:
        """Consecutive nodes without a fused counterpart as one function, by Inductor; None if
        there is little for it to do."""
        if sum(map(_worth, nodes)) < 2:
            return None
        graph, inside, copies = fx.Graph(), set(nodes), {}
        for source in dict.fromkeys(m for n in nodes for m in n.all_input_nodes):
            if source not in inside:
                copies[source] = graph.placeholder(source.name)
        for n in nodes:
            copies[n] = graph.node_copy(n, copies.__getitem__)
        graph.output(tuple(copies[n] for n in nodes if not inside.issuperset(n.users)))
        return self._rest(fx.GraphModule(traced.root, graph))

    def weights(self) -> dict[int, Tensor]:
        """The weights of the last call, by input, as far as they still exist."""
        found = {i: ref() for i, ref in (self._seen or [{}])[-1].items()}
        return {i: t for i, t in found.items() if t is not None}

    def forget(self, bound_id: int) -> None:
        self.bounds = [b for b in self.bounds if id(b) != bound_id]


graphs: weakref.WeakSet[FusedGraph | LeftGraph] = weakref.WeakSet()


def _forget(graph: weakref.ref[FusedGraph], bound_id: int) -> None:
    """Called when a module is freed whose tensors a graph holds."""
    found = graph()
    if isinstance(found, FusedGraph):
        found.forget(bound_id)
