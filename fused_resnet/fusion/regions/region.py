"""`fuse`: makes any model run its convolutions, norms, additions and ReLUs on fused kernels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from fused_resnet.fusion import store
from fused_resnet.fusion.call import call_reason, wants_grad
from fused_resnet.fusion.guard import Guard
from fused_resnet.fusion.training.prepare import setting
from fused_resnet.kernels.cache import capturing
from fused_resnet.layers.hooks import hooks_of
from fused_resnet.layers.norms import uses_batch_statistics
from fused_resnet.layers.planned import FUSED

from . import verify
from .installed import Installed, install, installed_in
from .linear import LinearRegion
from .match import Matcher
from .program import InferenceProgram, Program, TrainingProgram
from .trace import Place, Signature, Trace, is_composite, signature_of, trace

_MAX_PROGRAMS = 8


class _Failure:
    """Why there is no program, as long as `holds`."""

    is_cached = True
    generation = -1

    def __init__(self, reason: str, module: nn.Module) -> None:
        self.reason = reason
        places = [Place({"": m}, "", m, type(m)) for m in module.modules()]
        self.holds = Guard([], places, values=False).structure_holds


def reason_against(module: nn.Module, tensors: Sequence[Tensor]) -> str | None:
    """Why no program may run such a call of the module now, whatever its forward is."""
    reason = call_reason(tensors[0], module.training)
    if reason is not None or len(tensors) == 1:
        return reason
    plain = all(type(t) in (Tensor, nn.Parameter) for t in tensors)
    return None if plain else "an argument is not a plain Tensor"


def records(module: nn.Module, tensors: Sequence[Tensor]) -> bool:
    """Whether autograd would record such a call now."""
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return grad or wants_grad(module, tensors[0])


def trains(traced: Trace, grad: bool) -> bool:
    """Whether a program of this trace is one for training. grad: whether autograd records it."""
    norms = [m for m in traced.modules.values() if isinstance(m, nn.BatchNorm2d)]
    return grad or any(map(uses_batch_statistics, norms))


class Region(Installed):
    """What runs in the place of a module's call: its forward, by a program of fused parts; or, for
    a call that has none, what its class defines, in which the modules inside decide for
    themselves."""

    attribute = FUSED

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._programs: dict[Any, Program | _Failure] = {}
        self._verified: set[str] = set()  # the graphs of programs whose first call was right
        self.refused: str | None = None  # how the last program differed from the module's own call
        self.signature: Signature | None = None  # of the last call

    @property
    def is_verified(self) -> bool:
        """Whether a first call was compared with the module's own."""
        return bool(self._verified)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self._module()
        plain = torch.compiler.is_compiling() or verify.is_running()
        if not plain and not any(hooks_of(module)):
            call = signature_of(args, kwargs)
            self.signature = None if call is None else call[0]
            program = None if call is None else self.program(module, *call)
            if call is not None and isinstance(program, Program):
                if program.text in self._verified:
                    return program.run(call[1])
                return self._verify(module, program, call[1], args, kwargs)
        return module._call_impl(*args, **kwargs)

    def _verify(
        self, module: Any, program: Program, tensors: list[Tensor], args: Any, kwargs: Any
    ) -> Any:
        """The result of a program's first call, compared with the module's own call; if they
        differ, such calls are not fused until the module changes."""
        if capturing(tensors[0]) or any(any(hooks_of(m)) for m in module.modules()):
            return program.run(tensors)  # hooks would run twice
        found, why = verify.compared(
            module,
            lambda: module._call_impl(*args, **kwargs),
            lambda: program.run(tensors),
            tensors,
        )
        if why is None:
            self._verified.add(program.text)
            return found
        if why is verify.UNCERTAIN:  # the next call is compared
            return found
        self.refused = why
        failure = _Failure(why, module)
        failure.generation = program.generation
        for key, kept in list(self._programs.items()):
            if kept is program:
                self._programs[key] = failure
        return found

    def program(
        self, module: nn.Module, signature: Signature, tensors: list[Tensor]
    ) -> Program | _Failure | None:
        """The program for such a call, cached or made now, or why there is none."""
        x = tensors[0]
        if reason_against(module, tensors) is not None:
            if x.is_meta:  # so are the weights, of which none shall stay in memory
                self.forget()
            return None
        grad = records(module, tensors)
        modes = (
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        )  # fmt: skip
        key = (signature, module.training, grad, *modes, *setting(x))
        found = self._programs.get(key)
        if found is not None and found.generation == store.generation() and found.holds():
            return found
        self._drop_stale()
        if module.training:  # its weights change: what was packed for inference only takes memory
            self._programs = {k: p for k, p in self._programs.items() if k[1]}
        if any(map(is_lazy, module.parameters())):
            return None
        self.refused = None
        generation = store.generation()
        found = self._made(module, signature, x, grad)
        found.generation = generation
        if found.is_cached:
            while len(self._programs) >= _MAX_PROGRAMS:
                self._programs.pop(next(iter(list(self._programs))), None)
            self._programs[key] = found
        return found

    def _made(
        self, module: nn.Module, signature: Signature, x: Tensor, grad: bool
    ) -> Program | _Failure:
        traced = trace(module, signature)
        if isinstance(traced, str):
            return _Failure(traced, module)
        matched = Matcher(traced)
        if not matched.found:
            return _Failure("nothing in it can be fused", module)
        if trains(traced, grad):
            return TrainingProgram(traced, matched, module, x)
        return InferenceProgram(traced, matched, x)

    def _drop_stale(self) -> None:
        """Gives the memory back of what no longer holds, also for calls of other kinds: of weights
        that were replaced, and of what was packed from them."""
        now = store.generation()
        for key, kept in list(self._programs.items()):
            if kept.generation != now or not kept.holds():
                self._programs.pop(key, None)

    def forget(self) -> None:
        self._programs.clear()


def regions_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, Region]]:
    """(name, module, region) of every module that `fuse` changed."""
    for name, module in model.named_modules():
        if installed_in(module, Region):
            yield name, module, module.__dict__[FUSED]


def verified(model: nn.Module) -> bool:
    """Whether nothing in the model, or what was called of it, still has to be compared with its
    unfused call."""
    regions = [region for _, _, region in regions_of(model)]
    return not regions or any(region.is_verified for region in regions)


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Makes a model of any class run on this package's kernels, in inference and in training.

        conv -> BN -> (+ residual) -> ReLU,   BN -> (+ residual) -> ReLU,   + residual -> ReLU

    and parts of these, wherever torch.fx can trace the forward that calls them. What it cannot
    trace runs as before, with the modules in it fused. On a CPU, large linear layers in float32
    run by oneDNN without gradients. Nothing else changes: classes, names, state_dict, parameters,
    buffers, hooks, training mode, copies, pickles.

    inplace: changes `model` itself. Otherwise its modules are copied, and the copy shares its
    parameters and buffers, so that an optimizer made before drives both.

    Returns the fused model. `explain` lists what is fused and why the rest is not; `unfuse` gives
    the original behaviour back. Fusing twice changes nothing. Raises TypeError if model is no
    nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be an nn.Module, got {type(model).__name__}")
    if not inplace:
        model = _copied(model)
    changed = False
    for module in model.modules():
        if is_composite(module):
            changed = True
            if not installed_in(module, Region):
                install(module, Region)
    for module in model.modules() if changed else ():
        if type(module) is nn.Linear and not installed_in(module, LinearRegion):
            install(module, LinearRegion)
    if not changed:
        warnings.warn(
            f"fuse: {type(model).__name__} holds nothing to fuse: no convolution or batch norm in "
            "a module that is not of this package",
            stacklevel=2,
        )
    return model


def _copied(model: nn.Module) -> nn.Module:
    """A copy of the modules, with the parameters and buffers of `model`."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for m in model.modules():  # weights that hooks compute, as those of weight_norm
        shared |= {id(t): t for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf}
    copied = copy.deepcopy(model, shared)
    originals = dict(model.named_modules())
    for module_name, new in copied.named_modules():
        old = originals.get(module_name)
        if isinstance(old, ScriptModule):  # its copy clones, by operations that autograd records
            for name, t in (*old.named_parameters("", False), *old.named_buffers("", False)):
                setattr(new, name, t)
    return copied


def unfuse(model: nn.Module) -> nn.Module:
    """Gives a fused model its original behaviour back, in place; returns it. Raises TypeError if
    model is no nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse: model must be an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        for kind in (Region, LinearRegion):
            module.__dict__.pop(kind.attribute, None)
    return model
