"""Caches packed convolutions while the tensors they were packed from are unchanged."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .convolution import FusedConv, Kind
from .fingerprint import fingerprint, ranges_of, table_of
from .problem import Problem
from .target import current

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
    if not t.is_cuda:
        return False
    with current(t.device):
        return torch.cuda.is_current_stream_capturing()


def refuse_capture(what: str) -> None:
    """Raises RuntimeError while the current stream is captured into a CUDA graph. For probes: they
    synchronise, which a capture does not allow, so they would fail and stay failed."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"fused_resnet: {what} cannot be probed while a CUDA graph is captured: warm up first, "
            "by one call outside of the capture"
        )


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


@contextlib.contextmanager
def to_keep() -> Iterator[None]:
    """Computes tensors that later calls also use: without gradients, and normal ones, since
    autograd does not save those that are created in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


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


# id(weight) -> a reference to it, scale, shift, the state of all three, and the convolution.
Entries = dict[int, tuple[Callable[[], Any], Tensor, Tensor, Any, FusedConv | None]]
_cached: Entries = {}  # with weak references
_owner: ContextVar[Entries | None] = ContextVar("fused_resnet_owner", default=None)


@contextlib.contextmanager
def owned_by(entries: Entries) -> Iterator[None]:
    """Convolutions are cached in `entries` instead, as long as these live. A tensor in the global
    cache has a weak reference, which torch.utils.swap_tensors does not allow."""
    token = _owner.set(entries)
    try:
        yield
    finally:
        _owner.reset(token)


def cached_convolution(
    kind: Kind, problem: Problem, weight: Tensor, scale: Tensor, shift: Tensor
) -> FusedConv:
    """The convolution of these operands by `kind`, cached while the weight lives and all operands
    are unchanged.

    Compared are identity, version counter, address and values (see fingerprint.py): an optimizer
    step, load_state_dict (also with assign=True), .to(), .half() and every in-place edit changes at
    least one. A tensor created in inference mode has no version counter, so nothing is cached then;
    nor if FSDP2 may have changed the weight unnoticed. Cached from the second call with the same
    operands: in training the weights change at every step, and an unused copy would only cost
    memory.
    """
    operands = (weight, scale, shift)
    if any(t.is_inference() for t in operands):
        return kind(problem, *operands)
    state: list[Any] = [kind, problem, weight.stride(), weight.dtype]
    for t in operands:
        state += (t._version, t.data_ptr())
    state.append(fingerprint(table_of(ranges_of(operands))))
    owned = _owner.get()
    key, entries = id(weight), _cached if owned is None else owned
    entry = entries.get(key)
    unchanged = (
        entry is not None
        and entry[0]() is weight
        and entry[1] is scale
        and entry[2] is shift
        and entry[3] == state
        and not fsdp_in_use()
    )
    if unchanged and entry is not None and entry[4] is not None:
        return entry[4]
    conv = kind(problem, *operands)
    conv.is_cached = unchanged and cacheable(weight)
    alive: Callable[[], Any] = lambda: weight  # noqa: E731
    if owned is None:
        alive = weakref.ref(weight, lambda _: _cached.pop(key, None))
    entries[key] = (alive, scale, shift, state, conv if conv.is_cached else None)
    return conv


def forget(tensors: Iterable[Tensor]) -> None:
    """Drops the convolutions packed from weights among the tensors."""
    for t in tensors:
        _cached.pop(id(t), None)
