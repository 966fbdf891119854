"""Fused convolutions that PyTorch already carries: oneDNN's, on the CPU. Probed, never assumed.

oneDNN runs convolution, bias, a sum into its output and ReLU as one primitive, on weights packed
once into its own blocked layout. Batch normalisation is folded into weights and bias in float32.
Two properties of that primitive shape this file:

* Its ReLU turns NaN into 0, where PyTorch's keeps NaN. A fused convolution is therefore run only
  where no NaN can arise: with |x| <= B for all of x, every |output| and every partial sum is at
  most B * G + |bias|, G = max over output channels of the sum of |weight|. While such a bound is
  below the largest float, finite inputs give finite outputs, and the two ReLUs agree. `PackedConv`
  carries G, callers carry B (`max_abs` measures it), and past the limit they take another path.
* Its 16-bit float support depends on the processor; float16 is computed in float32, which is more
  accurate and, where there are no float16 instructions, far faster than PyTorch's own.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native

# Bounds are kept a factor of ten below the largest float32 (and bfloat16), 3.4e38, so that the
# rounding of the bound itself can never matter.
BOUND_LIMIT = 1e37


@functools.cache
def unavailable() -> str | None:
    """None when oneDNN's fused convolution works here, else the reason why not, in one line."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    try:
        return _probe(torch.float32)
    except Exception as error:  # any failure at all means: do not use it
        return f"oneDNN's fused convolution failed its probe: {str(error).splitlines()[0]}"


@functools.cache
def compute_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype in which convolutions of `dtype` tensors are computed; None: not served."""
    if dtype in (torch.float32, torch.float16):
        return torch.float32
    if dtype == torch.bfloat16:
        try:
            return torch.bfloat16 if _probe(torch.bfloat16) is None else torch.float32
        except Exception:  # a processor without bfloat16 instructions raises here
            return torch.float32
    return None


def _probe(dtype: torch.dtype) -> str | None:
    """Runs both fused ops on small integers, whose results are exact, and compares."""
    x = torch.arange(2 * 16 * 3 * 3, dtype=torch.float32).remainder(5).sub(2).view(2, 16, 3, 3)
    w = torch.arange(16 * 16, dtype=torch.float32).remainder(3).sub(1).view(16, 16, 1, 1)
    b = torch.arange(16, dtype=torch.float32).remainder(4).sub(2)
    x = x.contiguous(memory_format=torch.channels_last)
    want = torch.nn.functional.conv2d(x, w, b)
    conv = PackedConv(w, torch.ones(16), b, dtype, (1, 1), (0, 0), (1, 1), 1)
    got = conv.run(x.to(dtype), relu=True).float()
    if not torch.equal(got, want.relu()):
        return f"oneDNN's fused convolution gives wrong results in {dtype}"
    accumulated = conv.run_add_(x.to(dtype), x.to(dtype).clone(), relu=True).float()
    if not torch.equal(accumulated, (want + x).relu()):
        return f"oneDNN's fused convolution and addition gives wrong results in {dtype}"
    return None


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


def conv_output_shape(
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


class PackedConv:
    """One convolution with batch normalisation folded in and its weights in oneDNN's layout.

    y = relu(conv(x, weight * scale[k]) + shift[k] + residual)

    weight: (K, C/groups, R, S); scale, shift: (K,) float32. `dtype` is what the folded weights are
    rounded to (float32 or bfloat16); the bias stays float32, except where a residual is added, for
    which oneDNN's binding asks for a bias of the same dtype. `gain` is G of the bound above, inf
    where folding gave no finite number, so that no bound ever admits such a convolution.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        dtype: torch.dtype,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        folded = weight.detach().float() * scale.detach().float().view(-1, 1, 1, 1)
        self.bias = shift.detach().float().contiguous()
        self._add_bias = self.bias.to(dtype)
        gain = float(folded.abs().sum((1, 2, 3)).max()) * (1 + 2**-7)  # 2^-8: rounding to bfloat16
        bias_max = max_abs(self.bias)
        self.gain = gain if math.isfinite(gain) and math.isfinite(bias_max) else math.inf
        self.bias_max = bias_max if math.isfinite(bias_max) else math.inf
        self.dtype = dtype
        self.geometry = (list(padding), list(stride), list(dilation), groups)
        self.weight_shape = tuple(weight.shape)
        self._folded: Tensor | None = folded.to(dtype)
        self._packed: dict[tuple[bool, int, int], Tensor] = {}
        self._missed: tuple[bool, int, int] | None = None

    def bound(self, x_bound: float) -> float:
        """An upper bound for every |output| and partial sum, given one for |x|; NaN stays NaN."""
        return x_bound * self.gain + self.bias_max

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """(N, C, H, W) of x -> (N, K, P, Q); None where such an x does not fit, or is empty."""
        padding, stride, dilation, groups = self.geometry
        return conv_output_shape(shape, self.weight_shape, stride, padding, dilation, groups)

    def _weight(self, shape: torch.Size) -> Tensor:
        """The weights, packed for an input of this shape wherever that pays.

        oneDNN's best layout depends on height, width and on whether N is 1; a layout made for
        another size can cost fifty times the convolution itself. Layouts for two sizes are kept
        (say, single images and batches). A third size takes a place when it comes twice in a row;
        until then it runs on plain weights, at about the speed of PyTorch's own convolution.
        """
        key = (shape[0] == 1, shape[2], shape[3])
        packed = self._packed.get(key)
        if packed is not None:
            return packed
        plain = self._folded
        if plain is None:
            plain = next(iter(self._packed.values())).to_dense()
        if len(self._packed) == 2 and key != self._missed:
            self._missed = key
            return plain
        packed = torch.ops.mkldnn._reorder_convolution_weight(plain, *self.geometry, list(shape))
        # A new dict in one assignment: other threads see the old layouts or the new, never neither.
        newest = list(self._packed.items())[-1:]
        self._packed = dict([*newest, (key, packed)])
        self._folded = None
        return packed

    def run(self, x: Tensor, relu: bool) -> Tensor:
        """x: (N, C, H, W) channels_last of `dtype` -> (N, K, P, Q) channels_last."""
        padding, stride, dilation, groups = self.geometry
        return torch.ops.mkldnn._convolution_pointwise(
            x, self._weight(x.shape), self.bias, padding, stride, dilation, groups,
            "relu" if relu else "none", [], "",
        )  # fmt: skip

    def run_add_(self, x: Tensor, residual: Tensor, relu: bool) -> Tensor:
        """As `run`, added to residual (N, K, P, Q), channels_last, in its memory."""
        padding, stride, dilation, groups = self.geometry
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, x, self._weight(x.shape), self._add_bias, padding, stride, dilation, groups,
            "add", 1.0, "relu" if relu else None, [], None,
        )  # fmt: skip


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


# id(weight) -> its weak reference, stamp of the operands, geometry, and the packed convolution.
_kept: dict[int, tuple[weakref.ref[Tensor], Any, Any, PackedConv | None]] = {}


def packed(
    weight: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype, *geometry: Any
) -> PackedConv:
    """The packed convolution of these operands, kept while the weight lives.

    It is kept from the second call with the same operands on: in training the weights change at
    every step, and a copy nobody reads again would only cost memory.
    """
    # The weight itself is left to the weak reference: a stamp that held it would keep it alive.
    now = stamp((scale, shift))
    state = None if weight.is_inference() else (weight._version, weight.data_ptr(), dtype, geometry)
    key = id(weight)
    entry = _kept.get(key)
    again = (
        entry is not None
        and entry[0]() is weight
        and state is not None
        and entry[2] == state
        and same_stamp(entry[1], now)
    )
    if again and entry is not None and entry[3] is not None:
        return entry[3]
    conv = PackedConv(weight, scale, shift, dtype, *geometry)
    if now is not None and state is not None:
        alive = weakref.ref(weight, lambda _: _kept.pop(key, None))
        _kept[key] = (alive, now, state, conv if again else None)
    return conv
