"""Gives back the memory of weights as soon as they are packed, where that was asked for.

The packed weights take the place of the weights in memory where they have the same size: freed one
by one, weights would leave holes all over the heap, and glibc returns nothing of those by itself.
(ResNet-50, batch 1: at its peak 156 MiB with holes returned layer by layer, 209 without.)"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

from fused_resnet.fusion.guard import Guard, noting_guards
from fused_resnet.kernels.convolution import FusedConv
from fused_resnet.kernels.fingerprint import fingerprint, ranges_of, table_of
from fused_resnet.layers.hooks import FSDP
from fused_resnet.layers.released import Released, packed_elsewhere, release

# glibc returns nothing but the end of its heap by itself.
_TRIM_BYTES = 2**22


def released(convs: Iterable[Any]) -> str:
    """What `explain` says of convolutions whose weights' memory was given back; empty if none."""
    return "weights packed only" if any(type(c.weight) is Released for c in convs) else ""


class Releasing:
    """Releases the weights of the plans that this thread makes of a model.

    reasons: why a parameter's memory is kept, by the parameter's id."""

    def __init__(self, model: nn.Module, guards: list[Any]) -> None:
        self._model, self._guards = model, guards
        self._places: dict[int, int] = {}
        for m in model.modules():
            for p in m._parameters.values():
                self._places[id(p)] = self._places.get(id(p), 0) + 1
        self.reasons: dict[int, str] = {}
        self._freed_bytes = 0  # since the last trim

    def add(self, module: nn.Module, packed: FusedConv) -> None:
        """Releases the weight of a convolution that was packed."""
        p: Any = module.weight
        reason = "sharding rewrites it" if FSDP in module.__dict__ else self._release(p, packed)
        if reason is not None:
            self.reasons[id(p)] = reason

    def _release(self, p: Any, conv: FusedConv) -> str | None:
        places = self._places.get(id(p), 0)
        if places != 1:
            return "several modules have it" if places else "it is no parameter of the model"
        pairs = conv.holds(p)
        if isinstance(pairs, str):
            return pairs
        table = table_of(ranges_of([p]))
        sampled = fingerprint(table)
        table[:, 2] = 0
        whole = fingerprint(table)
        guards: list[Guard] = [guard for ref in self._guards if (guard := ref()) is not None]
        aliases = {id(alias) for guard in guards for alias in guard.aliases(p)}
        memory = release(p, pairs, len(aliases))
        if isinstance(memory, str):
            return memory
        for guard in guards:
            guard.released(p, sampled, whole)
        self._freed_bytes += memory.nbytes()
        conv.save_memory()
        if conv.move(memory):
            pairs = conv.holds(p)
            assert not isinstance(pairs, str)
            packed_elsewhere(p, pairs)
        del memory
        self.trim(_TRIM_BYTES)
        return None

    def trim(self, least: int = 0) -> None:
        """Returns free memory to the system, if at least so much was freed since the last time."""
        if self._freed_bytes >= least:
            self._freed_bytes = 0
            with contextlib.suppress(OSError, AttributeError):  # not glibc
                ctypes.CDLL(None).malloc_trim(0)

    def kept(self) -> dict[str, str]:
        """The names of all weights of convolutions that keep their memory, and why."""
        found = {}
        for name, m in self._model.named_modules():
            p = m._parameters.get("weight") if isinstance(m, nn.Conv2d) else None
            if p is not None and type(p) is not Released:
                why = self.reasons.get(id(p), "no fused convolution reads it")
                found[f"{name}.weight" if name else "weight"] = why
        return found


_releasing: ContextVar[Releasing | None] = ContextVar("fused_resnet_releasing", default=None)


@contextlib.contextmanager
def releasing(model: nn.Module) -> Iterator[Releasing]:
    """Weights of the model are released as soon as this thread's plans have packed them."""
    with noting_guards() as guards:
        found = Releasing(model, guards)
        token = _releasing.set(found)
        try:
            yield found
        finally:
            _releasing.reset(token)
            found.trim()


def offer(conv: nn.Module, packed: FusedConv) -> None:
    """Called with every convolution of a plan as soon as it is packed."""
    found = _releasing.get()
    if found is not None:
        found.add(conv, packed)
