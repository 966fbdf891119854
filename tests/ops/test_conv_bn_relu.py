"""conv_bn_relu: values, gradients, geometries, layouts, invalidation of cached packed weights."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

import fused_resnet as fr
from fused_resnet.kernels import cache
from fused_resnet.layout import memory_format
from tests.ops.op_cases import (
    DENSE,
    DTYPES,
    LAYOUTS,
    close,
    integers,
    interpreted,
    lifted,
    randn,
    same,
    unchanged,
)

OP = "conv_bn_relu"

# name -> x's (N, C, H, W), K, kernel (R, S), stride, padding, dilation, groups
CASES = {
    "pointwise": ((2, 64, 7, 7), 64, (1, 1), 1, 0, 1, 1),
    "pointwise, stride 2": ((1, 32, 9, 8), 80, (1, 1), 2, 0, 1, 1),
    "3x3": ((2, 16, 9, 10), 24, (3, 3), 1, 1, 1, 1),
    "3x3, stride 2": ((1, 24, 11, 8), 70, (3, 3), 2, 1, 1, 1),
    "stem": ((2, 3, 31, 29), 64, (7, 7), 2, 3, 1, 1),
    # Channels and outputs are multiples of 16: Winograd in float32.
    "3x3, multiples of 16": ((2, 32, 9, 11), 80, (3, 3), 1, 1, 1, 1),
    "3x3, multiples of 16, no padding": ((3, 16, 10, 8), 16, (3, 3), 1, 0, 1, 1),
    "3x3 of 16 to 16": ((1, 16, 9, 11), 16, (3, 3), 1, 1, 1, 1),
    "3x3 of 16 to 16, rows of 16 tiles": ((2, 16, 5, 31), 16, (3, 3), 1, 1, 1, 1),
    "3x3, multiples of 16, wide padding": ((1, 48, 7, 30), 64, (3, 3), 1, (2, 0), 1, 1),
    "3x3, multiples of 16, many tiles": ((2, 128, 34, 33), 32, (3, 3), 1, 1, 1, 1),
    "3x3, multiples of 16, one pixel": ((2, 64, 1, 1), 64, (3, 3), 1, 1, 1, 1),
    "one channel": ((2, 1, 12, 9), 5, (5, 5), 1, 2, 1, 1),
    "one pixel": ((3, 20, 1, 1), 16, (1, 1), 1, 0, 1, 1),
    "odd channels": ((2, 65, 6, 5), 33, (3, 3), 1, 1, 1, 1),
    "many channels": ((1, 2048, 2, 2), 130, (1, 1), 1, 0, 1, 1),
    "dilated": ((1, 18, 13, 12), 20, (3, 3), 1, 2, 2, 1),
    "dilated, few channels": ((1, 3, 13, 14), 20, (3, 3), 1, 2, 2, 1),
    "asymmetric": ((2, 20, 9, 12), 36, (1, 5), (2, 1), (0, 2), (1, 2), 1),
    "wide padding": ((1, 16, 4, 4), 16, (3, 3), 1, 3, 1, 1),
    "groups of 4": ((2, 128, 6, 6), 128, (3, 3), 1, 1, 1, 32),
    "groups of 32": ((1, 64, 6, 7), 64, (3, 3), 2, 1, 1, 2),
    "groups of 24, 48 outputs": ((2, 48, 7, 9), 96, (3, 3), 1, 1, 1, 2),
    "uneven groups": ((2, 12, 6, 5), 42, (3, 3), 1, 1, 1, 3),
    "depthwise": ((2, 40, 7, 7), 40, (3, 3), 1, 1, 1, 40),
    "unsupported number of taps": ((1, 4, 14, 14), 8, (12, 12), 1, 0, 1, 1),
    "groups of 4, 16 outputs": ((2, 12, 6, 5), 48, (3, 3), 1, 1, 1, 3),
    "stem, other padding": ((1, 3, 17, 20), 64, (7, 7), 2, 2, 1, 1),
    "dilated beyond the image": ((1, 16, 5, 4), 16, (3, 3), 1, (5, 3), (5, 3), 1),
}


def operands(case, dtype, device="cpu", make=randn) -> tuple[list[Tensor], tuple]:
    """x, weight, scale, shift, residual (channels_last), and the geometry."""
    shape, K, kernel, stride, padding, dilation, groups = CASES[case]
    fan_in = shape[1] // groups * kernel[0] * kernel[1]
    weight = make((K, shape[1] // groups, *kernel), dtype, device)
    if make is randn:
        weight = weight / fan_in**0.5
    scale = (torch.rand(K) + 0.5) * torch.where(torch.arange(K) % 5 == 4, -1.0, 1.0)
    shift = torch.randn(K)
    if make is integers:
        scale, shift = torch.randint(1, 3, (K,)).float(), torch.randint(-9, 9, (K,)).float()
    geometry = (stride, padding, dilation, groups)
    x = make(shape, dtype, device)
    out = F.conv2d(x.float().cpu(), weight.float().cpu(), None, *geometry).shape
    tensors = [x, weight, scale.to(device), shift.to(device), make(out, dtype, device)]
    last = torch.channels_last
    return [t.contiguous(memory_format=last) if t.dim() == 4 else t for t in tensors], geometry


def stock(x, weight, scale, shift, residual, relu, *geometry) -> Tensor:
    """As in torchvision's blocks: convolution, batch norm, addition, ReLU."""
    if x.dtype == torch.float64:
        scale, shift = scale.double(), shift.double()
    statistics = torch.zeros_like(shift), torch.ones_like(scale)
    y = F.conv2d(x, weight, None, *geometry)
    y = F.batch_norm(y, *statistics, scale, shift, eps=0.0)
    if residual is not None:
        y = y + residual
    return torch.relu(y) if relu else y


def exact(x, weight, scale, shift, residual, relu, *geometry) -> Tensor:
    return stock(*map(lifted, (x, weight, scale, shift, residual)), relu, *geometry)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values(device, backend, poison, case, dtype):
    if interpreted(backend, device) and "many tiles" in case and dtype != torch.float32:
        pytest.skip("slow when interpreted; float32 and fewer tiles are tested")
    (x, weight, scale, shift, residual), geometry = operands(case, dtype, device)
    for layout in DENSE:
        x, added = LAYOUTS[layout](x), LAYOUTS[layout](residual)
        check = unchanged(x, weight, scale, shift, residual)
        variants = ((added, True), (None, True), (added, False), (None, False))
        for rest in variants[::3] if interpreted(backend, device) else variants:
            arguments = (x, weight, scale, shift, *rest, *geometry)
            y = fr.conv_bn_relu(*arguments)
            # In float32 the error depends on the order of summation: that of oneDNN's two
            # algorithms differs threefold over 2048 channels (2.8e-6 and 0.9e-6). One rounding of
            # the terms' sum covers that.
            sizes = (t if t is None else t.abs() for t in (*arguments[:4], rest[0]))
            terms = {"y": exact(*sizes, False, *geometry).max().item()}
            narrow = dtype in (torch.bfloat16, torch.float16)
            wanted = [y], [stock(*arguments)], [exact(*arguments)], dtype
            close(("y",), *wanted, None if narrow else terms)
            assert y.is_contiguous(memory_format=memory_format(x))
        check()


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_small_integers_are_exact(device, backend, poison, case, dtype):
    """Every product and sum is exact in float32: one wrong index changes the result."""
    (x, weight, scale, shift, residual), geometry = operands(case, torch.float32, device, integers)
    x, weight = x.clamp(-1, 1), weight.clamp(-1, 1)
    arguments = (x, weight, scale, shift, residual, True, *geometry)
    want = exact(*arguments)
    cast = [t.to(dtype) for t in (x, weight)]
    y = fr.conv_bn_relu(*cast, scale, shift, residual.to(dtype), True, *geometry)
    same(y, want.to(dtype))


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", ["3x3", "3x3, multiples of 16", "groups of 4", "stem"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(device, backend, poison, layout, case, dtype):
    if interpreted(backend, device) and (backend == "emulated") == (dtype == torch.float32):
        pytest.skip("slow when interpreted: bfloat16 if emulated, float32 by Triton")
    (x, weight, scale, shift, residual), geometry = operands(case, dtype, device)
    x, residual = LAYOUTS[layout](x), LAYOUTS[layout](residual)
    arguments = (x, weight, scale, shift, residual, True, *geometry)
    check = unchanged(x, weight, residual)
    close(("y",), [fr.conv_bn_relu(*arguments)], [stock(*arguments)], [exact(*arguments)], x.dtype)
    check()


@pytest.mark.pairwise(strength=3)
@pytest.mark.parametrize(
    "case", ["pointwise", "3x3, stride 2", "3x3, multiples of 16", "groups of 4", "stem"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, -0.0])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_special_values_propagate_as_in_stock(device, backend, dtype, case, value):
    (x, weight, scale, shift, residual), geometry = operands(case, dtype, device)
    # The reference is stock in float32: stock's bfloat16 stem turns Inf into NaN, because it
    # multiplies by zeros that pad the channels. Measured in bfloat16, with scale folded into the
    # weights: 0.013.
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    for target, at in ((x, (0, -1, 2, 3)), (residual, (0, 3, 1, 1))):
        original = target[at].item()
        target[at] = value
        variants = ((residual, True), (residual, False), (None, True))
        for rest in variants[:1] if interpreted(backend, device) else variants:
            arguments = (x, weight, scale, shift, *rest, *geometry)
            got = fr.conv_bn_relu(*arguments)
            wide = [t if t is None else t.float() for t in (*arguments[:4], rest[0])]
            want = stock(*wide, rest[1], *geometry).to(dtype)
            assert torch.equal(got.isnan(), want.isnan())
            finite = want.isfinite()
            assert torch.equal(got[~finite & ~want.isnan()], want[~finite & ~want.isnan()])
            torch.testing.assert_close(got[finite], want[finite], rtol=tolerance, atol=tolerance)
        target[at] = original


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_nan_and_infinite_parameters_stay_in_their_channel(device, backend, dtype):
    """A negative running variance gives a NaN scale."""
    (x, weight, scale, shift, residual), geometry = operands("3x3", dtype, device)
    scale[2], shift[5], shift[7] = float("nan"), float("inf"), -float("inf")
    arguments = (x, weight, scale, shift, residual, True, *geometry)
    got, want = fr.conv_bn_relu(*arguments), stock(*arguments)
    assert got[:, 2].isnan().all() and got[:, 5].isinf().all()
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


def test_folding_never_overflows_where_stock_is_finite(device, backend):
    x = torch.full((1, 32, 4, 4), 1e-3, dtype=torch.float16, device=device)
    weight = torch.full((16, 32, 1, 1), 6e4, dtype=torch.float16, device=device)
    scale, shift = torch.full((16,), 8.0, device=device), torch.zeros(16, device=device)
    y = fr.conv_bn_relu(x * 1e-2, weight, scale, shift)  # weight * scale overflows float16
    want = exact(x * 1e-2, weight, scale, shift, None, True, 1, 0, 1, 1)
    torch.testing.assert_close(y.double().cpu(), want, rtol=2e-3, atol=0)
    assert y.isfinite().all()


def test_residual_aliases_x(device, backend):
    (x, weight, scale, shift, _), geometry = operands("pointwise", torch.float32, device)
    check = unchanged(x)
    arguments = (x, weight, scale, shift, x, True, *geometry)
    close(("y",), [fr.conv_bn_relu(*arguments)], [stock(*arguments)], [exact(*arguments)], x.dtype)
    check()


@pytest.mark.slow_interpreted
@pytest.mark.pairwise
@pytest.mark.parametrize("case", ["3x3, stride 2", "asymmetric", "groups of 4", "stem"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_gradients(device, backend, dtype, relu, case):
    tensors, geometry = operands(case, dtype, device)
    sums = exact(*tensors, False, *geometry)
    near_zero = sums.abs() < 16 * torch.finfo(dtype).eps * sums.abs().max()
    dy = torch.where(near_zero, 0, torch.randn_like(sums))

    def gradients(function, inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = function(*inputs, relu, *geometry)
        return torch.autograd.grad(y, inputs, dy.to(y.device, y.dtype))

    mine, theirs = gradients(fr.conv_bn_relu, tensors), gradients(stock, tensors)
    wanted = gradients(stock, [lifted(t) for t in tensors])
    g = torch.where(sums > 0, dy, 0) if relu else dy
    terms = {"dshift": g.abs().sum((0, 2, 3)).max().item()}
    close(("dx", "dweight", "dscale", "dshift", "dresidual"), mine, theirs, wanted, dtype, terms)


@pytest.mark.slow_interpreted
def test_only_some_gradients(device, backend):
    tensors, geometry = operands("3x3", torch.float32, device)
    every = [t.clone().requires_grad_() for t in tensors]
    fr.conv_bn_relu(*every, True, *geometry).sum().backward()
    for mask in range(1, 32):
        some = [t.clone().requires_grad_(bool(mask >> i & 1)) for i, t in enumerate(tensors)]
        fr.conv_bn_relu(*some, True, *geometry).sum().backward()
        for t, full in zip(some, every, strict=True):
            assert (t.grad is not None) == t.requires_grad
            if t.requires_grad:
                torch.testing.assert_close(t.grad, full.grad, rtol=1e-5, atol=1e-5)
    assert not fr.conv_bn_relu(*tensors, True, *geometry).requires_grad


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
def test_first_and_second_derivatives(device, backend, relu):
    if backend == "triton":
        pytest.skip("float64 runs the reference, which is tested by itself")
    inputs = [
        randn(shape, torch.float64, device).requires_grad_()
        for shape in ((1, 4, 5, 4), (4, 2, 3, 3), (4,), (4,), (1, 4, 3, 2))
    ]

    def y_of(*tensors):
        return fr.conv_bn_relu(*tensors, relu, 2, 1, 1, 2)

    assert gradcheck(y_of, inputs)
    assert gradgradcheck(y_of, inputs)

    def of_weight(weight):  # every operand is computed from one tensor
        scale = weight.sum((1, 2, 3))
        return y_of(inputs[0] * scale.view(-1, 1, 1), weight, scale, scale * 2, None)

    assert gradgradcheck(of_weight, inputs[1:2])


def test_in_place_edit_of_the_output_raises(device, backend):
    tensors, geometry = operands("3x3", torch.float32, device)
    tensors[0].requires_grad_()
    y = fr.conv_bn_relu(*tensors, True, *geometry)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.slow_interpreted
def test_packed_weights_never_go_stale(device, backend):
    tensors, geometry = operands("3x3", torch.float32, device)
    _, weight, scale, shift, _ = tensors

    def check() -> None:
        arguments = (*tensors, True, *geometry)
        for _ in range(3):  # the third call uses cached packed weights
            torch.testing.assert_close(
                fr.conv_bn_relu(*arguments), stock(*arguments), rtol=1e-4, atol=1e-4
            )

    check()
    for t in (weight, scale, shift):
        t.mul_(1.5)
        check()
        t.data = t.data * 2
        check()
        t.set_(t.clone())
        check()
    tensors[1] = weight.clone()
    check()
    with torch.inference_mode():  # tensors have no version counter
        tensors[1] = weight * 3
        check()
        tensors[1].mul_(2)
        check()


def test_packed_weights_are_freed_with_the_weight(device, backend):
    (x, weight, scale, shift, _), geometry = operands("3x3", torch.float32, device)
    before = len(cache._cached)
    for _ in range(3):
        fr.conv_bn_relu(x, weight, scale, shift, None, True, *geometry)
    reference = weakref.ref(weight)
    del weight
    gc.collect()
    assert reference() is None and len(cache._cached) <= before


def test_empty(device, backend):
    x = torch.zeros(0, 8, 5, 5, device=device, requires_grad=True)
    weight = torch.ones(4, 8, 3, 3, device=device, requires_grad=True)
    y = fr.conv_bn_relu(x, weight, torch.ones(4, device=device), torch.ones(4, device=device))
    y.sum().backward()
    assert y.shape == (0, 4, 3, 3) and weight.grad.count_nonzero() == 0


def test_bitwise_repeatable(device, backend):
    tensors, geometry = operands("3x3, stride 2", torch.float32, device)
    first = fr.conv_bn_relu(*tensors, True, *geometry)
    for _ in range(5 if interpreted(backend, device) else 250):
        assert torch.equal(fr.conv_bn_relu(*tensors, True, *geometry), first)


@pytest.mark.slow_interpreted
def test_opcheck(device, backend):
    for layout in (*DENSE, "sliced"):
        (x, weight, scale, shift, residual), geometry = operands("3x3", torch.float32, device)
        x = LAYOUTS[layout](x)
        inputs = [t.requires_grad_() for t in (x, weight, scale, shift, residual)]
        pairs = [[v, v] for v in geometry[:3]]
        torch.library.opcheck(torch.ops.fused_resnet.conv_bn_relu, (*inputs, True, *pairs, 1))


@pytest.mark.pairwise(interpreted=8)
@pytest.mark.parametrize("case", CASES)
def test_fake_and_meta_tensors_have_the_real_strides(device, backend, case):
    tensors, geometry = operands(case, torch.bfloat16, device)
    for layout in ("contiguous", "channels_last", "sliced channels_last"):
        tensors[0] = LAYOUTS[layout](tensors[0])
        real = fr.conv_bn_relu(*tensors, True, *geometry)
        with FakeTensorMode() as mode:
            fake = fr.conv_bn_relu(*map(mode.from_tensor, tensors), True, *geometry)
        meta = (
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors
        )
        meta = fr.conv_bn_relu(*meta, True, *geometry)
        for t in (fake, meta):
            assert (t.shape, t.stride(), t.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_and_exports_as_one_graph(device, backend, compiler):
    class Block(torch.nn.Module):
        def forward(self, x, weight, scale, shift, residual):
            return fr.conv_bn_relu(x, weight, scale, shift, residual, True, 2, 1) * 2

    tensors, _ = operands("3x3, stride 2", torch.float32, device)
    tensors = [t.requires_grad_() for t in tensors]
    results = []
    for block in (Block(), torch.compile(Block(), fullgraph=True, backend=compiler)):
        y = block(*tensors)
        results.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
    for want, got in zip(*results, strict=True):
        # A fused y * 2 * 2 rounds differently; gradients up to 520 differed by 6e-5 (1.2e-7).
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())
    with torch.no_grad():
        same(torch.export.export(Block(), tuple(tensors)).module()(*tensors), results[0][0])


def test_autocast(device, backend):
    tensors, geometry = operands("3x3", torch.float32, device)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = [t.to(dtype) if t.dim() == 4 else t for t in tensors]
        want = fr.conv_bn_relu(*narrow, True, *geometry)
        with torch.autocast(device, dtype):
            same(fr.conv_bn_relu(*tensors, True, *geometry), want)
            with torch.autocast(device, enabled=False):
                assert fr.conv_bn_relu(*tensors, True, *geometry).dtype == torch.float32


def test_function_transforms(device, backend):
    tensors, geometry = operands("3x3", torch.float64, device)
    xs = torch.stack([tensors[0], tensors[0] * 2])

    def y_of(x, weight):
        return fr.conv_bn_relu(x, weight, *tensors[2:], True, *geometry)

    want = torch.stack([y_of(x, tensors[1]) for x in xs])
    torch.testing.assert_close(torch.func.vmap(y_of, (0, None))(xs, tensors[1]), want)
    loss = lambda x, w: y_of(x, w).square().sum()  # noqa: E731
    per_sample = torch.func.vmap(torch.func.grad(loss, 1), (0, None))(xs, tensors[1])
    for got, x in zip(per_sample, xs, strict=True):
        weight = tensors[1].clone().requires_grad_()
        torch.testing.assert_close(got, torch.autograd.grad(loss(x, weight), weight)[0])


ERRORS = {
    "3-D": (lambda a: {"x": a["x"][0]}, ValueError, "x must be 4-D (N, C, H, W), got 3-D of shape"),
    "uint8": (lambda a: {"x": a["x"].byte()}, RuntimeError, "got uint8; convert it first"),
    "channels": (
        lambda a: {"x": torch.zeros(2, 9, 6, 6)},
        RuntimeError,
        "weight of shape (4, 8, 3, 3) with groups=1 takes 8 input channels, but x has 9",
    ),
    "dtype of weight": (
        lambda a: {"weight": a["weight"].half()},
        RuntimeError,
        "weight must be float32 on cpu as x is, got float16 of shape (4, 8, 3, 3) on cpu",
    ),
    "device of weight": (
        lambda a: {"weight": a["weight"].to("meta")},
        RuntimeError,
        "weight must be float32 on cpu as x is, got float32 of shape (4, 8, 3, 3) on meta",
    ),
    "3-D weight": (lambda a: {"weight": a["weight"][0]}, RuntimeError, "weight must be 4-D"),
    "scale": (
        lambda a: {"scale": torch.ones(8)},
        RuntimeError,
        "scale must be floating point of shape (4,) on cpu, got float32 of shape (8,)",
    ),
    "shift": (
        lambda a: {"shift": torch.ones(4, dtype=torch.int64)},
        RuntimeError,
        "shift must be floating point of shape (4,) on cpu, got int64 of shape (4,)",
    ),
    "residual would broadcast": (
        lambda a: {"residual": torch.zeros(1, 4, 4, 4)},
        RuntimeError,
        "residual must be float32 of shape (2, 4, 4, 4) on cpu, got float32 of shape (1, 4, 4, 4)",
    ),
    "residual's dtype": (
        lambda a: {"residual": torch.zeros(2, 4, 4, 4).half()},
        RuntimeError,
        "residual must be float32 of shape (2, 4, 4, 4) on cpu, got float16",
    ),
    "stride": (lambda a: {"stride": 0}, RuntimeError, "stride must be at least 1, got (0, 0)"),
    "padding": (lambda a: {"padding": -1}, RuntimeError, "padding must be at least 0, got"),
    "three strides": (lambda a: {"stride": (1, 1, 1)}, ValueError, "one or two integers, got (1,"),
    "groups": (lambda a: {"groups": 3}, RuntimeError, "with groups=3 takes 24 input channels"),
    "H smaller than the kernel": (
        lambda a: {"x": torch.zeros(2, 8, 2, 6)},
        RuntimeError,
        "H of x must be positive and, padded, at least the kernel's extent: got 2 + 2*0 for an",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error_messages(case):
    change, error, words = ERRORS[case]
    arguments = {
        "x": torch.zeros(2, 8, 6, 6),
        "weight": torch.zeros(4, 8, 3, 3),
        "scale": torch.ones(4),
        "shift": torch.zeros(4),
    }
    fr.conv_bn_relu(**arguments)
    with pytest.raises(error, match="conv_bn_relu: .*" + re.escape(words)):
        fr.conv_bn_relu(**{**arguments, **change(arguments)})
