"""PyTorch's fused oneDNN convolutions on the CPU, which are probed before use.

oneDNN runs convolution, bias, a sum into its output and ReLU as one primitive, on weights packed
once into its own blocked layout. Batch normalisation is folded into weights and bias in float32.
Two properties of that primitive determine this implementation:

* Its ReLU turns NaN into 0, while PyTorch's keeps NaN. A convolution with ReLU therefore runs only
  if no NaN can arise: with |x| <= B and |residual| <= D, every |output| and every partial sum is at
  most B * G + max |shift| + D, G = max over k of |scale[k]| * sum |weight[k]|. While that bound is
  below the largest float, finite inputs give finite outputs, and the two ReLUs agree. Beyond it
  `PackedConv` runs PyTorch's separate operations. B and D are measured, or known: the bound of an
  output is stored with it for the convolution that reads it next.
* Its 16-bit float support depends on the processor: see `supports`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fused_resnet.kernels import native
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.convolution import FusedConv
from fused_resnet.kernels.problem import Problem, convolution

# A factor of ten below the largest float32 and bfloat16, 3.4e38, so that the rounding of the bound
# itself does not matter.
_LIMIT = 1e37
_NAMES = {Activation.NONE: None, Activation.RELU: "relu"}
# The attribute of an output of `PackedConv` that holds (upper bound of |output|, version counter).
_BOUND = "_fused_resnet_bound"


def max_abs(x: Tensor) -> float:
    """The largest |x| of a tensor of any shape; NaN if x contains a NaN, 0 if it is empty."""
    if x.numel() == 0:
        return 0.0
    if native.load() is None and (
        x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    ):
        return torch.ops.fused_resnet_native.abs_max(x)
    low, high = map(float, torch.aminmax(x))
    return math.nan if math.isnan(low) or math.isnan(high) else max(-low, high)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _store_bound(y: Tensor, bound: float) -> None:
    setattr(y, _BOUND, (bound, _version(y)))


def _has_bound(x: Tensor) -> bool:
    return getattr(x, _BOUND, (math.nan, None))[1] == _version(x)


def _bound_of(x: Tensor, measure: bool) -> float:
    """An upper bound of |x|, measured if there is none stored or if `measure`; NaN for NaN."""
    bound, version = getattr(x, _BOUND, (math.nan, None))
    if not measure and _has_bound(x):
        return bound
    bound = max_abs(x)
    if version is not None:  # an output of `PackedConv`, not a tensor of the caller's
        _store_bound(x, bound)
    return bound


def supports(problem: Problem) -> str | None:
    """None if oneDNN's fused convolution works in the problem's dtype, else the reason in one
    line."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    if problem.dtype not in (None, torch.float32, torch.bfloat16):
        return f"oneDNN's fused convolution does not compute {str(problem.dtype)[6:]}"
    reason = _failure(torch.float32)
    return reason if problem.dtype in (None, torch.float32) else reason or _failure(torch.bfloat16)


@functools.cache
def _failure(dtype: torch.dtype) -> str | None:
    """None if convolutions in `dtype` work on this processor, else the reason in one line."""
    try:
        return _probe(dtype)
    except Exception as error:  # a processor without bfloat16 instructions raises here
        return f"oneDNN's fused convolution failed its probe: {str(error).splitlines()[0]}"


def _probe(dtype: torch.dtype) -> str | None:
    """Compares both fused ops with PyTorch on small integers, whose results are exact."""
    on_cpu: Any = {"dtype": torch.float32, "device": "cpu"}
    x = torch.arange(2 * 16 * 3 * 3, **on_cpu).remainder(5).sub(2).view(2, 16, 3, 3)
    w = torch.arange(16 * 16, **on_cpu).remainder(3).sub(1).view(16, 16, 1, 1)
    b = torch.arange(16, **on_cpu).remainder(4).sub(2)
    x = x.contiguous(memory_format=torch.channels_last)
    expected = torch.nn.functional.conv2d(x, w, b)
    problem = convolution(w.shape, dtype, (1, 1), (0, 0), (1, 1), 1)
    conv = PackedConv(problem, w, torch.ones(16, **on_cpu), b)
    result = conv.run(x.to(dtype), None, Activation.RELU).float()
    if not torch.equal(result, expected.relu()):
        return f"oneDNN's fused convolution gives wrong results in {dtype}"
    accumulated = conv.run(x.to(dtype), x.to(dtype), Activation.RELU).float()
    if not torch.equal(accumulated, (expected + x).relu()):
        return f"oneDNN's fused convolution and addition gives wrong results in {dtype}"
    return None


@functools.cache
def linear_reason() -> str | None:
    """None if `linear` works on this processor, else the reason in one line."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    on_cpu: Any = {"dtype": torch.float32, "device": "cpu"}
    x = torch.arange(5 * 7, **on_cpu).remainder(5).sub(2).view(5, 7)
    w, b = torch.arange(21, **on_cpu).remainder(3).sub(1).view(3, 7), torch.arange(3, **on_cpu)
    try:
        same = torch.equal(linear(x, w, b), x @ w.t() + b)
    except Exception as error:
        return f"oneDNN's linear layer failed its probe: {str(error).splitlines()[0]}"
    return None if same else "oneDNN's linear layer gives wrong results"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias in float32, for x (..., C), weight (K, C), bias (K,): y (..., K).

    torch.nn.functional.linear asks MKL for float32, which is slow on processors that are not
    Intel's: on a Zen 5, oneDNN takes 0.36 (4 x 25,088 by 4,096) to 0.66 (1,000 x 1,024 by 91) of
    its time, from 2^21 products on."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class PackedConv(FusedConv):
    """One convolution with folded batch normalisation and its weights in oneDNN's layout.

    The folded weights are rounded to `dtype` (float32 or bfloat16). The bias stays float32, except
    when a residual is added, for which oneDNN's binding requires a bias of the same dtype.

    A stored bound is valid until the output is written to, which its version counter shows except
    in inference mode and for writes through `.data` or NumPy. So `run`'s callers never pass an
    output on to the user itself, but `detach()` it: the new tensor has no bound.
    """

    def __init__(self, problem: Problem, weight: Tensor, scale: Tensor, shift: Tensor) -> None:
        super().__init__(problem, weight, scale, shift)
        # For the unfused operations: no copies if `weight` is a parameter.
        self._original = weight.detach()
        self._scale = scale.detach().float()
        self._bias = shift.detach().float().contiguous()
        sums = self._original.float().abs().sum((1, 2, 3)) * self._scale.abs()
        self._gain = float(sums.max()) * (1 + 2**-7)  # 2^-8: rounding to bfloat16
        self._shift_max = max_abs(self._bias)
        folded = self._original.float() * self._scale.view(-1, 1, 1, 1)
        self._add_bias = self._bias.to(self.dtype)
        self._folded: Tensor | None = folded.to(self.dtype)
        self._packed: dict[tuple[bool, int, int], Tensor] = {}
        self._missed: tuple[bool, int, int] | None = None

    def _weight(self, shape: torch.Size) -> Tensor:
        """The weights, packed for an input of this shape where that pays.

        oneDNN's best layout depends on height, width and on whether N is 1; a layout for another
        size can cost fifty times the convolution itself. Layouts for two sizes are cached, e.g. for
        single images and batches. A third size replaces one of them when it occurs twice in a row;
        until then it uses plain weights, at about the speed of PyTorch's own convolution.
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
        stride, padding, dilation, groups = self.geometry
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            plain, padding, stride, dilation, groups, list(shape)
        )
        # Replace the dict in one assignment, so that other threads see either the old or the new.
        newest = list(self._packed.items())[-1:]
        self._packed = dict([*newest, (key, packed)])
        self._folded = None
        return packed

    def _bound(self, x: Tensor, residual: Tensor | None, measure: bool) -> float:
        """An upper bound of every |output| and partial sum; NaN or inf if there is none."""
        bound = _bound_of(x, measure) * self._gain + self._shift_max
        return bound if residual is None else bound + _bound_of(residual, measure)

    def run(
        self, x: Tensor, residual: Tensor | None, activation: Activation, overwrite: bool = False
    ) -> Tensor:
        # Without ReLU a bound serves only who reads the output: it is not worth measuring x.
        operands = (x,) if residual is None else (x, residual)
        if activation is Activation.NONE and not all(map(_has_bound, operands)):
            y = self._fused(x, residual, activation, overwrite)
            vars(y).pop(_BOUND, None)  # that of an overwritten residual
            return y
        bound = self._bound(x, residual, False)
        if not bound <= _LIMIT:  # not >, so that NaN fails
            # Stored bounds exceed the values more with every convolution.
            bound = self._bound(x, residual, True)
        if not bound <= _LIMIT:
            return self._unfused(x, residual, activation)
        y = self._fused(x, residual, activation, overwrite)
        _store_bound(y, bound)
        return y

    def _unfused(self, x: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
        """`run` by separate operations in float32, rounded once; they keep NaN."""
        weight = self._original.to(self.dtype).float()
        y = torch.conv2d(x.float(), weight, None, *self.geometry)
        y = y * self._scale.view(1, -1, 1, 1) + self._bias.view(1, -1, 1, 1)
        y = y if residual is None else y + residual.float()
        y = activation(y).to(self.dtype)
        return y.contiguous(memory_format=torch.channels_last)

    def _fused(
        self, x: Tensor, residual: Tensor | None, activation: Activation, overwrite: bool
    ) -> Tensor:
        stride, padding, dilation, groups = self.geometry
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, self._weight(x.shape), self._bias, padding, stride, dilation, groups,
                _NAMES[activation] or "none", [], "",
            )  # fmt: skip
        # Adding in place, even with the copy, is faster than oneDNN's out-of-place sum.
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual if overwrite else residual.clone(), x, self._weight(x.shape), self._add_bias,
            padding, stride, dilation, groups, "add", 1.0, _NAMES[activation], [], None,
        )  # fmt: skip
