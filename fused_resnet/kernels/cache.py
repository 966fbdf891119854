"""Caches packed convolutions while the tensors they were packed from are unchanged."""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
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


# id(weight) -> references to it and to the other operands, the state of all, and the convolution.
Entries = dict[int, tuple[tuple[Callable[[], Any], ...], Any, FusedConv | None]]
# With weak references, also to the other operands: a parameter's hooks may lead to the weight.
_cached: Entries = {}
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
    kind: Kind,
    problem: Problem,
    weight: Tensor,
    vectors: Sequence[Tensor | None],
    fold: Callable[..., tuple[Tensor, Tensor]],
    *constants: Any,
) -> FusedConv:
    """The convolution of these operands by `kind`, whose scale and shift are fold(*vectors,
    *constants); cached while the weight lives and all operands are unchanged. `fold` computes from
    its arguments alone, and is called to pack only.

    Compared are identity, version counter, address and values (see fingerprint.py): an optimizer
    step, load_state_dict (also with assign=True), .to(), .half() and every in-place edit changes at
    least one. A tensor created in inference mode has no version counter, so nothing is cached then;
    nor if FSDP2 may have changed the weight unnoticed. Cached from the second call with the same
    operands: in training the weights change at every step, and an unused copy would only cost
    memory.
    """
    operands = [weight, *(t for t in vectors if t is not None)]
    if any([t.is_inference() for t in operands]):
        return kind(problem, weight, *fold(*vectors, *constants))
    state: list[Any] = [kind, problem, fold, constants, [t is None for t in vectors]]
    for t in operands:
        state += (t._version, t.data_ptr(), t.stride(), t.dtype)
    state.append(fingerprint(table_of(ranges_of(operands))))
    owned = _owner.get()
    key, entries = id(weight), _cached if owned is None else owned
    entry = entries.get(key)
    unchanged = (
        entry is not None
        and entry[1] == state
        and all([ref() is t for ref, t in zip(entry[0], operands, strict=True)])
        and not fsdp_in_use()
    )
    if unchanged and entry is not None and entry[2] is not None:
        return entry[2]
    conv = kind(problem, weight, *fold(*vectors, *constants))
    conv.is_cached = unchanged and cacheable(weight)
    alive: tuple[Callable[[], Any], ...] = tuple([functools.partial(_same, t) for t in operands])
    if owned is None:
        weak = weakref.ref(weight, lambda _: _cached.pop(key, None))
        alive = (weak, *[weakref.ref(t) for t in operands[1:]])
    entries[key] = (alive, state, conv if conv.is_cached else None)
    return conv


def _same(t: Tensor) -> Tensor:
    return t


def forget(tensors: Iterable[Tensor]) -> None:
    """Drops the convolutions packed from weights among the tensors."""
    for t in tensors:
        _cached.pop(id(t), None)
