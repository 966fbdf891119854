"""Caches packed convolutions while the tensors they were packed from are unchanged."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .convolution import FusedConv, Kind
from .problem import Problem

_noted: ContextVar[list[FusedConv] | None] = ContextVar("fused_resnet_noted", default=None)


@contextlib.contextmanager
def noting() -> Iterator[list[FusedConv]]:
    """Collects the convolutions that run on a GPU in this thread. A CUDA graph holds the addresses
    of their weights but no references, so its owner must keep the convolutions alive."""
    used: list[FusedConv] = []
    token = _noted.set(used)
    try:
        yield used
    finally:
        _noted.reset(token)


def note(conv: FusedConv) -> None:
    used = _noted.get()
    if used is not None:
        used.append(conv)


def capturing(t: Tensor) -> bool:
    """Whether the current stream of t's device is being captured into a CUDA graph."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def cacheable(t: Tensor) -> bool:
    """Whether a result just computed on t's device may be cached for later calls.

    False during CUDA graph capture, where memory belongs to the graph. Otherwise synchronises the
    current stream, because a later call may use another stream, which would not wait for it.
    """
    if capturing(t):
        return False
    if t.is_cuda:
        torch.cuda.current_stream(t.device).synchronize()
    return True


def fsdp_in_use() -> bool:
    """Whether FSDP2 shards the parameters of any live module of this process.

    FSDP2 gathers a parameter into the same tensor for every forward without changing its version
    counter, and often at the same address. The tensor does not identify its module.
    """
    composable = sys.modules.get("torch.distributed._composable_state")
    return bool(getattr(composable, "_module_state_mapping", None))


def _increment_versions(optimizer: Any, *_: Any) -> None:
    """PyTorch's fused optimizers (SGD, Adam, ... with fused=True) write parameters without
    incrementing the version counters by which the cache detects changes."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            written = [p for p in group["params"] if p.grad is not None and not p.is_inference()]
            torch.autograd.graph.increment_version(written)


register_optimizer_step_post_hook(_increment_versions)


def stamp(tensors: Iterable[Tensor | None]) -> list[tuple[Tensor | None, int, int]] | None:
    """The state of the tensors that must be unchanged for a result computed from them to be valid.

    Identity, version counter and address: an optimizer step, load_state_dict (also with
    assign=True), .to(), .half() and every in-place edit changes at least one. None if a tensor has
    no version counter because it was created in inference mode: nothing can be cached then.
    """
    tensors = list(tensors)
    if any(t is not None and t.is_inference() for t in tensors):
        return None
    return [(t, 0, 0) if t is None else (t, t._version, t.data_ptr()) for t in tensors]


def same_stamp(old: Any, new: Any) -> bool:
    """Whether two stamps describe the same tensors in the same state."""
    return (
        old is not None
        and new is not None
        and all(a is b and m == n and p == q for (a, m, p), (b, n, q) in zip(old, new, strict=True))
    )


# id(weight) -> its weak reference, stamp of the operands, kind and problem, and the convolution.
_cached: dict[int, tuple[weakref.ref[Tensor], Any, Any, FusedConv | None]] = {}


def cached_convolution(
    kind: Kind, problem: Problem, weight: Tensor, scale: Tensor, shift: Tensor
) -> FusedConv:
    """The convolution of these operands by `kind`, cached while the weight is alive.

    Cached from the second call with the same operands: in training the weights change at every
    step, and an unused copy would only cost memory. Not cached if FSDP2 may have changed the weight
    unnoticed.
    """
    # The stamp excludes the weight, which it would keep alive; a weak reference identifies it.
    now = stamp((scale, shift))
    state = None
    if not weight.is_inference():
        state = (weight._version, weight.data_ptr(), kind, problem)
    key = id(weight)
    entry = _cached.get(key)
    unchanged = (
        entry is not None
        and entry[0]() is weight
        and state is not None
        and entry[2] == state
        and same_stamp(entry[1], now)
        and not fsdp_in_use()
    )
    if unchanged and entry is not None and entry[3] is not None:
        return entry[3]
    conv = kind(problem, weight, scale, shift)
    if now is not None and state is not None:
        alive = weakref.ref(weight, lambda _: _cached.pop(key, None))
        conv.is_cached = unchanged and cacheable(weight)
        _cached[key] = (alive, now, state, conv if conv.is_cached else None)
    return conv
