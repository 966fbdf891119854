"""conv_bn_relu: convolution, inference batch normalisation as one multiply-add, residual, ReLU.

y = relu(conv(x, weight) * scale[k] + shift[k] + residual)
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import layout
from fused_resnet.dtypes import accumulate_dtype
from fused_resnet.kernels import cache, registry
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.problem import Problem, convolution
from fused_resnet.kernels.training.choice import passes_for
from fused_resnet.kernels.training.native import Native, channels_last
from fused_resnet.kernels.training.protocol import convolution_gradients

from .checks import check_channel, check_same, check_x, describe, pair, require
from .library import (
    LIBRARY,
    by_formula,
    differentiable_gradients,
    in_transform,
    per_channel,
    register,
)


def conv_bn_relu_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolution, inference batch normalisation as one multiply-add, residual, ReLU.

    y = relu(conv(x, weight) * scale[k] + shift[k] + residual),
    scale = bn.weight / sqrt(running_var + eps),   shift = bn.bias - running_mean * scale

    x: (N, C, H, W); weight: (K, C/groups, R, S); scale, shift: (K,) float32, float64 for float64
    x; residual: (N, K, P, Q) of x's dtype, or None. Returns (N, K, P, Q) in x's dtype; sums are
    accumulated in float32 and the result is rounded once.
    Source: Ioffe and Szegedy 2015, section 3.1 (inference), folded as in Jacob et al. 2018, 3.2.
    """
    acc = accumulate_dtype(x.dtype)
    y = F.conv2d(
        x.to(acc), weight.to(acc), None, tuple(stride), tuple(padding), tuple(dilation), groups
    )
    y = y * per_channel(scale.to(acc)) + per_channel(shift.to(acc))
    if residual is not None:
        y = y + residual.to(acc)
    if relu:
        y = y.relu()
    return y.to(x.dtype)


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    relu: bool = True,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution, inference batch normalisation as one multiply-add, residual, ReLU.

    y = relu(conv(x, weight) * scale[k] + shift[k] + residual)
    scale = bn.weight / sqrt(running_var + eps),   shift = bn.bias - running_mean * scale

    x: (N, C, H, W); weight: (K, C/groups, R, S) of x's dtype (float32, float16, bfloat16, float64);
    scale, shift: (K,) floating, preferably float32; residual: (N, K, P, Q) of x's dtype, or None.
    stride, padding, dilation in pixels. Returns (N, K, P, Q) in x's dtype and layout; sums are
    accumulated in float32 (float64 for float64). Differentiable to any order in all five tensors.
    Raises RuntimeError that names the argument for invalid shapes, dtypes, devices and sizes.
    Source: Ioffe and Szegedy 2015, section 3.1; Jacob et al. 2018, section 3.2.
    """
    pairs = (("stride", stride), ("padding", padding), ("dilation", dilation))
    geometry: Any = (*(pair("conv_bn_relu", name, v) for name, v in pairs), groups)
    if in_transform():
        _shape(x, weight, scale, shift, residual, *geometry)
        return conv_bn_relu_reference(x, weight, scale, shift, residual, relu, *geometry)
    count_flops("conv_bn_relu")
    return torch.ops.fused_resnet.conv_bn_relu(x, weight, scale, shift, residual, relu, *geometry)


def count_flops(name: str) -> None:
    """Tells torch.utils.flop_counter the op's FLOPs, once that was imported (importing it imports
    Triton)."""
    if not torch.compiler.is_compiling() and "torch.utils.flop_counter" in sys.modules:
        _count_flops(name)


@functools.cache
def _count_flops(name: str) -> None:
    """A counter that is active already has a registry of its own."""
    from torch.utils.flop_counter import conv_flop_count, flop_registry, register_flop_formula

    op = getattr(torch.ops.fused_resnet, name)

    @register_flop_formula(op)
    def flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        """Those of the convolution, as PyTorch counts no elementwise operations."""
        return conv_flop_count(x_shape, weight_shape, out_shape)

    for i in range(torch._C._len_torch_dispatch_stack()):
        counter = getattr(torch._C._get_dispatch_stack_at(i), "counter", None)
        getattr(counter, "flop_registry", {})[op] = flop_registry[op]


def conv_shape(
    op: str, x: Tensor, weight: Tensor, vectors: dict[str, Tensor | None], residual: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> list[int]:  # fmt: skip
    """The output shape (N, K, P, Q); raises RuntimeError if the arguments are inconsistent.
    vectors: the operands (K,) by their names."""
    check_x(op, x)
    require(
        weight.dim() == 4,
        op,
        f"weight must be 4-D (K, C/groups, R, S), got shape {tuple(weight.shape)}",
    )
    require(
        weight.dtype == x.dtype and weight.device == x.device,
        op,
        f"weight must be {str(x.dtype)[6:]} on {x.device} as x is, got {describe(weight)}",
    )
    K, C_per_group, R, S = weight.shape
    N, C, H, W = x.shape
    require(
        groups > 0 and C_per_group * groups == C and K % groups == 0,
        op,
        f"weight of shape {tuple(weight.shape)} with groups={groups} takes "
        f"{C_per_group * groups} input channels, but x has {C} (shape {tuple(x.shape)})",
    )
    for name, vector in vectors.items():
        check_channel(op, name, vector, x, K)
    for name, values, least in (
        ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1),
    ):  # fmt: skip
        require(min(values) >= least, op, f"{name} must be at least {least}, got {tuple(values)}")
    sizes = []
    for axis, size, kernel, s, p, d in zip(
        "HW", (H, W), (R, S), stride, padding, dilation, strict=True
    ):
        extent = d * (kernel - 1) + 1
        require(
            size + 2 * p >= extent and size > 0,
            op,
            f"{axis} of x must be positive and, padded, at least the kernel's extent: got "
            f"{size} + 2*{p} for an extent of {extent}",
        )
        sizes.append((size + 2 * p - extent) // s + 1)
    shape = [N, K, *sizes]
    check_same(op, "residual", residual, x, shape)
    return shape


def _shape(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Any, *geometry: Any
) -> list[int]:
    vectors: dict[str, Tensor | None] = {"scale": scale, "shift": shift}
    return conv_shape("conv_bn_relu", x, weight, vectors, residual, *geometry)


class Vectors(NamedTuple):
    """scale, shift = fold(*tensors, *constants): how an op's operands (K,) give them."""

    tensors: tuple[Tensor | None, ...]
    fold: Callable[..., tuple[Tensor, Tensor]]
    constants: tuple[Any, ...] = ()


def convolved(
    reference: Callable[[], Tensor],
    shape: list[int],
    x: Tensor,
    weight: Tensor,
    vectors: Vectors,
    residual: Any,
    relu: bool,
    *geometry: Any,
) -> Tensor:
    """The output of an op, of x's layout: from a packed convolution, or from `reference` where the
    backend in use computes none."""
    if registry.choose("conv_bn_relu", x.device.type) == "reference":
        y = reference()
    else:
        y = _conv_fused(reference, x, weight, vectors, residual, relu, *geometry)
    return layout.like(y, layout.empty(shape, x.to("meta"), layout.memory_format(x)))


def _conv_fused(
    reference: Callable[[], Tensor],
    x: Tensor,
    weight: Tensor,
    vectors: Vectors,
    residual: Any,
    relu: bool,
    *geometry: Any,
) -> Tensor:
    activation = Activation(relu)
    problem = convolution(weight.shape, None, *geometry)._replace(activation=activation)
    found = registry.convolutions([problem], x.dtype, x.device.type)
    if isinstance(found, Problem) or x.numel() == 0:
        return reference()
    ((problem, kind),) = found
    dtype, problem = problem.dtype, problem._replace(activation=Activation.RELU)  # packed alike
    conv = cache.cached_convolution(
        kind, problem, weight, vectors.tensors, vectors.fold, *vectors.constants
    )
    last = torch.channels_last
    if not conv.takes_any:
        x = x.to(dtype).contiguous(memory_format=last)
    if residual is not None:
        residual = residual.to(dtype).contiguous(memory_format=last)
    return conv.run(x, residual, activation).detach().to(weight.dtype)


def _conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Any,
    relu: bool,
    *geometry: Any,
) -> Tensor:
    shape = _shape(x, weight, scale, shift, residual, *geometry)
    rest = (residual, relu, *geometry)
    return convolved(
        lambda: conv_bn_relu_reference(x, weight, scale, shift, *rest),
        shape, x, weight, Vectors((scale, shift), _as_given), *rest,
    )  # fmt: skip


def _as_given(scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return scale, shift


def _conv_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Any,
    relu: bool,
    *geometry: Any,
) -> Tensor:
    shape = _shape(x, weight, scale, shift, residual, *geometry)
    return layout.empty(shape, x, layout.memory_format(x))


def _conv_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, shift, _residual, ctx.relu, *ctx.geometry = inputs
    ctx.triton = by_triton(x)
    ctx.save_for_backward(x, weight, scale, shift, output if ctx.relu else None)


def by_triton(x: Tensor) -> bool:
    """Whether backward computes the convolution's gradients by Triton's kernels; determined in
    forward, as backward may run on another thread, where no backend is forced."""
    return registry.forced() == "triton" and x.dtype != torch.float64


def _conv_grad(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """dresidual = g = dy * (y > 0); the others are those of `conv_gradients` for g."""
    x, weight, scale, shift, y = ctx.saved_tensors
    *needs, need_residual = ctx.needs_input_grad[:5]
    g = torch.ops.fused_resnet.add_relu_backward(dy, y) if ctx.relu else dy
    rest = (None,) * 5
    if by_formula(dy):
        grads: Sequence[Tensor | None] = differentiable_gradients(
            lambda x, weight, scale, shift: conv_bn_relu_reference(
                x, weight, scale, shift, None, False, *ctx.geometry
            ),
            (x, weight, scale, shift), needs, g,
        )  # fmt: skip
    else:
        grads = conv_gradients(g, x, weight, scale, shift, needs, ctx.geometry, ctx.triton)
    return (*grads, g if need_residual else None, *rest)


def conv_gradients(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    needs: Sequence[bool],
    geometry: Any,
    triton: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, scale and shift, where needed, for g (N, K, P, Q), that of
    conv(x, weight) * scale[k] + shift[k]. With dW' the weight gradient of the convolution by g:

    dx = conv_transpose(g, weight * scale),   dweight = dW' * scale[k]
    dscale[k] = <dW'[k], weight[k]>,   dshift[k] = sum g[:, k]
    so the output of the convolution itself need not be saved.
    """
    need_x, need_weight, need_scale, need_shift = needs
    dx = dweight = dscale = dshift = None
    acc = accumulate_dtype(x.dtype)
    gain = scale.to(acc).view(-1, 1, 1, 1)

    def convolution_backward(w: Tensor, mask: list[bool]) -> tuple[Any, ...]:
        if triton:
            ops = torch.ops.fused_resnet
            return ops.convolution_backward_triton(g, x, w, *geometry, mask)
        found = _cpu_gradients(g, x, w, geometry, mask)
        return convolution_gradients(g, x, w, geometry, mask) if found is None else found

    if need_x:
        scaled = (weight.to(acc) * gain).to(weight.dtype)
        dx = convolution_backward(scaled, [True, False, False])[0]
    if need_weight or need_scale:
        raw = convolution_backward(weight, [False, True, False])[1].to(acc)
        dweight = (raw * gain).to(weight.dtype) if need_weight else None
        dscale = (raw * weight.to(acc)).sum((1, 2, 3)).to(scale.dtype) if need_scale else None
    if need_shift:
        dshift = g.sum((0, 2, 3), dtype=acc).to(shift.dtype)
    return dx, dweight, dscale, dshift


def _cpu_gradients(
    g: Tensor, x: Tensor, weight: Tensor, geometry: Any, mask: list[bool]
) -> tuple[Any, ...] | None:
    """One gradient by the CPU's training kernels, as `mask` says; None where they have none, or
    where a compiler traces the backward."""
    if type(g) is not Tensor or x.device.type != "cpu" or g.numel() == 0:
        return None
    if torch._C._len_torch_dispatch_stack() > 0:  # such as a counter of operations
        return None
    kernels, sizes = passes_for("cpu"), convolution(weight.shape, x.dtype, *geometry).geometry
    work = "input_gradient" if mask[0] else "weight_gradient"
    if not isinstance(kernels, Native) or not kernels.supports(weight, x.dtype, sizes, work):
        return None
    dy, last = g.contiguous(memory_format=torch.channels_last), channels_last(x)
    if mask[0]:
        dx = kernels.input_gradient(dy, last, weight, sizes)
        return layout.like(dx, layout.empty_like(layout.dense(x))), None
    dweight = kernels.weight_gradient(dy, last, weight, sizes)
    return None, layout.like(dweight, layout.empty_like(layout.dense(weight)))


def _conv_backward_triton(
    g: Tensor, x: Tensor, weight: Tensor, *geometry: Any
) -> tuple[Tensor, Tensor]:
    *sizes, mask = geometry
    dx, dweight = _conv_backward_fake(g, x, weight, *geometry)
    if g.numel() == 0:
        return dx.zero_(), dweight.zero_()
    kernels = registry.kernels("triton", x.device.type)
    sizes_of_kernel = convolution(weight.shape, x.dtype, *sizes).geometry
    if mask[0]:
        computed = kernels.convolution_dx(g, weight, x.shape, sizes_of_kernel)
        if computed is None:
            computed = convolution_gradients(g, x, weight, sizes, [True, False, False])[0]
        dx = layout.like(computed, dx)
    if mask[1]:
        computed = kernels.convolution_dweight(g, x, weight.shape, sizes_of_kernel)
        dweight = layout.like(computed, dweight)
    return dx, dweight


def _conv_backward_fake(
    g: Tensor, x: Tensor, weight: Tensor, *geometry: Any
) -> tuple[Tensor, Tensor]:
    need_x, need_weight, _ = geometry[-1]
    dx = layout.empty_like(layout.dense(x)) if need_x else x.new_empty(0)
    if not need_weight:
        return dx, weight.new_empty(0)
    # As cuDNN's: channels_last if one of the convolution's operands is.
    like = x if layout.memory_format(x) == torch.channels_last else weight
    return dx, layout.empty(weight.shape, weight, layout.memory_format(like), torch.float32)


def register_autocast(name: str, positions: Sequence[int]) -> None:
    """Autocast of convolutions: casts the op's floating operands at these positions to its dtype,
    but none in float64."""

    def on(device_type: str) -> Callable[..., Tensor]:
        device = device_type.upper()
        key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

        def run(*arguments: Any) -> Tensor:
            dtype, cast = torch.get_autocast_dtype(device_type), list(arguments)
            for i in positions:
                t = cast[i]
                if t is not None and t.is_floating_point() and t.dtype != torch.float64:
                    cast[i] = t.to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(key):
                return getattr(torch.ops.fused_resnet, name)(*cast)

        return run

    for device_type in ("cpu", "cuda"):
        LIBRARY.impl(name, on(device_type), f"Autocast{device_type.upper()}")


register(
    "conv_bn_relu(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, bool relu,"
    " SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor",
    _conv_bn_relu, _conv_fake, _conv_save, _conv_grad,
)  # fmt: skip
# The convolution's gradients by the Triton kernels. A separate op, so that the graph of
# torch.compile contains the same kernels as eager mode.
register(
    "convolution_backward_triton(Tensor g, Tensor x, Tensor weight, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool[3] mask) -> (Tensor, Tensor)",
    _conv_backward_triton, _conv_backward_fake,
)  # fmt: skip
register_autocast("conv_bn_relu", (0, 1, 4))  # x, weight and residual, but not scale and shift
