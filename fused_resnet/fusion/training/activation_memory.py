"""Which activations a training step saves for backward, and which it recomputes.

    level      saved of a bottleneck                   recomputed in backward
    full       outputs of all convolutions and ReLUs   nothing
    low        outputs of all convolutions and of the  the inner ReLUs, elementwise
               block
    lower      outputs of the narrow convolutions and  the inner ReLUs, the widening 1x1 convolution
               of the block                            and the shortcut's
    minimal    inputs of segments of blocks            each segment, then as "low"

"auto", the default, is "low" where the convolutions are the CPU kernels of this package, and "full"
elsewhere. On the CPU "low" takes as long as "full", within the variation between machines
(benchmarks/RESULTS.md): a recomputed activation is in cache, a saved one is written to memory and
read back. On a GPU this has not been measured; there "low" saves writing what a 1x1 convolution
normalises as it reads (kernels/training/cuda.py).

Only the forward of a ResNet runs in segments. Where blocks are called by something else, or one of
them has a hook, "minimal" saves the input of every block.

Gradients are bitwise equal at every level. So are running statistics, which each step updates once.
Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (1604.06174).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_resnet.layers.norms import is_frozen_bn
from fused_resnet.layers.planned import Planned

LEVELS = ("full", "low", "lower", "minimal")
CHOICES = ("auto", *LEVELS)

in_segment: ContextVar[bool] = ContextVar("fused_resnet_in_segment", default=False)
"""Whether a segment runs, of which only the input is saved: within it "minimal" is "low"."""


def set_activation_memory(model: nn.Module, level: str) -> None:
    """Sets which activations the blocks of `model` save for backward, from the next forward on.

    model: any module with blocks of `fused_resnet` (a ResNet, or a module that contains one).
    level: "full", "low", "lower" or "minimal", each with less memory and more computation than the
    one before, and the same gradients; or "auto", the default: "low" where the convolutions are
    this package's CPU kernels, "full" elsewhere. "minimal" splits each stage of a ResNet into
    O(sqrt(blocks)) segments under torch.utils.checkpoint; of blocks that other code calls, it saves
    the inputs.
    Applies where blocks take their fused training path (`fused_resnet.explain`).
    Raises ValueError if level is none of these or model contains no block of `fused_resnet`, and
    TypeError if model is not a module. At "minimal", as stock does, backward raises RuntimeError if
    a parameter was modified since forward.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"set_activation_memory: model must be a torch.nn.Module, got {type(model).__name__}"
        )
    if level not in CHOICES:
        raise ValueError(
            f"set_activation_memory: level must be one of {', '.join(CHOICES)}, got {level!r}"
        )
    blocks = [m for m in model.modules() if isinstance(m, Planned)]
    if not blocks:
        raise ValueError(
            "set_activation_memory: model must hold residual blocks of fused_resnet, got a "
            f"{type(model).__name__} without any"
        )
    for m in blocks:
        m.activation_memory = level


def segments(blocks: int) -> int:
    """The number of segments for a stage of so many blocks: O(sqrt(blocks)).

    With s segments, s block outputs are saved, and blocks / s blocks are recomputed at a time, each
    of which saves about twice its output: s = sqrt(2 blocks) has the lowest peak. Half as many save
    half as much, with a peak a quarter higher.
    """
    return math.ceil(math.sqrt(blocks / 2))


def run_segment(run: Callable[[Tensor], Tensor], x: Tensor, modules: Iterable[nn.Module]) -> Tensor:
    """run(x), saving only x; backward runs it again, without updating running statistics twice.

    modules: the modules that run uses; they must be unchanged in backward."""
    if not torch.is_grad_enabled():
        return run(x)
    recomputation = _Recomputation(_SegmentState(modules))

    def segment(x: Tensor) -> Tensor:
        token = in_segment.set(True)
        try:
            return run(x)
        finally:
            in_segment.reset(token)

    return checkpoint(
        segment, x, use_reentrant=False, preserve_rng_state=False,
        context_fn=lambda: (contextlib.nullcontext(), recomputation),
    )  # fmt: skip


def run_stages(
    stages: Sequence[Sequence[Any]], x: Tensor, run: Callable[[Any, Tensor], Tensor]
) -> Tensor:
    """Runs all stages in segments. stages: the blocks of each, or methods of them; run(block, x).
    The first block of a stage makes the activation smaller, so it ends the previous segment: its
    output is saved, not its input."""
    firsts = [stage[:1] for stage in stages[1:]] + [[]]
    rests = [*stages[:1], *(stage[1:] for stage in stages[1:])]
    for rest, first in zip(rests, firsts, strict=True):
        blocks = [*rest, *first]
        count = segments(len(blocks))
        for i in range(count):
            segment = blocks[len(blocks) * i // count : len(blocks) * (i + 1) // count]
            if segment:
                modules: list[Any] = [getattr(block, "__self__", block) for block in segment]
                x = run_segment(partial(_run_each, run, segment), x, modules)
    return x


def _run_each(run: Callable[[Any, Tensor], Tensor], blocks: list[Any], x: Tensor) -> Tensor:
    for block in blocks:
        x = run(block, x)
    return x


class _SegmentState:
    """The parameters, buffers and training modes that a segment's activations depend on.

    Where activations are saved, autograd raises if a weight was modified before backward.
    Recomputation would silently use the new weight and give wrong gradients.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = [m for module in modules for m in module.modules()]
        self._at_forward = self._current()

    def _current(self) -> list[Any]:
        state: list[Any] = []
        for m in self._modules:
            tensors: list[Tensor] = list(m.parameters(recurse=False))
            if not m.training or is_frozen_bn(m):  # in training buffers are written, not read
                tensors += m.buffers(recurse=False)
            state += [(t, None if t.is_inference() else t._version) for t in tensors]
            state.append((m, m.training))
        return state

    def check(self) -> None:
        now = self._current()
        if len(now) != len(self._at_forward) or any(
            a is not b or v != w for (a, v), (b, w) in zip(self._at_forward, now, strict=True)
        ):
            raise RuntimeError(
                "set_activation_memory: at level 'minimal' backward recomputes activations, and a "
                "module, parameter or buffer that they depend on was replaced, modified by an "
                "inplace operation or switched between train() and eval() since forward; do that "
                "after backward, or choose another level"
            )


class _Recomputation:
    """The context of a segment's recomputation, entered once per backward through it."""

    def __init__(self, state: _SegmentState) -> None:
        self._state = state

    def __enter__(self) -> None:
        self._state.check()

    def __exit__(self, *_: object) -> None:
        """Nothing to undo."""
