"""The parameters and buffers of a module as operands of an op of compiled.py, compiled_step.py."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn

from fused_resnet.layers.planned import SLOTS, numbered

from .description import recipe_of


def operands_of(
    module: nn.Module, body: tuple[str, ...] | None, prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and buffers by name, each once; of the submodules `body` alone unless that is
    None. prefix: before the names of `body`. Traced by torch.compile."""

    def inside(name: str) -> bool:
        return body is None or name.removeprefix(prefix).split(".", 1)[0] in body

    parameters: dict[str, Tensor] = {
        name: p for name, p in module.named_parameters() if inside(name)
    }
    return parameters, {name: b for name, b in module.named_buffers() if inside(name)}


def own_tensors(
    module: nn.Module, body: tuple[str, ...] | None, fresh: bool = False
) -> list[Tensor | None]:
    """The tensors of `operands_of`, in order. Their places are kept, and found anew if `fresh`."""
    slots = module.__dict__.get(SLOTS, {})
    if fresh or body not in slots:
        found: dict[int, tuple[dict[str, Any], str]] = {}
        for kind in ("_parameters", "_buffers"):
            for path, m in module.named_modules():
                if body is not None and path.split(".", 1)[0] not in body:
                    continue
                for name, t in getattr(m, kind).items():
                    if t is not None:
                        found.setdefault(id(t), (getattr(m, kind), name))
        slots = module.__dict__[SLOTS] = {**slots, body: tuple(zip(*found.values(), strict=True))}
    return list(map(dict.get, *slots[body])) if slots[body] else []


def are_own(
    module: nn.Module,
    given: Sequence[Tensor],
    body: tuple[str, ...] | None = None,
    ignored: Sequence[int] = (),
) -> bool:
    """Whether the tensors are those of `operands_of`, in order, but for some positions."""

    def hold(own: list[Tensor | None]) -> bool:
        if len(own) != len(given):
            return False
        for i in ignored:
            own[i] = given[i]
        return all(map(is_, own, given))

    return hold(own_tensors(module, body)) or hold(own_tensors(module, body, fresh=True))


def structure_of(number: int) -> str:
    """A digest of what, besides operands, the shapes of a module's outputs depend on. An operand of
    the ops since compilers keep compiled graphs, also for other processes, by the graph alone, and
    there the number may be another module's."""
    module = numbered(number)
    tensors = (*module.named_parameters(), *module.named_buffers())
    shapes = [(name, tuple(t.shape), t.dtype) for name, t in tensors]
    return hashlib.sha256(f"{module} {shapes}".encode()).hexdigest()[:16]


# What torch.compiler.assume_constant_result sets; that also imports Dynamo, which takes a second.
structure_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def own_forward(module: Any) -> bool:
    """Whether a class before the one that is registered defines its own forward."""
    _, forward = recipe_of(module)
    for cls in type(module).__mro__:
        if cls.__dict__.get("forward") is forward:
            return False
        if cls.__dict__.keys() & {"forward", "_forward_impl"}:
            return True
    return True
