"""PyTorch's fused oneDNN convolutions on the CPU, which are probed before use.

oneDNN runs convolution, bias, a sum into its output and ReLU as one primitive, on weights packed
once into its own blocked layout. Batch normalisation is folded into weights and bias in float32.
Two properties of that primitive determine this implementation:

* Its ReLU turns NaN into 0, while PyTorch's keeps NaN. A fused convolution therefore runs only if
  no NaN can arise: with |x| <= B for all of x, every |output| and every partial sum is at most
  B * G + |bias|, G = max over output channels of the sum of |weight|. While that bound is below the
  largest float, finite inputs give finite outputs, and the two ReLUs agree. `PackedConv` stores G;
  callers measure B with `max_abs` and use another implementation beyond the limit.
* Its 16-bit float support depends on the processor: see `supports`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_resnet.kernels.convolution import FusedConv


@functools.cache
def unavailable() -> str | None:
    """None if oneDNN's fused convolution works, else the reason in one line."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    try:
        return _probe(torch.float32)
    except Exception as error:  # treat any failure as unavailable
        return f"oneDNN's fused convolution failed its probe: {str(error).splitlines()[0]}"


@functools.cache
def supports(dtype: torch.dtype) -> bool:
    """Whether oneDNN supports convolutions in `dtype` on this processor."""
    try:
        return dtype in (torch.float32, torch.bfloat16) and _probe(dtype) is None
    except Exception:  # a processor without bfloat16 instructions raises here
        return False


def _probe(dtype: torch.dtype) -> str | None:
    """Compares both fused ops with PyTorch on small integers, whose results are exact."""
    x = torch.arange(2 * 16 * 3 * 3, dtype=torch.float32).remainder(5).sub(2).view(2, 16, 3, 3)
    w = torch.arange(16 * 16, dtype=torch.float32).remainder(3).sub(1).view(16, 16, 1, 1)
    b = torch.arange(16, dtype=torch.float32).remainder(4).sub(2)
    x = x.contiguous(memory_format=torch.channels_last)
    expected = torch.nn.functional.conv2d(x, w, b)
    conv = PackedConv(w, torch.ones(16), b, dtype, (1, 1), (0, 0), (1, 1), 1)
    result = conv.run(x.to(dtype), None, relu=True).float()
    if not torch.equal(result, expected.relu()):
        return f"oneDNN's fused convolution gives wrong results in {dtype}"
    accumulated = conv.run(x.to(dtype), x.to(dtype), relu=True).float()
    if not torch.equal(accumulated, (expected + x).relu()):
        return f"oneDNN's fused convolution and addition gives wrong results in {dtype}"
    return None


class PackedConv(FusedConv):
    """One convolution with folded batch normalisation and its weights in oneDNN's layout.

    The folded weights are rounded to `dtype` (float32 or bfloat16). The bias stays float32, except
    when a residual is added, for which oneDNN's binding requires a bias of the same dtype.
    """

    needs_bound = True

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
        super().__init__(weight.shape, dtype, stride, padding, dilation, groups)
        self.measure_gain(weight, scale, shift)
        folded = weight.detach().float() * scale.detach().float().view(-1, 1, 1, 1)
        self._bias = shift.detach().float().contiguous()
        self._add_bias = self._bias.to(dtype)
        self._geometry = (self.padding, self.stride, self.dilation, groups)
        self._folded: Tensor | None = folded.to(dtype)
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
        packed = torch.ops.mkldnn._reorder_convolution_weight(plain, *self._geometry, list(shape))
        # Replace the dict in one assignment, so that other threads see either the old or the new.
        newest = list(self._packed.items())[-1:]
        self._packed = dict([*newest, (key, packed)])
        self._folded = None
        return packed

    def run(
        self, x: Tensor, residual: Tensor | None, relu: bool, overwrite: bool = False
    ) -> Tensor:
        padding, stride, dilation, groups = self._geometry
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, self._weight(x.shape), self._bias, padding, stride, dilation, groups,
                "relu" if relu else "none", [], "",
            )  # fmt: skip
        # Adding in place, even with the copy, is faster than oneDNN's out-of-place sum.
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual if overwrite else residual.clone(), x, self._weight(x.shape), self._add_bias,
            padding, stride, dilation, groups, "add", 1.0, "relu" if relu else None, [], None,
        )  # fmt: skip
