"""add_relu and its backward: values, layouts, derivatives, tracing, errors."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

import fused_resnet as fr
from tests.ops.op_cases import (
    DENSE,
    DTYPES,
    LAYOUTS,
    SHAPES,
    expected_strides,
    integers,
    randn,
    same,
    skip_if_too_large,
    unchanged,
)

OP = "add_relu"
ODD = (3, 33, 7, 5)


def stock(x: Tensor, residual: Tensor) -> Tensor:
    return torch.relu(x + residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_stock_bit_by_bit(device, backend, poison, shape, dtype):
    # Both round the sum once: the results are identical.
    for layout in DENSE:
        x, residual, dy = (
            LAYOUTS[layout](randn(SHAPES[shape], dtype, device)).requires_grad_() for _ in range(3)
        )
        y, want = fr.add_relu(x, residual), stock(x, residual)
        same(y, want)
        assert y.stride() == x.stride()
        mine = torch.autograd.grad(y, (x, residual), dy)
        for got, expected in zip(mine, torch.autograd.grad(want, (x, residual), dy), strict=True):
            same(got, expected)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual_layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_any_layout(device, backend, poison, x_layout, residual_layout, dtype):
    x = LAYOUTS[x_layout](integers(ODD, dtype, device))
    residual = LAYOUTS[residual_layout](integers(ODD, dtype, device))
    dy = LAYOUTS[residual_layout](integers(ODD, dtype, device))
    check = unchanged(x, residual, dy)
    y = fr.add_relu(x, residual)
    same(y, stock(x, residual))
    assert y.stride() == expected_strides(x)
    same(torch.ops.fused_resnet.add_relu_backward(dy, y), torch.where(y > 0, dy, 0))
    same(torch.ops.fused_resnet.add_relu_backward(dy, x), torch.where(x > 0, dy, 0))
    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(device, backend, dtype):
    big, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 2
    values = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        float("nan"),
        float("inf"),
        -float("inf"),
        big,
        -big,
        tiny,
        -tiny,
    ]
    column = torch.tensor(values, dtype=torch.float64).to(device, dtype)
    pairs = torch.cartesian_prod(column, column)
    x, residual = (pairs[:, i].reshape(1, 11, 11, 1) for i in range(2))
    y, want = fr.add_relu(x, residual), stock(x, residual)
    same(y, want)
    if device == "cpu" and backend != "emulated":  # stock keeps -0.0 on the CPU
        not_nan = ~want.isnan()
        assert torch.equal(torch.signbit(y)[not_nan], torch.signbit(want)[not_nan])
    dy = torch.arange(1.0, 122.0, device=device).to(dtype).view_as(x)
    mine = torch.ops.fused_resnet.add_relu_backward(dy, y)
    same(mine, torch.ops.aten.threshold_backward(dy, want, 0))


def test_16_bit_conversions_are_exact(device, backend):
    """Every bfloat16 and float16 value is preserved, including subnormals, NaN and Inf."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(1, 64, 32, 32)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.to(device).view(dtype)
        same(fr.add_relu(x, torch.zeros_like(x)), torch.relu(x))
        half = x * 0.5
        same(fr.add_relu(half, x), stock(half, x))


def test_residual_aliases_x(device, backend):
    x = randn(ODD, torch.float32, device).requires_grad_()
    check = unchanged(x)
    y = fr.add_relu(x, x)
    same(y, torch.relu(2 * x))
    (dx,) = torch.autograd.grad(y.sum(), x)
    same(dx, torch.where(x > 0, 2.0, 0.0))
    check()


@pytest.mark.pairwise
@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_layout", [name for name in LAYOUTS if name != "expanded"])
@pytest.mark.parametrize("x_layout", DENSE)
def test_out(device, backend, poison, x_layout, out_layout, dtype):
    x, residual = (LAYOUTS[x_layout](integers(ODD, dtype, device)) for _ in range(2))
    want = stock(x, residual)
    check = unchanged(x, residual)
    out = LAYOUTS[out_layout](torch.zeros(ODD, dtype=dtype, device=device))
    strides, address = out.stride(), out.data_ptr()
    assert fr.add_relu(x, residual, out=out) is out
    assert (out.stride(), out.data_ptr()) == (strides, address)
    same(out, want)
    check()
    version = x._version
    assert fr.add_relu(x, residual, out=x) is x and x._version > version
    same(x, want)
    want = stock(x, residual)
    same(fr.add_relu(x, residual, out=residual), want)


def test_out_overlaps_its_inputs(device, backend):
    memory = integers((4, *ODD[1:]), torch.float32, device)
    want = stock(memory[:3], memory[1:])
    same(fr.add_relu(memory[:3], memory[1:], out=memory[1:]), want)


def test_out_is_checked(device, backend):
    x = torch.zeros(2, 5, 4, 4, device=device)
    for out in (x.half(), x[:1].clone(), torch.empty(0, device=device)):
        with pytest.raises(RuntimeError, match="add_relu: out must be float32 of shape"):
            fr.add_relu(x, x, out=out)
    with pytest.raises(RuntimeError, match=r"expanded|single memory location"):
        fr.add_relu(x, x, out=torch.zeros(2, 1, 4, 4, device=device).expand_as(x))
    with pytest.raises(RuntimeError, match="out= does not support automatic differentiation"):
        fr.add_relu(x.clone().requires_grad_(), x, out=x)
    with torch.no_grad():
        same(fr.add_relu(x.clone().requires_grad_(), x + 1, out=x), x * 0 + 1)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(device, backend, shape):
    x = torch.zeros(shape, device=device, requires_grad=True)
    y = fr.add_relu(x, x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape


@pytest.mark.slow_interpreted
def test_first_and_second_derivatives(device, backend):
    x, residual = (
        LAYOUTS["channels_last"](randn((2, 3, 3, 2), torch.float64, device)).requires_grad_()
        for _ in range(2)
    )
    assert gradcheck(fr.add_relu, (x, residual))
    assert gradgradcheck(fr.add_relu, (x, residual))


def test_only_required_gradients(device, backend):
    x, residual = randn(ODD, torch.float32, device), randn(ODD, torch.float32, device)
    assert not fr.add_relu(x, residual).requires_grad
    for required in ((True, False), (False, True)):
        inputs = [t.clone().requires_grad_(a) for t, a in zip((x, residual), required, strict=True)]
        y = fr.add_relu(*inputs)
        y.sum().backward()
        assert [t.grad is not None for t in inputs] == list(required)
        same(inputs[required.index(True)].grad, (y > 0).float())


def test_in_place_edit_of_the_output_raises(device, backend):
    x = randn(ODD, torch.float32, device).requires_grad_()
    y = fr.add_relu(x, x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_bitwise_repeatable(device, backend):
    torch.use_deterministic_algorithms(True)
    x, residual = (
        randn((2, 5, 3, 3), torch.float32, device),
        randn((2, 5, 3, 3), torch.float32, device),
    )
    first = fr.add_relu(x, residual)
    assert all(torch.equal(fr.add_relu(x, residual), first) for _ in range(250))


@pytest.mark.slow_interpreted
def test_opcheck(device, backend):
    for layout in (*DENSE, "sliced", "dimensions reversed"):
        x = LAYOUTS[layout](randn(ODD, torch.float32, device)).requires_grad_()
        residual = randn(ODD, torch.float32, device).requires_grad_()
        torch.library.opcheck(torch.ops.fused_resnet.add_relu, (x, residual))
        torch.library.opcheck(torch.ops.fused_resnet.add_relu_backward, (x, residual.detach()))
        out = torch.empty_like(residual.detach())
        torch.library.opcheck(
            torch.ops.fused_resnet.add_relu_out, (x.detach(), residual.detach(), out)
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_and_meta_tensors_have_the_real_strides(device, backend, layout):
    for shape in (ODD, SHAPES["smallest"], SHAPES["one image"]):
        x = LAYOUTS[layout](randn(shape, torch.bfloat16, device))
        residual = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        y = fr.add_relu(x, residual)
        with FakeTensorMode() as mode:
            fake = fr.add_relu(mode.from_tensor(x), mode.from_tensor(residual))
        meta = fr.add_relu(x.to("meta"), residual.to("meta"))
        for t in (fake, meta):
            assert (t.shape, t.stride(), t.dtype) == (y.shape, y.stride(), y.dtype)


def test_compiles_and_exports_as_one_graph(device, backend):
    class Block(torch.nn.Module):
        def forward(self, x, residual):
            return fr.add_relu(x * 2, residual) + 1

    x, residual = (
        randn(ODD, torch.float32, device).requires_grad_(),
        randn(ODD, torch.float32, device),
    )
    want = Block()(x, residual)
    got = torch.compile(Block(), fullgraph=True, backend="aot_eager")(x, residual)
    same(got, want)
    same(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, want)))
    with torch.no_grad():
        same(torch.export.export(Block(), (x, residual)).module()(x, residual), want)
        out = torch.zeros_like(residual)
        in_place = torch.compile(
            lambda x, residual, out: fr.add_relu(x, residual, out=out) * 2,
            fullgraph=True,
            backend="aot_eager",
        )
        same(in_place(x.detach(), residual, out), 2 * stock(x, residual))
        same(out, stock(x, residual))


def test_autocast_keeps_float32(device, backend):
    x = randn(ODD, torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        y = fr.add_relu(x, x)
        with torch.autocast(device, enabled=False):
            same(fr.add_relu(x, x), y)
    assert y.dtype == stock(x, x).dtype == torch.float32


def test_function_transforms(device, backend):
    x, residual = randn((4, *ODD), torch.float32, device), randn((4, *ODD), torch.float32, device)
    same(torch.func.vmap(fr.add_relu)(x, residual), stock(x, residual))

    def loss(x: Tensor, residual: Tensor) -> Tensor:
        return fr.add_relu(x, residual).square().sum()

    want = torch.func.grad(lambda x, r: stock(x, r).square().sum())(x[0], residual[0])
    same(torch.func.grad(loss)(x[0], residual[0]), want)
    same(torch.func.vmap(torch.func.grad(loss))(x, residual)[0], want)
    tangent = torch.ones_like(x[0])
    _, forward = torch.func.jvp(fr.add_relu, (x[0], residual[0]), (tangent, tangent))
    same(forward, 2.0 * (x[0] + residual[0] > 0))


ERRORS = {
    "3-D": (lambda x: (x[0], x[0]), ValueError, "x must be 4-D (N, C, H, W), got 3-D of shape (5,"),
    "would broadcast": (
        lambda x: (x, x[:, :1]),
        RuntimeError,
        "residual must be float32 of shape (2, 5, 4, 4) on cpu, got float32 of shape (2, 1, 4, 4)",
    ),
    "other dtype": (lambda x: (x, x.half()), RuntimeError, "on cpu, got float16 of shape (2, 5"),
    "uint8": (lambda x: (x.byte(), x.byte()), RuntimeError, "got uint8; convert it first"),
    "other device": (lambda x: (x, x.to("meta")), RuntimeError, "(2, 5, 4, 4) on meta"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error_messages(case):
    make, error, words = ERRORS[case]
    with pytest.raises(error, match="add_relu: .*" + re.escape(words)):
        fr.add_relu(*make(torch.zeros(2, 5, 4, 4)))


def test_backward_checks_dy():
    y = torch.zeros(2, 5, 4, 4)
    with pytest.raises(RuntimeError, match="add_relu_backward: dy must be float32"):
        torch.ops.fused_resnet.add_relu_backward(y[:, :1], y)


@pytest.mark.large
def test_more_than_two_to_the_31_elements(device, backend):
    skip_if_too_large(backend, device)
    N = 2**31 // (2**11 * 2**11) + 1
    x = torch.zeros(N, 1, 2**11, 2**11, dtype=torch.bfloat16, device=device)
    x[-1, 0, -1, -5:] = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0])
    y = fr.add_relu(x, x)
    assert y[-1, 0, -1, -5:].tolist() == [2.0, 0.0, 6.0, 0.0, 10.0]
    assert y[0, 0, 0].count_nonzero() == 0 and y[-1, 0, -1, :-5].count_nonzero() == 0


def test_concurrent_calls(device, backend):
    inputs = [randn((4, 64, 14, 14), torch.float32, device) for _ in range(8)]
    serial = [F.relu(x + x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for got, want in zip(
                pool.map(lambda x: fr.add_relu(x, x), inputs), serial, strict=True
            ):
                same(got, want)
