"""What an executed forward may have read or changed: attributes of modules and of objects in them,
containers, the functions of classes and the globals that these name, random state."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from operator import is_
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.fusion.description import Place
from fused_resnet.layers.planned import FUSED, LINEAR, MADE

# Attributes of nn.Module that a forward does not read, or that guards compare by themselves.
_OWN = frozenset(nn.Module().__dict__) - {"training"} | {MADE, FUSED, LINEAR}
_PLAIN = (nn.Module, Tensor, type, ModuleType, FunctionType, BuiltinFunctionType, str, bytes)
_DEPTH = 3


def _parts(value: Any) -> dict[Any, Any] | list[Any] | set[Any] | None:
    """The container that holds the value's parts, which may change without the value: itself, or
    the attributes of an object."""
    if type(value) in (dict, list, set):
        return value
    if isinstance(value, _PLAIN):
        return None
    attributes = getattr(value, "__dict__", None)
    return attributes if type(attributes) is dict else None


def _inside(value: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """The containers in an attribute, and in what they hold."""
    parts = _parts(value)
    if parts is None or depth == 0:
        return
    yield parts
    for part in list(parts.values()) if isinstance(parts, dict) else list(parts):
        yield from _inside(part, depth - 1)


def unknown_state(modules: Iterable[nn.Module]) -> str | None:
    """Why the attributes cannot be guarded: one of them changes without a trace."""
    for m in modules:
        for name, value in m.__dict__.items():
            kind = type(value)
            generator = isinstance(value, (random.Random, torch.Generator))
            if generator or (kind.__module__.startswith("numpy") and not _is_scalar(value)):
                return f"its attribute {name} is a {kind.__name__}"
    return None


def _is_scalar(value: Any) -> bool:
    return getattr(value, "shape", None) == ()


def places_of(homes: Iterable[nn.Module]) -> list[Place]:
    """The modules, their attributes, the attributes of their children, and what these hold."""
    places: dict[int, Any] = {}
    for m in homes:
        places[id(m)] = m
        for child in m._modules.values():
            if child is not None:
                places.setdefault(id(child), child)
    found = []
    main = {id(m) for m in homes}
    for m in places.values():
        if id(m) in main:
            found.append(Place({"": m}, "", m, type(m)))
            found.append(Place({"": m.__dict__}, "", m.__dict__, dict))  # its keys
            for name, child in m._modules.items():
                found.append(Place(m._modules, name, child, type(child)))
        for name, value in m.__dict__.items():
            if name in _OWN:
                continue
            found.append(Place(m.__dict__, name, value, type(value)))
            for container in _inside(value):
                found.append(Place({"": container}, "", container, type(container)))
                if isinstance(container, dict):
                    found += [Place(container, k, v, type(v)) for k, v in container.items()]
    return found


class Code:
    """The functions and attributes of classes, and the globals and closures that the functions
    name, as they were when a forward was executed."""

    def __init__(self, classes: Iterable[type]) -> None:
        bases = {
            base: None
            for cls in classes
            for base in cls.__mro__
            if base is not object and not base.__module__.startswith("torch.nn.")
        }
        self._classes = [(base, tuple(vars(base)), tuple(vars(base).values())) for base in bases]
        self._names: list[tuple[dict[str, Any], str, Any]] = []
        self._cells: list[tuple[Any, Any]] = []
        for base in bases:
            for function in vars(base).values():
                if isinstance(function, FunctionType):
                    self._see(function)

    def _see(self, function: FunctionType) -> None:
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if value is not None and not isinstance(value, (type, ModuleType)):
                self._names.append((function.__globals__, name, value))
        for cell in function.__closure__ or ():
            try:
                self._cells.append((cell, cell.cell_contents))
            except ValueError:  # empty
                continue

    def holds(self) -> bool:
        for base, names, values in self._classes:
            now = vars(base)
            if len(now) != len(names) or not all(map(is_, map(now.get, names), values)):
                return False
        return all([home.get(name) is value for home, name, value in self._names]) and all(
            [cell.cell_contents is value for cell, value in self._cells]
        )


class Untouched:
    """What executing a forward must not change: random state, and the modules' attributes."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._attributes = [(m.__dict__, dict(m.__dict__)) for m in modules]
        seen: dict[int, Any] = {}
        for _, attributes in self._attributes:
            for name, value in attributes.items():
                if name not in _OWN:
                    seen.update((id(found), found) for found in _inside(value))
        self._containers = [(found, copy(found)) for found in seen.values()]
        self._random = random.getstate(), torch.get_rng_state()
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state()

    def restored(self) -> bool:
        """Puts everything back; False if anything had changed."""
        same = random.getstate() == self._random[0]
        same = torch.equal(torch.get_rng_state(), self._random[1]) and same
        if not same:
            random.setstate(self._random[0])
            torch.set_rng_state(self._random[1])
        if self._numpy is not None:
            numpy = sys.modules["numpy"].random
            now = numpy.get_state()
            if now[2:] != self._numpy[2:] or not (now[1] == self._numpy[1]).all():
                numpy.set_state(self._numpy)
                same = False
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
