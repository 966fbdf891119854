"""The ops as PyTorch sees them: schemas, checks, fakes, autograd, autocast, vmap.

The only file that talks to torch.library. Who computes an op is decided in `backends`; the
formulas are `reference`'s. All tensors are (N, C, H, W); the output's layout follows x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_resnet import layout
from fused_resnet.kernels import backends, convolution

from . import reference
from .checks import check_channel, check_same, check_x, conv_shape, pair, require
from .reference import accumulate_dtype

_LIB = torch.library.Library("fused_resnet", "DEF")


def _vector(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A (C,) parameter in the dtype that x accumulates in, contiguous."""
    return None if t is None else t.to(accumulate_dtype(x.dtype)).contiguous()


def _kernels(backend: str) -> Any:
    """Where a backend's kernels are, under the ops' names; None for the reference."""
    return backends.KERNELS[backend]() if backend in backends.KERNELS else None


def in_transform() -> bool:
    """Inside torch.func's transforms (vmap, grad, jvp) or forward-mode AD, which see through
    PyTorch's own operations only: the reference is composed of those."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


# --- add_relu ---------------------------------------------------------------------------------

_LIB.define("add_relu(Tensor x, Tensor residual) -> Tensor")
_LIB.define("add_relu_out(Tensor x, Tensor residual, Tensor(a!) out) -> ()")
_LIB.define("add_relu_backward(Tensor dy, Tensor y) -> Tensor")


def add_relu(x: Tensor, residual: Tensor, *, out: Tensor | None = None) -> Tensor:
    """y = max(x + residual, 0), with max(NaN, 0) = NaN; one rounding.

    x, residual: (N, C, H, W), of one dtype (float32, float16, bfloat16, float64) and device, in any
    layout. Returns (N, C, H, W) in x's layout. Differentiable to any order.
    out: (N, C, H, W) of x's dtype and device, in any layout, to be written and returned instead of
    new memory; it may be x or residual. Not differentiable then, as in PyTorch.
    Raises RuntimeError where shape, dtype or device differ, or out is given and a gradient would be
    needed; ValueError where x is not 4-D.
    Source: He et al. 2015, "Deep Residual Learning for Image Recognition", equation 1.
    """
    if out is not None:
        needed = any(t.requires_grad for t in (x, residual, out))
        require(
            not (needed and torch.is_grad_enabled()),
            "add_relu",
            "out= does not support automatic differentiation, but an argument requires grad",
        )
        torch.ops.fused_resnet.add_relu_out(x, residual, out)
        return out
    if in_transform():
        _add_relu_check(x, residual)
        return reference.add_relu(x, residual)
    return torch.ops.fused_resnet.add_relu(x, residual)


def _add_relu_check(x: Tensor, residual: Tensor) -> None:
    check_x("add_relu", x)
    check_same("add_relu", "residual", residual, x, x.shape)


def _add_relu(x: Tensor, residual: Tensor) -> Tensor:
    _add_relu_check(x, residual)
    x = layout.dense(x)
    kernels = _kernels(backends.choose("add_relu", x.device.type))
    if kernels is not None:
        return kernels.add_relu(x, layout.like(residual, x))
    return layout.like(reference.add_relu(x, residual), x)


def _add_relu_out(x: Tensor, residual: Tensor, out: Tensor) -> None:
    _add_relu_check(x, residual)
    check_same("add_relu", "out", out, x, x.shape)
    if not out.is_inference():
        # Below autograd, where nobody else counts it: what was saved for a backward is now stale.
        torch.autograd.graph.increment_version(out)
    kernels = _kernels(backends.choose("add_relu", x.device.type))
    if kernels is not None and _same_or_apart(out, x) and _same_or_apart(out, residual):
        x = layout.dense(x)
        if out.stride() == x.stride():
            kernels.add_relu_out(x, layout.like(residual, x), out)
            return
    out.copy_(_add_relu(x, residual))


def _same_or_apart(out: Tensor, t: Tensor) -> bool:
    """Whether out is exactly t, or shares no memory with it."""
    same = out.data_ptr() == t.data_ptr() and out.stride() == t.stride()
    return same or out.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()


def _add_relu_out_fake(x: Tensor, residual: Tensor, out: Tensor) -> None:
    _add_relu_check(x, residual)
    check_same("add_relu", "out", out, x, x.shape)


def _add_relu_fake(x: Tensor, residual: Tensor) -> Tensor:
    _add_relu_check(x, residual)
    return layout.empty_like(layout.dense(x))


def _add_relu_backward(dy: Tensor, y: Tensor) -> Tensor:
    check_x("add_relu_backward", y)
    check_same("add_relu_backward", "dy", dy, y, y.shape)
    y = layout.dense(y)
    kernels = _kernels(backends.choose("add_relu", y.device.type))
    if kernels is not None:
        return kernels.add_relu_backward(layout.like(dy, y), y)
    return layout.like(reference.add_relu_backward(dy, y), y)


def _add_relu_backward_fake(dy: Tensor, y: Tensor) -> Tensor:
    return layout.empty_like(layout.dense(y))


def _add_relu_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _add_relu_grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    g = torch.ops.fused_resnet.add_relu_backward(dy, y)
    return tuple(g if needed else None for needed in ctx.needs_input_grad)


def _add_relu_backward_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _add_relu_backward_grad(ctx: Any, ddx: Tensor) -> tuple[Tensor, None]:
    # The mask is locally constant in y: the second derivative is the same mask again.
    return torch.ops.fused_resnet.add_relu_backward(ddx, ctx.saved_tensors[0]), None


# --- bn_add_relu ------------------------------------------------------------------------------

_LIB.define(
    "bn_add_relu(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, bool relu)"
    " -> (Tensor, Tensor, Tensor)"
)
_LIB.define(
    "bn_add_relu_backward(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor mean, Tensor var,"
    " float eps, bool relu, bool need_dx, bool need_dresidual) -> (Tensor, Tensor, Tensor, Tensor)"
)


def bn_add_relu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Training batch normalisation over (N, H, W), then the residual, then ReLU.

    mean[c] = sum x[:, c] / M,   var[c] = sum (x[:, c] - mean[c])^2 / M,   M = N*H*W
    y = relu((x - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c] + residual)

    x: (N, C, H, W), float32, float16, bfloat16 or float64; residual: the same shape and dtype;
    weight, bias: (C,) floating, None means 1 and 0.
    Returns y (N, C, H, W) in x's dtype and layout, mean (C,) and the *biased* variance (C,), both
    float32 (float64 for float64 x), not differentiable. Running statistics are the caller's:
    running_var takes var * M / (M - 1). Differentiable to any order in x, weight, bias, residual.
    Raises ValueError where x is not 4-D or has one value per channel or eps is not positive,
    RuntimeError otherwise.
    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithm 1.
    """
    if in_transform():
        _bn_check(x, weight, bias, residual, eps)
        y, mean, var = reference.bn_add_relu(x, weight, bias, residual, eps, relu)
        return y, mean.detach(), var.detach()
    return torch.ops.fused_resnet.bn_add_relu(x, weight, bias, residual, eps, relu)


def _bn_check(x: Tensor, weight: Any, bias: Any, residual: Any, eps: float) -> None:
    op = "bn_add_relu"
    check_x(op, x)
    check_channel(op, "weight", weight, x, x.shape[1])
    check_channel(op, "bias", bias, x, x.shape[1])
    check_same(op, "residual", residual, x, x.shape)
    require(
        x.shape[0] * x.shape[2] * x.shape[3] != 1,
        op,
        f"expected more than 1 value per channel when training, got input size {tuple(x.shape)}",
        ValueError,
    )
    require(eps > 0, op, f"eps must be positive, got {eps}", ValueError)


def _bn_add_relu(
    x: Tensor, weight: Any, bias: Any, residual: Any, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _bn_check(x, weight, bias, residual, eps)
    x = layout.dense(x)
    kernels = _kernels(backends.choose("bn_add_relu", x.device.type))
    if kernels is not None:
        residual = None if residual is None else layout.like(residual, x)
        return kernels.bn_add_relu(x, _vector(weight, x), _vector(bias, x), residual, eps, relu)
    y, mean, var = reference.bn_add_relu(x, weight, bias, residual, eps, relu)
    return layout.like(y, x), mean, var


def _bn_fake(
    x: Tensor, weight: Any, bias: Any, residual: Any, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _bn_check(x, weight, bias, residual, eps)
    stat = x.new_empty(x.shape[1], dtype=accumulate_dtype(x.dtype))
    return layout.empty_like(layout.dense(x)), stat, torch.empty_like(stat)


def _bn_backward(
    dy: Tensor, x: Tensor, y: Any, weight: Any, mean: Tensor, var: Tensor,
    eps: float, relu: bool, need_dx: bool, need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    op = "bn_add_relu_backward"
    check_x(op, x)
    check_same(op, "dy", dy, x, x.shape)
    check_same(op, "y", y, x, x.shape)
    require(y is not None or not relu, op, "y must be given where relu is True, got None")
    for name, vector in (("weight", weight), ("mean", mean), ("var", var)):
        check_channel(op, name, vector, x, x.shape[1])
    x = layout.dense(x)
    flags = (mean, var, eps, relu, need_dx, need_dresidual)
    kernels = _kernels(backends.choose("bn_add_relu", x.device.type))
    if kernels is not None:
        y = None if y is None else layout.like(y, x)
        return kernels.bn_add_relu_backward(layout.like(dy, x), x, y, _vector(weight, x), *flags)
    dx, dweight, dbias, dresidual = reference.bn_add_relu_backward(dy, x, y, weight, *flags)
    dx = layout.like(dx, x) if need_dx else dx
    dresidual = layout.like(dresidual, x) if need_dresidual else dresidual
    return dx, dweight, dbias, dresidual


def _bn_backward_fake(
    dy: Tensor, x: Tensor, y: Any, weight: Any, mean: Tensor, var: Tensor,
    eps: float, relu: bool, need_dx: bool, need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    full, none = layout.empty_like(layout.dense(x)), x.new_empty(0)
    return (
        full if need_dx else none,
        torch.empty_like(mean),
        torch.empty_like(mean),
        layout.empty_like(full) if need_dresidual else torch.empty_like(none),
    )


def _bn_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _residual, ctx.eps, ctx.relu = inputs
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, y if ctx.relu else None, weight, mean, var)


def _bn_grad(ctx: Any, dy: Tensor, _dmean: Any, _dvar: Any) -> tuple[Any, ...]:
    x, y, weight, mean, var = ctx.saved_tensors
    need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
    ops = torch.ops.fused_resnet
    if torch.is_grad_enabled():
        # Somebody wants to differentiate this backward: write it in differentiable operations.
        g = ops.add_relu_backward(dy, y) if ctx.relu else dy
        bias = None
        if need_bias:
            bias = torch.zeros_like(mean, dtype=ctx.bias_dtype).requires_grad_()
        pairs = ((x, need_x), (weight, need_weight), (bias, need_bias))
        wanted: list[Any] = [t for t, needed in pairs if needed]
        grads: Iterator[Any] = iter(())
        if wanted:
            again = reference.bn_add_relu(x, weight, bias, None, ctx.eps, relu=False)[0]
            grads = iter(torch.autograd.grad(again, wanted, g, create_graph=True))
        found = [next(grads) if needed else None for needed in (need_x, need_weight, need_bias)]
        return (*found, g if need_residual else None, None, None)
    if not (need_x or need_weight or need_bias):
        g = ops.add_relu_backward(dy, y) if ctx.relu else dy
        return None, None, None, g, None, None
    # Without a ReLU the residual's gradient is dy itself: nothing to compute.
    masked = need_residual and ctx.relu
    dx, dweight, dbias, dresidual = ops.bn_add_relu_backward(
        dy, x, y, weight, mean, var, ctx.eps, ctx.relu, need_x, masked
    )
    return (
        dx if need_x else None,
        dweight.to(weight.dtype) if need_weight else None,
        dbias.to(ctx.bias_dtype) if need_bias else None,
        (dresidual if masked else dy) if need_residual else None,
        None,
        None,
    )


def _bn_backward_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Nothing to save: see `_bn_backward_grad`."""


def _bn_backward_grad(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        "bn_add_relu_backward: not differentiable by itself; differentiate bn_add_relu twice "
        "(torch.autograd.grad with create_graph=True), which is"
    )


# --- conv_bn_relu -----------------------------------------------------------------------------

_LIB.define(
    "conv_bn_relu(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, bool relu,"
    " SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor"
)


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
    scale, shift: (K,) floating, best float32; residual: (N, K, P, Q) of x's dtype, or None.
    stride, padding, dilation in pixels. Returns (N, K, P, Q) in x's dtype and layout; sums are kept
    in float32 (float64 for float64). Differentiable to any order in all five tensors.
    Raises RuntimeError that names the argument for wrong shapes, dtypes, devices and sizes.
    Source: Ioffe and Szegedy 2015, section 3.1; Jacob et al. 2018, section 3.2.
    """
    pairs = (("stride", stride), ("padding", padding), ("dilation", dilation))
    geometry: Any = (*(pair("conv_bn_relu", name, v) for name, v in pairs), groups)
    if in_transform():
        conv_shape(x, weight, scale, shift, residual, *geometry)
        return reference.conv_bn_relu(x, weight, scale, shift, residual, relu, *geometry)
    return torch.ops.fused_resnet.conv_bn_relu(x, weight, scale, shift, residual, relu, *geometry)


def _conv_fused(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Any,
    relu: bool,
    *geometry: Any,
) -> Tensor:
    arguments = (x, weight, scale, shift, residual, relu, *geometry)
    device = x.device.type
    dtype = backends.conv_dtype(x.dtype, device)
    kind = None
    if dtype is not None and x.numel() > 0:
        kind = backends.conv_kind(weight.shape, dtype, geometry[2], geometry[3], device)
    if kind is None or dtype is None:
        return reference.conv_bn_relu(*arguments)
    conv = convolution.kept(kind, weight, scale, shift, dtype, *geometry)
    if conv.needs_bound:
        added = 0.0 if residual is None else convolution.max_abs(residual)
        if not conv.bound(convolution.max_abs(x)) + added <= convolution.BOUND_LIMIT:
            return reference.conv_bn_relu(*arguments)
    last = torch.channels_last
    if not conv.takes_any:
        x = x.to(dtype).contiguous(memory_format=last)
    if residual is not None:
        residual = residual.to(dtype).contiguous(memory_format=last)
    return conv.run(x, residual, relu).to(weight.dtype)


def _conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Any,
    relu: bool,
    *geometry: Any,
) -> Tensor:
    shape = conv_shape(x, weight, scale, shift, residual, *geometry)
    backend = backends.choose("conv_bn_relu", x.device.type)
    run = reference.conv_bn_relu if backend == "reference" else _conv_fused
    y = run(x, weight, scale, shift, residual, relu, *geometry)
    return layout.like(y, layout.empty(shape, x.to("meta"), layout.memory_format(x)))


def _conv_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Any,
    relu: bool,
    *geometry: Any,
) -> Tensor:
    shape = conv_shape(x, weight, scale, shift, residual, *geometry)
    return layout.empty(shape, x, layout.memory_format(x))


def _conv_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, shift, _residual, ctx.relu, *ctx.geometry = inputs
    # Asked here: a backward may run on another thread, where nothing is forced.
    ctx.triton = backends.forced() == "triton" and x.dtype != torch.float64
    ctx.save_for_backward(x, weight, scale, shift, output if ctx.relu else None)


def _conv_grad(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """With g = dy * (y > 0) and dW' the weight gradient of the convolution by g:

    dx = conv_transpose(g, weight * scale),   dweight = dW' * scale[k],   dresidual = g
    dscale[k] = <dW'[k], weight[k]>,   dshift[k] = sum g[:, k]
    so the convolution's own output need not be saved.
    """
    x, weight, scale, shift, y = ctx.saved_tensors
    need_x, need_weight, need_scale, need_shift, need_residual = ctx.needs_input_grad[:5]
    g = torch.ops.fused_resnet.add_relu_backward(dy, y) if ctx.relu else dy
    rest = (None,) * 5
    if torch.is_grad_enabled():
        # Somebody wants to differentiate this backward: write it in differentiable operations.
        needs = (need_x, need_weight, need_scale, need_shift)
        wanted = [t for t, n in zip((x, weight, scale, shift), needs, strict=True) if n]
        grads: Iterator[Any] = iter(())
        if wanted:
            again = reference.conv_bn_relu(x, weight, scale, shift, None, False, *ctx.geometry)
            grads = iter(torch.autograd.grad(again, wanted, g, create_graph=True))
        return (*(next(grads) if n else None for n in needs), g if need_residual else None, *rest)
    dx = dweight = dscale = dshift = None
    acc = accumulate_dtype(x.dtype)
    gain = scale.to(acc).view(-1, 1, 1, 1)

    def convolution_backward(w: Tensor, mask: list[bool]) -> tuple[Any, ...]:
        if ctx.triton:
            ops = torch.ops.fused_resnet
            return ops.convolution_backward_triton(g, x, w, *ctx.geometry, mask)
        stride, padding, dilation, groups = ctx.geometry
        return torch.ops.aten.convolution_backward(
            g, x, w, None, stride, padding, dilation, False, [0, 0], groups, mask
        )

    if need_x:
        scaled = (weight.to(acc) * gain).to(weight.dtype)
        dx = convolution_backward(scaled, [True, False, False])[0]
    if need_weight or need_scale:
        raw = convolution_backward(weight, [False, True, False])[1].to(acc)
        dweight = (raw * gain).to(weight.dtype) if need_weight else None
        dscale = (raw * weight.to(acc)).sum((1, 2, 3)).to(scale.dtype) if need_scale else None
    if need_shift:
        dshift = g.sum((0, 2, 3), dtype=acc).to(shift.dtype)
    return dx, dweight, dscale, dshift, g if need_residual else None, *rest


# The convolution's gradients by this package's own kernels: behind an op of their own, so that a
# compiler finds in its graph what would run without it. mask: whether dx, dweight (and, as in
# aten's, a bias) are wanted; what is not is empty.
_LIB.define(
    "convolution_backward_triton(Tensor g, Tensor x, Tensor weight, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool[3] mask) -> (Tensor, Tensor)"
)


def _conv_backward_triton(
    g: Tensor, x: Tensor, weight: Tensor, *geometry: Any
) -> tuple[Tensor, Tensor]:
    *sizes, mask = geometry
    dx, dweight = _conv_backward_fake(g, x, weight, *geometry)
    if g.numel() == 0:
        return dx.zero_(), dweight.zero_()
    kernels = _kernels("triton")
    if mask[0]:
        found = kernels.convolution_dx(g, weight, x.shape, *sizes)
        if found is None:
            stride, padding, dilation, groups = sizes
            found = torch.ops.aten.convolution_backward(
                g, x, weight, None, stride, padding, dilation, False, [0, 0], groups,
                [True, False, False],
            )[0]  # fmt: skip
        dx = layout.like(found, dx)
    if mask[1]:
        dweight = kernels.convolution_dweight(g, x, weight.shape, *sizes)
    return dx, dweight


def _conv_backward_fake(
    g: Tensor, x: Tensor, weight: Tensor, *geometry: Any
) -> tuple[Tensor, Tensor]:
    mask = geometry[-1]
    _, C, R, S = weight.shape
    strides = (R * S * C, 1, S * C, C)
    return (
        layout.empty_like(layout.dense(x)) if mask[0] else x.new_empty(0),
        weight.new_empty_strided(weight.shape, strides, dtype=torch.float32)
        if mask[1]
        else weight.new_empty(0),
    )


def _conv_autocast(device_type: str) -> Callable[..., Tensor]:
    """As autocast treats convolutions: float32 operands become its dtype; scale and shift stay."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))

    def run(
        x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Any, *rest: Any
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)

        def cast(t: Any) -> Any:
            narrow = t is not None and t.is_floating_point() and t.dtype != torch.float64
            return t.to(dtype) if narrow else t

        with torch._C._ExcludeDispatchKeyGuard(key):
            return torch.ops.fused_resnet.conv_bn_relu(
                cast(x), cast(weight), scale, shift, cast(residual), *rest
            )

    return run


# --- registration -----------------------------------------------------------------------------


def _register(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    grad: Callable[..., Any] | None = None,
) -> None:
    qualified = f"fused_resnet::{name}"
    _LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIB)
    if grad is not None:
        torch.library.register_autograd(qualified, grad, setup_context=save, lib=_LIB)


_register("add_relu", _add_relu, _add_relu_fake, _add_relu_save, _add_relu_grad)
_register("add_relu_out", _add_relu_out, _add_relu_out_fake)
_register(
    "add_relu_backward",
    _add_relu_backward,
    _add_relu_backward_fake,
    _add_relu_backward_save,
    _add_relu_backward_grad,
)
_register("bn_add_relu", _bn_add_relu, _bn_fake, _bn_save, _bn_grad)
_register(
    "bn_add_relu_backward", _bn_backward, _bn_backward_fake, _bn_backward_save, _bn_backward_grad
)
_register("conv_bn_relu", _conv_bn_relu, _conv_fake, _conv_save, _conv_grad)
_register("convolution_backward_triton", _conv_backward_triton, _conv_backward_fake)
for _device in ("cpu", "cuda"):
    _LIB.impl("conv_bn_relu", _conv_autocast(_device), f"Autocast{_device.upper()}")
