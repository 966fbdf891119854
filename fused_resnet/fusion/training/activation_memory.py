"""How much of a training step's activations is kept for backward, and how much computed again.

    level      kept of a bottleneck                    computed again in backward
    full       every convolution's and ReLU's output   nothing
    low        every convolution's output, the block's the ReLUs inside, elementwise
    lower      the narrow convolutions' outputs and    besides, the widening 1x1 convolution and the
               the block's                             shortcut's
    minimal    the inputs of segments of blocks        each segment, then as "low"

"auto", of every model until it is told otherwise, is "low" where the convolutions are the CPU
kernels of this package, and "full" elsewhere. There "low" takes as long as "full", within what
machines vary (benchmarks/RESULTS.md): an activation computed again lies in a cache, where one that
was kept is written to memory and read from it. On a GPU nobody has measured it: there "low" spares
writing what a 1x1 convolution normalises as it reads (cuda_training.py).

Segments are a ResNet's own forward's. Where blocks are called by something else, or one of them has
a hook, "minimal" keeps the input of every block.

Gradients are the same at every level, to the last bit, and so are running statistics, which each
step updates once. Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (1604.06174).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_resnet.layers.norms import is_frozen_bn, recomputing
from fused_resnet.layers.planned import Planned

LEVELS = ("full", "low", "lower", "minimal")
CHOICES = ("auto", *LEVELS)

_in_segment: ContextVar[bool] = ContextVar("fused_resnet_in_segment", default=False)


def level_of(module: nn.Module) -> str:
    """What a block is to keep by itself: "low" inside a segment."""
    level: str = getattr(module, "activation_memory", "auto")
    return "low" if level == "minimal" and _in_segment.get() else level


def set_activation_memory(model: nn.Module, level: str) -> None:
    """What training keeps of the activations of `model`'s blocks, from the next forward on.

    model: any module that holds blocks of `fused_resnet` (a ResNet of the family, or one inside
    something else). level: "full", "low", "lower" or "minimal", each with less memory and more
    computation than the one before, and the same gradients; or "auto", every model's default: "low"
    where the convolutions are this package's CPU kernels, "full" elsewhere. "minimal" splits each
    stage of a ResNet into O(sqrt(blocks)) segments, kept by torch.utils.checkpoint; of blocks that
    something else calls, it keeps the inputs.
    Applies where blocks take their fused training path (`fused_resnet.explain`).
    Raises ValueError where level is none of these, or model holds no block of `fused_resnet`, and
    TypeError where model is no module. At "minimal", as stock does at every level, backward raises
    RuntimeError where a parameter was modified since forward.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"set_activation_memory: model must be a torch.nn.Module, got {type(model).__name__}"
        )
    if level not in CHOICES:
        raise ValueError(
            f"set_activation_memory: level must be one of {', '.join(CHOICES)}, got {level!r}"
        )
    found = [m for m in model.modules() if isinstance(m, Planned)]
    if not found:
        raise ValueError(
            "set_activation_memory: model must hold residual blocks of fused_resnet, got a "
            f"{type(model).__name__} without any"
        )
    for m in found:
        m.activation_memory = level


def segments(blocks: int) -> int:
    """Into how many segments a stage of so many blocks is split: O(sqrt(blocks)).

    With s of them, s block outputs are kept and blocks / s blocks are alive at a time, each of
    which keeps about twice its output: s = sqrt(2 blocks) would have the lowest peak. Half as many
    keep half as much, at a peak a quarter higher.
    """
    return math.ceil(math.sqrt(blocks / 2))


def run_segment(run: Callable[[Tensor], Tensor], x: Tensor, modules: Iterable[nn.Module]) -> Tensor:
    """run(x), of which only x is kept; run again in backward, where nothing is counted twice.

    modules: what run computes by, and must still be in backward what they are now."""
    if not torch.is_grad_enabled():
        return run(x)
    once_more = _OnceMore(_Made(modules))

    def segment(x: Tensor) -> Tensor:
        token = _in_segment.set(True)
        try:
            return run(x)
        finally:
            _in_segment.reset(token)

    return checkpoint(
        segment, x, use_reentrant=False, preserve_rng_state=False,
        context_fn=lambda: (contextlib.nullcontext(), once_more),
    )  # fmt: skip


Run = Callable[[Tensor], Tensor]


def run_stages(stages: list[list[Run]], x: Tensor) -> Tensor:
    """What runs of all stages, in segments: blocks, or methods of them. A stage's first block,
    which makes the activation smaller, ends the segment before, so that its output is kept rather
    than its input."""
    firsts = [stage[:1] for stage in stages[1:]] + [[]]
    rests = stages[:1] + [stage[1:] for stage in stages[1:]]
    for blocks in (rest + first for rest, first in zip(rests, firsts, strict=True)):
        count = segments(len(blocks))
        for i in range(count):
            some = blocks[len(blocks) * i // count : len(blocks) * (i + 1) // count]
            if some:
                modules: list[Any] = [getattr(run, "__self__", run) for run in some]
                x = run_segment(_Chain(some), x, modules)
    return x


class _Chain:
    def __init__(self, blocks: list[Run]) -> None:
        self._blocks = blocks

    def __call__(self, x: Tensor) -> Tensor:
        for block in self._blocks:
            x = block(x)
        return x


class _Made:
    """What a segment's activations were made from, beside its input.

    Where a step keeps activations, autograd sees that a weight was modified before backward, and
    raises. One that computes them again would take the new weight, and give wrong gradients.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = [m for module in modules for m in module.modules()]
        self._was = self._now()

    def _now(self) -> list[Any]:
        state: list[Any] = []
        for m in self._modules:
            tensors: list[Tensor] = list(m.parameters(recurse=False))
            if not m.training or is_frozen_bn(m):  # else running statistics are written alone
                tensors += m.buffers(recurse=False)
            state += [(t, None if t.is_inference() else t._version) for t in tensors]
            state.append((m, m.training))
        return state

    def check(self) -> None:
        now = self._now()
        if len(now) != len(self._was) or any(
            a is not b or v != w for (a, v), (b, w) in zip(self._was, now, strict=True)
        ):
            raise RuntimeError(
                "set_activation_memory: at level 'minimal' backward computes activations again, "
                "and what they came from was replaced, modified by an inplace operation or "
                "switched between train() and eval() since forward; do that after backward, or "
                "choose another level"
            )


class _OnceMore:
    """A segment's runs after the first; as many as there are backwards through it."""

    def __init__(self, made: _Made) -> None:
        self._made = made
        self._tokens: list[Token[bool]] = []

    def __enter__(self) -> None:
        self._made.check()
        self._tokens.append(recomputing.set(True))

    def __exit__(self, *_: object) -> None:
        recomputing.reset(self._tokens.pop())
