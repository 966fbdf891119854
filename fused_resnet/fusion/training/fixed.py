"""A block's training step where no norm uses batch statistics, as one node of autograd's graph.

Every norm is a multiply-add that is fixed during the step (FrozenBatchNorm2d, BatchNorm2d in eval
mode), or there is none, only the convolution's bias. It is applied as the convolution's sums are
stored, and so is the shortcut:

    h_i = a_i(conv_i(h_(i-1)) * scale_i + shift_i),   y = a_n(... + shortcut(x)),   h_0 = x

The outputs h_i are saved; a ReLU's gradient is masked by its output. With g_i the gradient before
the activation and dW' the weight gradient of the convolution by g_i,

    dweight = dW' * scale[k],   dscale[k] = <dW'[k], weight[k]>,   dshift[k] = sum g_i[:, k]

A double backward runs the formula by PyTorch's operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.problem import Geometry
from fused_resnet.kernels.training.native import Native, channels_last
from fused_resnet.layers.shortcut import PadShortcut, add_padded_gradient, padded
from fused_resnet.ops.library import by_formula, differentiable_gradients, per_channel

from .spec import laid_out


class Fixed(NamedTuple):
    """A block without its tensors. geometries and activations: one per convolution, the shortcut's
    last. shortcut: as in `Spec`."""

    kernels: Native
    geometries: tuple[Geometry, ...]
    activations: tuple[Activation, ...]
    shortcut: str
    dtype: torch.dtype  # of the activations
    stride: int = 1  # of a PadShortcut

    @property
    def main(self) -> int:
        """The number of convolutions of the residual branch."""
        return len(self.geometries) - (self.shortcut == "projection")


def formula(spec: Fixed, x: Tensor, tensors: Sequence[Any]) -> Tensor:
    """The block's output before a residual is added and before the last activation, in float32, by
    PyTorch's differentiable operations."""

    def unit(i: int, h: Tensor) -> Tensor:
        weight, scale, shift = tensors[3 * i : 3 * i + 3]
        z = functional.conv2d(h, weight.float(), None, *spec.geometries[i])
        z = z if scale is None else z * per_channel(scale)
        return z if shift is None else z + per_channel(shift)

    x = x.float()
    y, last = x, spec.main - 1
    for i in range(last):
        y = spec.activations[i](unit(i, y))
    y = unit(last, y)
    if spec.shortcut == "projection":
        return y + unit(spec.main, x)
    if spec.shortcut == "pad":
        return y + PadShortcut(x.shape[1], y.shape[1], spec.stride)(x)
    return y + x if spec.shortcut == "identity" else y


class FixedFunction(torch.autograd.Function):
    """A block's output (N, K, P, Q).

    apply(spec, x, residual, *tensors): x (N, C, H, W) and, without a shortcut, a residual
    (N, K, P, Q) or None, of spec.dtype, channels_last; tensors: weight, scale and shift of each
    convolution, the latter (K,) float32; scale None: 1, shift None: 0."""

    @staticmethod
    def forward(ctx: Any, spec: Fixed, x: Tensor, residual: Any, *tensors: Any) -> Tensor:
        def unit(i: int, h: Tensor, added: Tensor | None) -> Tensor:
            weight, scale, shift = tensors[3 * i : 3 * i + 3]
            return spec.kernels.convolution_and_epilogue(
                h, weight, scale, shift, spec.geometries[i], added, spec.activations[i]
            )

        last = spec.main - 1
        if spec.shortcut == "projection":
            residual = unit(spec.main, x, None)
        elif spec.shortcut == "pad":
            residual = padded(x, tensors[3 * last].shape[0], spec.stride)
        elif spec.shortcut == "identity":
            residual = x
        inputs = [x]
        for i in range(last):
            inputs.append(unit(i, inputs[-1], None))
        y = unit(last, inputs[-1], residual)
        # Without a ReLU the caller may write to y.
        masked = y if spec.activations[last] else None
        ctx.spec = spec
        ctx.save_for_backward(*tensors, *inputs, masked)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        spec: Fixed = ctx.spec
        saved, count = ctx.saved_tensors, 3 * len(spec.geometries)
        tensors, outputs = saved[:count], list(saved[count:])
        del saved
        needs = ctx.needs_input_grad[1:]
        if by_formula(dy):
            y = outputs[-1]
            # An op that also depends on y: stock's second derivative is zero there, not None.
            g = dy if y is None else torch.ops.fused_resnet.add_relu_backward(dy, y)
            x_grad, *grads = differentiable_gradients(
                lambda x, *tensors: formula(spec, x, tensors).to(spec.dtype),
                (outputs[0], *tensors), (needs[0], *needs[2:]), g,
            )  # fmt: skip
            grads = laid_out([None, *grads], tensors)[1:]
            return None, x_grad, g if needs[1] else None, *grads
        dy = channels_last(dy)
        x_grad, residual_grad, *grads = _gradients(spec, dy, tensors, outputs, needs)
        return None, x_grad, residual_grad, *laid_out([None, *grads], tensors)[1:]


def _gradients(
    spec: Fixed, dy: Tensor, tensors: Sequence[Any], outputs: list[Any], needs: Sequence[bool]
) -> list[Any]:
    """The gradients of x, residual and every tensor for dy (N, K, P, Q), None where not needed.
    outputs: x, then every unit's, the last None without a ReLU; they are released."""
    kernels, main = spec.kernels, spec.main
    grads: list[Any] = [None] * len(needs)

    def parts(i: int) -> tuple[Any, ...]:
        """Weight and geometry, scale, and what of weight, scale and shift requires a gradient."""
        weight, scale, _ = tensors[3 * i : 3 * i + 3]
        return weight, spec.geometries[i], scale, needs[3 * i + 2 : 3 * i + 5]

    def before(i: int, dh: Tensor, y: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
        """The gradients of the convolution's output and of its norm's, for dh of y."""
        *_, scale, needed = parts(i)
        return kernels.epilogue_gradient(dh, y, scale, keep or any(needed[1:]))

    def store(i: int, dz: Tensor, g: Tensor, h: Tensor) -> None:
        """The parameters' gradients of unit i, of which h is the input."""
        weight, geometry, scale, needed = parts(i)
        if needed[1]:
            raw = kernels.weight_gradient(g, h, weight.float(), geometry)
            grads[3 * i + 3] = (raw * weight.float()).sum((1, 2, 3))
            if needed[0]:
                grads[3 * i + 2] = (raw * scale.view(-1, 1, 1, 1)).to(weight.dtype)
        elif needed[0]:
            grads[3 * i + 2] = kernels.weight_gradient(dz, h, weight, geometry)
        if needed[2]:
            grads[3 * i + 4] = g.sum((0, 2, 3), dtype=torch.float32)

    projects = spec.shortcut == "projection" and any(needs[3 * main + 2 :])
    shortcut = needs[1] or projects or (needs[0] and spec.shortcut != "none")
    dz, g = before(main - 1, dy, outputs.pop(), shortcut)
    ds, dx = g, None
    if needs[1]:
        grads[1] = ds
    if spec.shortcut == "projection":
        dz_shortcut, g_shortcut = before(main, ds, None, True)
        store(main, dz_shortcut, g_shortcut, outputs[0])
    for i in reversed(range(main)):
        weight, geometry, *_ = parts(i)
        h = outputs.pop()
        store(i, dz, g, h)
        if not needs[0] and not any(needs[2 : 3 * i + 2]):
            return grads  # nothing before requires a gradient
        if i > 0:
            dh = kernels.input_gradient(dz, h, weight, geometry)
            dz, g = before(i - 1, dh, h if spec.activations[i - 1] else None, False)
            continue
        added = None
        if spec.shortcut == "identity":  # is overwritten
            added = ds.clone() if ds is dy or ds is dz else ds
        dx = kernels.input_gradient(dz, h, weight, geometry, added)
        if spec.shortcut == "projection":
            weight, geometry, *_ = parts(main)
            dx = kernels.input_gradient(dz_shortcut, h, weight, geometry, dx)
        elif spec.shortcut == "pad":
            dx = add_padded_gradient(dx, ds, spec.stride)
    grads[0] = dx
    return grads
