"""Convolutions made ready once: weights packed, batch normalisation, residual and ReLU inside.

    y = relu(conv(x, weight) * scale[k] + shift[k] + residual)

`FusedConv` is what `native_conv` (this package's kernel), `vendor` (oneDNN's) and `gpu_conv` (all
of a GPU's) have in common;
`kept` holds on to packed weights while the tensors they were made from stay as they were.
"""

from __future__ import annotations

import contextlib
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import native

# Bounds are kept a factor of ten below the largest float32 (and bfloat16), 3.4e38, so that the
# rounding of the bound itself can never matter.
BOUND_LIMIT = 1e37


def max_abs(x: Tensor) -> float:
    """The largest |x| over a tensor of any shape; NaN when x holds a NaN, 0 when it is empty."""
    if x.numel() == 0:
        return 0.0
    if native.load() is None and (
        x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    ):
        return torch.ops.fused_resnet_native.abs_max(x)
    low, high = map(float, torch.aminmax(x))
    return math.nan if math.isnan(low) or math.isnan(high) else max(-low, high)


def output_shape(
    shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, ...] | None:
    """(N, C, H, W) -> (N, K, P, Q) of a convolution; None where such an x does not fit."""
    if len(shape) != 4 or shape[1] != weight_shape[1] * groups or 0 in shape:
        return None
    sizes = tuple(
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            shape[2:], weight_shape[2:], stride, padding, dilation, strict=True
        )
    )
    return None if min(sizes) < 1 else (shape[0], weight_shape[0], *sizes)


class FusedConv:
    """One convolution with batch normalisation folded in and its weights packed in `dtype`.

    weight: (K, C/groups, R, S); scale, shift: (K,). With |x| <= B for all of x, every |output| and
    every partial sum is at most B * gain + shift_max; gain = max over k of |scale[k]| times the sum
    of |weight[k]|, inf where that is no finite number. Where `needs_bound`, the result is stock's
    only while such a bound is finite.
    """

    needs_bound = False
    # Whether `run` takes x of any layout and floating dtype, rather than channels_last of `dtype`.
    takes_any = False

    gain, shift_max = math.inf, math.inf
    lasting = False  # whether somebody keeps it for later calls

    def __init__(
        self,
        weight_shape: Sequence[int],
        dtype: torch.dtype,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        self.dtype = dtype
        self.stride, self.padding, self.dilation = list(stride), list(padding), list(dilation)
        self.groups = groups
        self.weight_shape = tuple(weight_shape)

    def measure_gain(self, weight: Tensor, scale: Tensor, shift: Tensor) -> None:
        """weight (K, C/groups, R, S), scale, shift (K,) -> gain and shift_max."""
        sums = weight.detach().float().abs().sum((1, 2, 3)) * scale.detach().float().abs()
        gain = float(sums.max()) * (1 + 2**-7)  # 2^-8: rounding to bfloat16
        shift_max = max_abs(shift.detach().float().contiguous())
        finite = math.isfinite(gain) and math.isfinite(shift_max)
        if finite:
            self.gain, self.shift_max = gain, shift_max

    def bound(self, x_bound: float) -> float:
        """An upper bound for every |output| and partial sum, given one for |x|; NaN stays NaN."""
        return x_bound * self.gain + self.shift_max

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """(N, C, H, W) of x -> (N, K, P, Q); None where such an x does not fit, or is empty."""
        return output_shape(
            shape, self.weight_shape, self.stride, self.padding, self.dilation, self.groups
        )

    def run(
        self, x: Tensor, residual: Tensor | None, relu: bool, overwrite: bool = False
    ) -> Tensor:
        """x: (N, C, H, W), residual: None or (N, K, P, Q), both channels_last of `dtype` ->
        (N, K, P, Q) channels_last; in the residual's memory where `overwrite` allows that."""
        raise NotImplementedError


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


# A class of `FusedConv`, made of weight, scale, shift, dtype, stride, padding, dilation, groups.
Kind = Callable[..., FusedConv]

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
