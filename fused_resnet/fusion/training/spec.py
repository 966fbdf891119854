"""The description of a block's training step without its tensors, and its formula.

A block is a chain of convolutions with norm and ReLU after each, or before each (norm_first: He et
al. 2016, "Identity Mappings in Deep Residual Networks", 1603.05027):

    y = relu(norm_n(conv_n(... relu(norm_1(conv_1(x))))) + shortcut(x))
    y = conv_n(relu(norm_n(... conv_1(relu(norm_1(x)))))) + shortcut

A stem is the first with one convolution, no shortcut, and max pooling at its end. z[j] is the input
of norm j and h[j] the output of its ReLU, so that the last h of the first kind is y."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fused_resnet import layout
from fused_resnet.kernels.training.native import in_layout
from fused_resnet.kernels.training.protocol import Geometry, Norm, Passes
from fused_resnet.layers.shortcut import PadShortcut
from fused_resnet.ops.library import differentiable_gradients


class Spec(NamedTuple):
    """A block without its tensors. geometries: one per convolution, the shortcut's last; eps and
    groups: one per norm. shortcut: "identity", "projection" (one more convolution, with a norm
    unless norm_first), "pad" (a PadShortcut of `stride`) or "none"."""

    kernels: Passes
    geometries: tuple[Geometry, ...]
    eps: tuple[float, ...]
    shortcut: str
    level: str
    dtype: torch.dtype  # of the activations
    groups: tuple[Any, ...]  # the norms' process groups; None if not synchronised
    stride: int = 1  # of a PadShortcut
    shared: bool = False  # norm_first: the shortcut reads the first ReLU's output, not x
    norm_first: bool = False
    window: list[int] | None = None  # of max pooling: kernel, stride, padding, (height, width) each

    @property
    def main(self) -> int:
        """The number of convolutions of the residual branch."""
        return len(self.geometries) - (self.shortcut == "projection")

    def norm_before(self, i: int) -> int | None:
        """The norm whose ReLU's output convolution i reads; None: it reads x."""
        if i == self.main:
            return 0 if self.shared else None
        if self.norm_first:
            return i
        return i - 1 if i else None

    def conv_before(self, j: int) -> int:
        """The convolution that computes z[j]; z[0] of norm_first is x."""
        return j - 1 if self.norm_first else j


def norms_of(spec: Spec, tensors: Sequence[Any]) -> list[Norm]:
    """tensors: weight (K, C/groups, R, S), norm weight and bias (K,) or None, per convolution."""
    return [
        Norm(tensors[3 * j + 1], tensors[3 * j + 2], eps, group)
        for j, (eps, group) in enumerate(zip(spec.eps, spec.groups, strict=True))
    ]


def kept(spec: Spec, weights: Sequence[Tensor]) -> list[bool]:
    """Which z, then which h of the residual branch, are saved for backward."""
    z = [spec.level != "minimal"] * len(spec.eps)
    h = [spec.level == "full"] * spec.main
    if spec.norm_first:
        z[0] = False  # x, which always is
        return z + h
    h[-1] = spec.level != "minimal" or spec.window is not None
    last = spec.main - 1
    if spec.level == "lower":
        if spec.shortcut == "projection":
            z[-1] = False
        z[last] = last == 0 or tuple(weights[last].shape[2:]) != (1, 1)
    return z + h


def laid_out(grads: list[Any], tensors: Sequence[Any]) -> list[Any]:
    """grads: of x and then of every tensor, or None; convolution weights' in the layout of the
    weights, as stock's are."""
    for i, t in enumerate(tensors, start=1):
        grad = grads[i]
        if grad is None or grad.dim() != 4 or grad.stride() == t.stride():
            continue
        if grad.is_contiguous() and t.is_contiguous():  # of 1x1 convolutions
            grads[i] = grad.as_strided(t.shape, t.stride())
        else:
            grads[i] = in_layout(grad, layout.memory_format(t))
    return grads


def formula(spec: Spec, x: Tensor, tensors: Sequence[Any]) -> Tensor:
    """The block's output by PyTorch's differentiable operations."""
    norms, main, shortcut = norms_of(spec, tensors), spec.main, spec.shortcut

    def convolve(i: int, h: Tensor) -> Tensor:
        return functional.conv2d(h, tensors[3 * i].to(spec.dtype), None, *spec.geometries[i])

    def normalise(j: int, z: Tensor) -> Tensor:
        weight, bias, eps, _ = norms[j]
        return functional.batch_norm(z, None, None, weight, bias, training=True, eps=eps)

    y = source = x  # source: what the shortcut reads
    for i in range(main):
        before = spec.norm_before(i)
        if before is not None:
            y = torch.relu(normalise(before, y))
        source = y if i == 0 and spec.shared else source
        y = convolve(i, y)
    y = y if spec.norm_first else normalise(main - 1, y)
    if shortcut == "projection":
        source = convolve(main, source)
        source = source if spec.norm_first else normalise(main, source)
    elif shortcut == "pad":
        source = PadShortcut(x.shape[1], y.shape[1], spec.stride)(source)
    y = y if shortcut == "none" else y + source
    y = y if spec.norm_first else torch.relu(y)
    window = spec.window
    return functional.max_pool2d(y, window[:2], window[2:4], window[4:]) if window else y


def differentiable(
    spec: Spec, x: Tensor, tensors: Sequence[Any], dy: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """A differentiable backward, for double backward: the gradients of x and tensors by autograd
    through `formula`, None where not needed; those of contiguous weights contiguous, as stock's."""
    if any(group is not None for group in spec.groups):
        raise NotImplementedError(
            "fused_resnet: a synchronised batch norm is not differentiable twice; "
            "differentiate it in one process, or freeze it (eval)"
        )
    grads = differentiable_gradients(
        lambda x, *tensors: formula(spec, x, tensors), (x, *tensors), needs, dy
    )
    for i, t in enumerate(tensors, start=1):
        grad = grads[i]
        # By operations that also take the gradients of a batch of dy.
        if grad is not None and t.is_contiguous() and grad.stride() != t.stride():
            grads[i] = grad.reshape(-1).view(t.shape)
    return grads
