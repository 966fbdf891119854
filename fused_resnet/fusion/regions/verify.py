"""The first call of a program is compared with the module's own: what a trace got wrong, such as a
branch that a tensor would have taken otherwise, shows there and not in results."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .state import Untouched

# Of the largest value of a result. Fused sums have another order, and 16-bit ones fewer roundings:
# between two right results 2e-5 and 0.1 were seen in untrained networks of 50 layers.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
_TOLERANCE_16_BIT = 0.3

UNCERTAIN = "a buffer changed during the first call"

_state = threading.local()


def is_running() -> bool:
    """Whether this thread is in a module's own call, in which nothing shall be fused."""
    return bool(getattr(_state, "running", False))


def compared(
    module: nn.Module, own: Callable[[], Any], fused: Callable[[], Any], tensors: Sequence[Tensor]
) -> tuple[Any, str | None]:
    """The result of `fused`, and None; or that of `own` and how `fused` differs. What both change
    (buffers, attributes, random state) is changed once. In eval no buffer is written here, since
    another thread may be loading it: if one changed meanwhile, the answer is that of `own` and
    UNCERTAIN."""
    training = any(m.training for m in module.modules())
    untouched = Untouched(list(module.modules()))
    before = [(b, b.clone()) for b in module.buffers()]
    versions = _versions(tensors)
    want = _alone(own)
    if _versions(tensors) != versions:
        return want, "its forward writes to an argument"
    if not training and not _unchanged(before):
        return want, UNCERTAIN
    after = [b.clone() for b, _ in before]
    if training:
        _restore(before)
    untouched.restored()
    try:
        found = fused()
        why = _difference(found, want)
    except Exception as error:
        why = f"fused, it raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if why is None and not _same_buffers(module, dict(zip(module.buffers(), after, strict=True))):
        why = "fused, it updates its buffers otherwise"
    if why is None:
        return found, None
    if not training and not _unchanged(before):
        return want, UNCERTAIN
    # Once more: the first result's graph may have saved buffers, which were restored since.
    if training:
        _restore(before)
    untouched.restored()
    return _alone(own), why


def _alone(own: Callable[[], Any]) -> Any:
    """The module's own call, with nothing in it fused."""
    _state.running = True
    try:
        return own()
    finally:
        _state.running = False


def _unchanged(before: Sequence[tuple[Tensor, Tensor]]) -> bool:
    return all(bool(((b == was) | (b.isnan() & was.isnan())).all()) for b, was in before)


def _restore(before: Sequence[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for b, was in before:
            if not torch.equal(b, was):
                b.copy_(was)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]


def _difference(found: Any, want: Any) -> str | None:
    leaves, spec = pytree.tree_flatten(found)
    wanted, wanted_spec = pytree.tree_flatten(want)
    if spec != wanted_spec or type(found) is not type(want):
        return "fused, its result has another structure"
    for a, b in zip(leaves, wanted, strict=True):
        if not isinstance(b, Tensor):
            if type(a) is not type(b) or a != b:
                return "fused, its result has another constant"
            continue
        if not isinstance(a, Tensor) or (a.shape, a.dtype, a.device) != (
            b.shape,
            b.dtype,
            b.device,
        ):
            return "fused, its result has another shape or dtype"
        if a.stride() != b.stride() or a.requires_grad != b.requires_grad:
            return "fused, its result has other strides, or other gradients"
        if not _close(a, b):
            return "fused, its result has other values"
    if len({*map(id, leaves)}) != len({*map(id, wanted)}):
        return "its result holds one tensor twice"
    return None


def _same_buffers(module: nn.Module, after: dict[Tensor, Tensor]) -> bool:
    """Whether the buffers are those after the module's own call. A mean that is zero but for
    rounding is compared with the deviation."""
    for m in module.modules():
        mine = [b for b in m.buffers(recurse=False) if b.is_floating_point() and b.numel()]
        size = max([float(b.abs().max()) for b in mine], default=0.0) ** 0.5
        if not all(_close(b, after[b], 0.1 * size) for b in m.buffers(recurse=False)):
            return False
    return True


def _close(a: Tensor, b: Tensor, least: float = 1e-6) -> bool:
    """least: of the values' size."""
    if not b.is_floating_point():
        return torch.equal(a, b)
    if b.numel() == 0:
        return True
    most = _TOLERANCE.get(b.dtype, _TOLERANCE_16_BIT)
    a, b = a.detach(), b.detach()
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()):
        return False
    a, b = a[finite].double(), b[finite].double()
    if b.numel() == 0:
        return True
    return bool((a - b).abs().max() <= most * max(float(b.abs().max()), least))
