"""Packed convolutions cached while the tensors they were made from stay unchanged."""

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

_noted: ContextVar[list[FusedConv] | None] = ContextVar("fused_resnet_noted", default=None)


@contextlib.contextmanager
def noting() -> Iterator[list[FusedConv]]:
    """Collects the convolutions that run on a GPU in this thread: a CUDA graph keeps addresses of
    their weights, not the weights."""
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
    """Whether work on t's device goes into a CUDA graph now, instead of being done."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def keepable(t: Tensor) -> bool:
    """Whether what was just made on t's device may be kept for later calls.

    Not while a CUDA graph records: its memory is the graph's. Else it is waited for, since a later
    call may be on another stream, where nobody knows that there is something to wait for.
    """
    if capturing(t):
        return False
    if t.is_cuda:
        torch.cuda.current_stream(t.device).synchronize()
    return True


def fsdp_is_there() -> bool:
    """Whether FSDP2 shares out the parameters of some living module of this process.

    It puts a parameter together in the same tensor for every forward, without a trace in its
    version counter and often at the same address; and the tensor itself does not tell whose it is.
    """
    composable = sys.modules.get("torch.distributed._composable_state")
    return bool(getattr(composable, "_module_state_mapping", None))


def _move_versions(optimizer: Any, *_: Any) -> None:
    """PyTorch's fused optimizers (SGD, Adam, ... with fused=True) write parameters without moving
    their version counters, by which everything here is told apart from what it was."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            written = [p for p in group["params"] if p.grad is not None and not p.is_inference()]
            torch.autograd.graph.increment_version(written)


register_optimizer_step_post_hook(_move_versions)


def stamp(tensors: Iterable[Tensor | None]) -> list[tuple[Tensor | None, int, int]] | None:
    """What must be unchanged for something made from these tensors to be still good.

    Identity, version counter and address: an optimizer step, load_state_dict (assign=True too),
    .to(), .half() and every in-place edit changes at least one. None where one of the tensors has
    no version counter (it was made in inference mode), so that nothing can be kept.
    """
    tensors = list(tensors)
    if any(t is not None and t.is_inference() for t in tensors):
        return None
    return [(t, 0, 0) if t is None else (t, t._version, t.data_ptr()) for t in tensors]


def same_stamp(old: Any, new: Any) -> bool:
    """Whether two stamps are of the same tensors in the same state."""
    return (
        old is not None
        and new is not None
        and all(a is b and m == n and p == q for (a, m, p), (b, n, q) in zip(old, new, strict=True))
    )


# id(weight) -> its weak reference, stamp of the operands, kind and geometry, and the convolution.
_kept: dict[int, tuple[weakref.ref[Tensor], Any, Any, FusedConv | None]] = {}


def kept(
    kind: Kind,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    dtype: torch.dtype,
    *geometry: Any,
) -> FusedConv:
    """The convolution of these operands by `kind`, kept while the weight lives.

    It is kept from the second call with the same operands on: in training the weights change at
    every step, and a copy nobody reads again would only cost memory. Not where FSDP2 may have
    changed the weight unnoticed.
    """
    # The weight itself is left to the weak reference: a stamp that held it would keep it alive.
    now = stamp((scale, shift))
    state = None
    if not weight.is_inference():
        state = (weight._version, weight.data_ptr(), kind, dtype, geometry)
    key = id(weight)
    entry = _kept.get(key)
    again = (
        entry is not None
        and entry[0]() is weight
        and state is not None
        and entry[2] == state
        and same_stamp(entry[1], now)
        and not fsdp_is_there()
    )
    if again and entry is not None and entry[3] is not None:
        return entry[3]
    conv = kind(weight, scale, shift, dtype, *geometry)
    if now is not None and state is not None:
        alive = weakref.ref(weight, lambda _: _kept.pop(key, None))
        conv.lasting = again and keepable(weight)
        _kept[key] = (alive, now, state, conv if conv.lasting else None)
    return conv
