"""Parameters whose memory is given back to the system, because what was packed from them holds the
same bits, until somebody reads them.

A released parameter stays the same object with its place in modules and optimizers, its shape,
gradient and hooks; its storage is empty and its class is `Released`, by which every function of
PyTorch comes here first. The first that needs its values brings them back, and its class with them,
as the lazy parameters of torch.nn.parameter change theirs. Code in C++ that reads the memory
without asking gets PyTorch's error that the data is not allocated.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fused_resnet.kernels.convolution import Pairs

_PAIRS = "_fused_resnet_pairs"  # a released parameter's attribute: Tensor -> Pairs
_BITS = {2: torch.int16, 4: torch.int32}
_NEW_PARAMETER = nn.Parameter.__new__.__code__
_lock = threading.RLock()


def _new_lock() -> None:
    """A thread of the parent process may have held the lock at the fork."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_new_lock)


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Whatever calls: no modes, transforms, tracing, gradients or classes with functions of their
    own."""
    with contextlib.ExitStack() as stack:
        set_tracing_state: Any = getattr(torch._C, "_set_tracing_state")  # noqa: B009
        stack.callback(set_tracing_state, torch._C._get_tracing_state())
        set_tracing_state(None)
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C._DisableFuncTorch())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


class Released(nn.Parameter):
    """A parameter without its memory; see the module's docstring."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _WITHOUT_VALUES and _restore_in((args, kwargs)):
            found = func(*args, **(kwargs or {}))
            # nn.Parameter(p) has looked at p's class before, and compares that which p has now with
            # the class of p.detach().
            by_parameter = func == Tensor.detach and sys._getframe(1).f_code is _NEW_PARAMETER
            return nn.Parameter(found) if by_parameter else found
        # Or another thread has restored it meanwhile.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        restore(self)
        return nn.Parameter.__deepcopy__(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        restore(self)
        return nn.Parameter.__reduce_ex__(self, protocol)


def _getters(*names: str) -> list[Any]:
    return [getattr(Tensor, name).__get__ for name in names]


def _setter(name: str) -> Any:
    return getattr(Tensor, name).__set__


# What needs no values; `requires_grad` is set by those who freeze a model.
_WITHOUT_VALUES = frozenset([
    *_getters(
        "shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad", "is_leaf", "grad_fn",
        "_version", "is_cpu", "is_cuda", "is_meta", "is_sparse", "is_nested", "is_quantized",
        "is_mkldnn", "itemsize", "nbytes", "_backward_hooks",
    ),
    _setter("requires_grad"), Tensor.requires_grad_, Tensor.size, Tensor.stride, Tensor.dim,
    Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.storage_offset, Tensor.__len__,
    Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_inference,
    Tensor.get_device, torch.numel, torch.is_floating_point, torch.is_complex,
])  # fmt: skip


def _restore_in(value: Any) -> int:
    """Restores all released parameters in the arguments of a function; returns their number."""
    if type(value) is Released:
        restore(value)
        return 1
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple, set)):
        return 0
    return sum(map(_restore_in, value))


# What torch.compiler.disable sets; that also imports Dynamo. A graph that would read a released
# parameter is interrupted, and traced anew at the next call.
_restore_in._torchdynamo_disable = True  # type: ignore[attr-defined]


def _is_released(p: Any) -> bool:
    return type(p) is Released


def restore(p: Any) -> None:
    """Brings the values of a released parameter back; nothing happens to any other.

    If memory is short it raises, and the parameter stays released."""
    if not _is_released(p):
        return
    with _lock:
        if not _is_released(p):  # another thread was here first
            return
        with _plainly():
            p.untyped_storage().resize_(p.numel() * p.element_size())
            for part, packed in p.__dict__[_PAIRS](p.data):
                part.copy_(packed)
        p.__class__ = nn.Parameter
        del p.__dict__[_PAIRS]


def restore_all(parameters: Iterable[Any]) -> None:
    for p in parameters:
        if type(p) is Released:
            restore(p)


def _reason_against(p: nn.Parameter, storage: torch.UntypedStorage) -> str | None:
    """Why the parameter's memory is not its own alone."""
    if storage.is_shared():
        return "its memory is shared with other processes"
    if not storage.resizable():
        return "its memory is not PyTorch's: mapped from a file, or NumPy's"
    if storage.nbytes() != p.numel() * p.element_size() or p.numel() == 0:
        return "it is a part of a larger buffer"
    return None


def _held(p: nn.Parameter, storage: torch.UntypedStorage, aliases: int) -> bool:
    """Whether others hold the memory: views, tensors that share it, graphs of autograd,
    TorchScript."""
    known = 2 + aliases  # the parameter and `storage`
    return p._use_count() != 1 or torch._C._storage_Use_Count(storage._cdata) != known


def _same_bits(pairs: Pairs) -> bool:
    return all(
        torch.equal(part.view(_BITS[part.element_size()]), packed.view(_BITS[part.element_size()]))
        for part, packed in pairs
    )


def release(
    p: Any, pairs: Callable[[Tensor], Pairs], aliases: int = 0
) -> torch.UntypedStorage | str:
    """Takes the memory away from a parameter and returns it, to be used for something else or
    dropped; or says why that cannot be done, and changes nothing.

    pairs: of the parameter and what was packed from it, which it keeps alive; the values are
    compared bit for bit first. aliases: how many tensors of the caller share the memory, which may
    not be read afterwards. No other thread may be reading the parameter."""
    if type(p) is not nn.Parameter:
        return f"it is a {type(p).__name__}"
    with _lock:
        storage = p.untyped_storage()
        reason = _reason_against(p, storage)
        if reason is not None:
            return reason
        # From now on, who reads it waits for the lock, then restores it.
        p.__dict__[_PAIRS] = pairs
        p.__class__ = Released
        done = False
        try:
            with _plainly():
                if _held(p, storage, aliases):
                    return "its memory is held elsewhere too: by a view, a state_dict or a graph"
                if not _same_bits(pairs(p.data)):
                    return "what was packed from it has other bits"
                empty = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device)
                empty.untyped_storage().resize_(0)
                p.data, done = empty, True
        finally:
            if not done:
                p.__class__ = nn.Parameter
                del p.__dict__[_PAIRS]
    return storage


def packed_elsewhere(p: Any, pairs: Callable[[Tensor], Pairs]) -> None:
    """From now on a released parameter keeps other packed weights, of the same values."""
    with _lock:
        if type(p) is Released:
            p.__dict__[_PAIRS] = pairs
