"""bn_add_relu and its backward: values, gradients, layouts, numerics, tracing, errors."""

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
from fused_resnet.tolerance import measure_error
from tests.ops.op_cases import (
    DENSE,
    DTYPES,
    LAYOUTS,
    SHAPES,
    close,
    expected_strides,
    integers,
    interpreted,
    lifted,
    randn,
    same,
    skip_if_too_large,
    unchanged,
)

OP = "bn_add_relu"
EPS = 1e-5
ODD = (3, 33, 7, 5)
NAMES = ("y", "mean", "var", "dx", "dweight", "dbias", "dresidual")


def stock(x, weight, bias, residual, eps=EPS, relu=True) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean, biased var as in torchvision's blocks; momentum 1 returns the batch statistics."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    stats = acc if weight is None else weight.dtype
    mean, var = (torch.zeros(x.shape[1], dtype=stats, device=x.device) for _ in range(2))
    y = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=1.0, eps=eps)
    if residual is not None:
        y = y + residual
    count = x.numel() // x.shape[1]
    return torch.relu(y) if relu else y, mean, var * ((count - 1) / count)


def safe_dy(x, weight, bias, residual, dtype, eps=EPS) -> Tensor:
    """A random gradient of y, 0 where a rounding decides the ReLU's sign: the gradient is
    discontinuous there and cannot be tested."""
    sums = stock(*map(lifted, (x, weight, bias, residual)), eps, relu=False)[0]
    margin = max(sums.abs().max().item(), 1.0) * torch.finfo(dtype).eps * 8
    return torch.where(sums.abs() < margin, 0, torch.randn_like(sums)).to(x.device, dtype)


def with_gradients(function, x, weight, bias, residual, dy, relu=True) -> list[Tensor]:
    inputs = [
        None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, residual)
    ]
    y, mean, var = function(*inputs, EPS, relu)
    wanted = [t for t in inputs if t is not None]
    return [y, mean, var, *torch.autograd.grad(y, wanted, dy.to(y.device, y.dtype))]


def names_of(weight, bias, residual) -> list[str]:
    absent = [
        name
        for name, t in (("dweight", weight), ("dbias", bias), ("dresidual", residual))
        if t is None
    ]
    return [name for name in NAMES if name not in absent]


def compare(x, weight, bias, residual, relu=True, roundings_of_var=0) -> list[Tensor]:
    """Asserts the tolerance rule for outputs and gradients; returns them."""
    dy = safe_dy(x, weight, bias, residual, x.dtype)
    check = unchanged(x, weight, bias, residual, dy)
    mine = with_gradients(fr.bn_add_relu, x, weight, bias, residual, dy, relu)
    check()
    theirs = with_gradients(stock, x, weight, bias, residual, dy, relu)
    exact = with_gradients(stock, *map(lifted, (x, weight, bias, residual)), lifted(dy), relu)
    names = names_of(weight, bias, residual)
    terms = terms_of(*map(lifted, (x, weight, bias, residual)), lifted(dy), relu)
    if roundings_of_var:
        terms["var"] = roundings_of_var * exact[2].max().item()
    close(names, mine, theirs, exact, x.dtype, terms)
    return mine


def terms_of(x, weight, bias, residual, dy, relu) -> dict[str, float]:
    """The sum of the magnitudes of each result's terms (see `close`); all arguments float64."""
    y, mean, var = stock(x, weight, bias, residual, EPS, relu)
    gain = ((1 if weight is None else weight.abs()) * (var + EPS).rsqrt()).view(-1, 1, 1)
    xhat = (x - mean.view(-1, 1, 1)).abs() * (var + EPS).rsqrt().view(-1, 1, 1)
    g = (torch.where(y > 0, dy, 0) if relu else dy).abs()
    added = (t.abs().max() for t in (bias, residual) if t is not None)
    of_xhat = (xhat.sum((0, 2, 3)) / (x.numel() // x.shape[1])).view(-1, 1, 1)
    of_g = g.mean((0, 2, 3), keepdim=True)
    scale = 1 if weight is None else weight.abs().view(-1, 1, 1)
    return {
        "mean": x.abs().max().item(),
        "y": ((xhat * scale).max() + sum(added)).item(),
        "dx": (gain * (g + xhat * of_xhat + of_g)).max().item(),
        # xhat and its product with g are both rounded. Measured: 1.2 roundings.
        "dweight": 2 * (g * xhat).sum((0, 2, 3)).max().item(),
        "dbias": g.sum((0, 2, 3)).max().item(),
    }


def operands(shape, dtype, device, layout="channels_last", parameters=None):
    """x, weight, bias, residual; no value is 0 or 1, so that omitting one changes the result."""
    C = shape[1]
    x = LAYOUTS[layout](randn(shape, dtype, device) * 2 + 0.7)
    residual = LAYOUTS[layout](randn(shape, dtype, device))
    weight = (torch.rand(C) + 0.5) * torch.where(torch.arange(C) % 5 == 4, -1.0, 1.0)
    bias = torch.randn(C)
    parameters = parameters or dtype
    return x, weight.to(device, parameters), bias.to(device, parameters), residual


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(device, backend, poison, shape, dtype):
    for layout in DENSE:
        x, weight, bias, residual = operands(SHAPES[shape], dtype, device, layout)
        mine = compare(x, weight, bias, residual)
        assert mine[0].stride() == x.stride()
        if not interpreted(backend, device):  # covered by test_optional_arguments
            compare(x, weight, bias, None, relu=False)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
@pytest.mark.parametrize("absent", ["weight", "bias", "both", "residual", "all"])
def test_optional_arguments(device, backend, poison, absent, relu):
    for layout in DENSE:
        x, weight, bias, residual = operands(ODD, torch.float32, device, layout)
        weight = None if absent in ("weight", "both", "all") else weight
        bias = None if absent in ("bias", "both", "all") else bias
        residual = None if absent in ("residual", "all") else residual
        compare(x, weight, bias, residual, relu)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(device, backend, poison, layout, other, dtype):
    x, weight, bias, _ = operands(ODD, dtype, device, layout)
    residual = LAYOUTS[other](randn(ODD, dtype, device))
    y = compare(x, weight, bias, residual)[0]
    assert y.stride() == expected_strides(x)


def test_gradient_in_another_layout(device, backend, poison):
    x, weight, bias, residual = operands(ODD, torch.float32, device)
    dy = safe_dy(x, weight, bias, residual, x.dtype)
    want = with_gradients(fr.bn_add_relu, x, weight, bias, residual, dy.contiguous())
    for layout in LAYOUTS:
        if layout != "expanded":
            mine = with_gradients(fr.bn_add_relu, x, weight, bias, residual, LAYOUTS[layout](dy))
            for got, expected in zip(mine, want, strict=True):
                same(got, expected)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_16_bit_data_with_float32_parameters(device, backend, dtype):
    mine = compare(*operands(ODD, dtype, device, parameters=torch.float32))
    assert [t.dtype for t in mine] == [
        dtype,
        *[torch.float32] * 2,
        dtype,
        *[torch.float32] * 2,
        dtype,
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_integers_are_exact(device, backend, dtype):
    """Sums and sums of squares of small integers are exact; N * H * W is a power of two."""
    for layout in DENSE:
        x = LAYOUTS[layout](integers((4, 37, 8, 4), dtype, device))
        _, mean, var = fr.bn_add_relu(x)
        exact = lifted(x).transpose(0, 1).flatten(1)
        # PyTorch's operations sum rounded differences, which is not exact.
        allowed = 2**-22 if backend == "reference" else 0
        torch.testing.assert_close(lifted(mean), exact.mean(1), rtol=0, atol=0)
        torch.testing.assert_close(
            lifted(var), exact.var(1, correction=0), rtol=max(allowed, 2**-24), atol=0
        )


@pytest.mark.parametrize("layout", DENSE)
def test_large_mean_small_deviation(device, backend, layout):
    """Mean 1e4, standard deviation 1: E[x^2] - E[x]^2 in float32 has an error of 1."""
    x = LAYOUTS[layout](torch.randn(8, 24, 14, 14) + 1e4).to(device)
    mine = fr.bn_add_relu(x, relu=False)
    exact = stock(lifted(x), None, None, None, relu=False)
    error = measure_error(mine[0], exact[0])
    theirs = measure_error(stock(x, None, None, None, relu=False)[0], exact[0])
    # The reference uses PyTorch's operations, which round the mean: error 1.1e-3, stock's 0.9e-3.
    assert error.max_abs <= (2 * theirs.max_abs if backend == "reference" else 2e-5)
    if backend != "reference":
        compare(x, None, None, None)


@pytest.mark.parametrize("layout", DENSE)
def test_first_values_far_from_the_mean(device, backend, layout):
    """Kernels centre their sums on the first values; an outlier there must not reduce accuracy."""
    x = torch.randn(8, 6, 40, 40)
    x[0, 0, 0, :16], x[0, 1, 0, 0], x[0, 2] = 1e3, -1e6, 50.0
    x[7, 3] = 1e4
    x[:, 4] = torch.linspace(0, 1e3, 8).view(8, 1, 1) + torch.randn(8, 40, 40) * 1e-2
    # Stock accumulates in float64 on the CPU. The GPU kernels accumulate in float32 and lose what
    # is small compared to the square of -1e6. Measured: 7 roundings for Triton, 2 for CUDA.
    roundings = 8 if device != "cpu" or interpreted(backend, device) else 0
    x = LAYOUTS[layout](x).to(device)
    compare(x, torch.rand(6).to(device), None, None, roundings_of_var=roundings)


@pytest.mark.parametrize("layout", DENSE)
def test_constant_channel(device, backend, layout):
    x = torch.randn(4, 3, 6, 6)
    x[:, 1] = 0.1
    x = LAYOUTS[layout](x).to(device).requires_grad_()
    bias = torch.tensor([0.5, 0.25, -1.0], device=device)
    y, _, var = fr.bn_add_relu(x, None, bias)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert y.isfinite().all() and dx.isfinite().all() and var[1] <= 1e-15
    # The mean of 0.1 is not exact in float32; its rounding error is divided by sqrt(eps), 3e-3.
    # Measured for the reference: 4.7e-6.
    torch.testing.assert_close(
        y[:, 1], torch.full((4, 6, 6), 0.25, device=device), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan")])
def test_eps_must_be_positive(device, backend, eps):
    with pytest.raises(ValueError, match=f"bn_add_relu: eps must be positive, got {eps}"):
        fr.bn_add_relu(torch.randn(4, 3, 6, 6, device=device), eps=eps)


def test_variance_near_eps(device, backend):
    """With a variance near eps, a wrong or missing eps changes the result."""
    x = (torch.randn(4, 5, 6, 6) * 3e-3).to(device)
    compare(x, torch.rand(5, device=device), None, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", DENSE)
def test_nan_and_inf_stay_in_their_channel(device, backend, layout, value):
    x, weight, bias, residual = operands((4, 20, 6, 6), torch.float32, device, layout)
    x[2, 3, 4, 5] = value
    residual[1, 7, 2, 2] = value
    mine, theirs = fr.bn_add_relu(x, weight, bias, residual), stock(x, weight, bias, residual)
    for got, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert mine[0][:, 3].isnan().all() and mine[2][3].isnan()
    assert mine[0][1, 7, 2, 2].item() in (0.0, float("inf")) or value != value


@pytest.mark.parametrize("layout", DENSE)
def test_squares_beyond_float32(device, backend, layout):
    x = LAYOUTS[layout](torch.randn(4, 5, 6, 6) * 1e19).to(device)
    got = fr.bn_add_relu(x, relu=False)
    # The sum of 144 values of 1e38 overflows float32, the variance does not: no worse than stock.
    exact = stock(lifted(x), None, None, None, relu=False)
    theirs = measure_error(stock(x, None, None, None, relu=False)[0], exact[0]).max_abs
    assert measure_error(got[0], exact[0]).max_abs <= max(theirs, 1e-5)


def test_relu_of_infinite_residuals(device, backend):
    x = torch.randn(2, 3, 4, 4, device=device)
    residual = torch.zeros_like(x)
    residual[0, 0, 0], residual[0, 0, 1] = -float("inf"), float("inf")
    y = fr.bn_add_relu(x, None, None, residual)[0]
    assert (y[0, 0, 0] == 0).all() and y[0, 0, 1].isinf().all()


def test_residual_aliases_x(device, backend):
    x, weight, bias, _ = operands(ODD, torch.float32, device)
    dy = safe_dy(x, weight, bias, x, x.dtype)
    check = unchanged(x)

    def run(function, x, *rest):
        x = x.detach().requires_grad_()
        y = function(x, *rest, x)[0]
        return [y, torch.autograd.grad(y, x, dy.to(y.dtype))[0]]

    mine = run(fr.bn_add_relu, x, weight, bias)
    exact = run(stock, *map(lifted, (x, weight, bias)))
    close(("y", "dx"), mine, run(stock, x, weight, bias), exact, x.dtype)
    check()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(device, backend, shape):
    x = torch.zeros(shape, device=device, requires_grad=True)
    weight, bias = torch.ones(2, 3, device=device, requires_grad=True)
    weight.retain_grad()
    y, mean, var = fr.bn_add_relu(x, weight, bias, x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert mean.tolist() == var.tolist() == weight.grad.tolist() == [0.0] * 3


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 1, 1, 1)], ids=str)
def test_one_value_per_channel(device, backend, shape):
    with pytest.raises(ValueError, match=r"more than 1 value per channel.*got input size"):
        fr.bn_add_relu(torch.zeros(shape, device=device))


@pytest.mark.slow_interpreted
@pytest.mark.pairwise
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
def test_first_and_second_derivatives(device, backend, relu, layout):
    shape = (2, 2, 3, 1) if interpreted(backend, device) else (2, 3, 3, 2)
    inputs = [t.requires_grad_() for t in operands(shape, torch.float64, device, layout)]

    def y_of(x, weight, bias, residual):
        return fr.bn_add_relu(x, weight, bias, residual, EPS, relu)[0]

    assert gradcheck(y_of, inputs)
    assert gradgradcheck(y_of, inputs)

    def of_x(x):  # every operand is computed from one tensor
        weight = x.square().mean((0, 2, 3))
        return y_of(x, weight, weight * 2, x * 3)

    assert gradgradcheck(of_x, inputs[:1])


def test_backward_op_is_not_differentiable(device, backend):
    x = randn(ODD, torch.float32, device).requires_grad_()
    y, mean, var = fr.bn_add_relu(x)
    with pytest.raises(NotImplementedError, match="differentiate bn_add_relu twice"):
        torch.ops.fused_resnet.bn_add_relu_backward(
            y.detach(), x, y.detach(), None, mean, var, EPS, True, True, False
        )[0].sum().backward()


def test_only_some_gradients(device, backend, monkeypatch):
    """Only the required gradients are computed; dresidual alone needs no reduction."""
    x, weight, bias, residual = operands(ODD, torch.float32, device)
    dy = safe_dy(x, weight, bias, residual, x.dtype)
    every = with_gradients(fr.bn_add_relu, x, weight, bias, residual, dy)[3:]
    for mask in range(1, 16):
        required = [bool(mask >> i & 1) for i in range(4)]
        inputs = [
            t.detach().clone().requires_grad_(a)
            for t, a in zip((x, weight, bias, residual), required, strict=True)
        ]
        y = fr.bn_add_relu(*inputs)[0]
        with torch.profiler.profile() as profile:
            y.backward(dy)
        ran = {event.key for event in profile.key_averages()}
        assert ("fused_resnet::bn_add_relu_backward" in ran) == any(required[:3])
        for t, a, want in zip(inputs, required, every, strict=True):
            assert (t.grad is not None) == a
            if a:
                same(t.grad, want)
    assert not fr.bn_add_relu(x, weight, bias, residual)[0].requires_grad


def test_statistics_are_not_differentiable(device, backend):
    _, mean, var = fr.bn_add_relu(randn(ODD, torch.float32, device).requires_grad_())
    assert not mean.requires_grad and not var.requires_grad


def test_in_place_edit_of_the_output_raises(device, backend):
    x = randn(ODD, torch.float32, device).requires_grad_()
    y = fr.bn_add_relu(x)[0]
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = fr.bn_add_relu(x, relu=False)[0]
    y.mul_(2)  # without a ReLU, y is not saved, as in stock
    y.sum().backward()


@pytest.mark.slow_interpreted
def test_bitwise_repeatable(device, backend):
    torch.use_deterministic_algorithms(True)
    arguments = operands((4, 48, 20, 20), torch.float32, device)
    dy = randn((4, 48, 20, 20), torch.float32, device)
    first = with_gradients(fr.bn_add_relu, *arguments, dy)
    for _ in range(5 if interpreted(backend, device) else 250):
        repeated = with_gradients(fr.bn_add_relu, *arguments, dy)
        assert all(torch.equal(a, b) for a, b in zip(repeated, first, strict=True))


@pytest.mark.slow_interpreted
def test_opcheck(device, backend):
    for layout in (*DENSE, "sliced"):
        arguments = [t.requires_grad_() for t in operands(ODD, torch.float32, device, layout)]
        torch.library.opcheck(torch.ops.fused_resnet.bn_add_relu, (*arguments, EPS, True))
    x, _, bias, _ = arguments
    torch.library.opcheck(torch.ops.fused_resnet.bn_add_relu, (x, None, bias, None, EPS, False))
    with torch.no_grad():
        x, weight, bias, residual = operands(ODD, torch.float32, device)
        y, mean, var = fr.bn_add_relu(x, weight, bias, residual)
        for flags in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                torch.ops.fused_resnet.bn_add_relu_backward,
                (residual, x, y, weight, mean, var, EPS, True, *flags),
            )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_and_meta_tensors_have_the_real_strides(device, backend, layout):
    for shape in (ODD, SHAPES["smallest"], SHAPES["one image"]):
        x, weight, bias, residual = operands(shape, torch.bfloat16, device, layout)
        real = fr.bn_add_relu(x, weight, bias, residual)
        backward = torch.ops.fused_resnet.bn_add_relu_backward
        rest = (EPS, True, True, True)
        real += backward(residual, x, real[0], weight, *real[1:], *rest)
        with FakeTensorMode() as mode:
            f = [mode.from_tensor(t) for t in (x, weight, bias, residual)]
            fake = fr.bn_add_relu(*f)
            fake += backward(f[3], f[0], fake[0], f[1], *fake[1:], *rest)
        m = [t.to("meta") for t in (x, weight, bias, residual)]
        meta = fr.bn_add_relu(*m)
        for ours in (fake, (*meta, *real[3:])):
            for t, y in zip(ours, real, strict=True):
                assert (t.shape, t.stride(), t.dtype) == (y.shape, y.stride(), y.dtype)


def test_compiles_and_exports_as_one_graph(device, backend):
    class Block(torch.nn.Module):
        def forward(self, x, weight, bias, residual):
            y, mean, var = fr.bn_add_relu(x, weight, bias, residual)
            return y * 2, mean + var

    arguments = [t.requires_grad_() for t in operands(ODD, torch.float32, device)]
    compiled = torch.compile(Block(), fullgraph=True, backend="aot_eager")
    results = []
    for block in (Block(), compiled):
        y, stats = block(*arguments)
        results.append((y, stats, *torch.autograd.grad(y.square().sum(), arguments)))
    for want, got in zip(*results, strict=True):
        same(got, want)
    with torch.no_grad():
        exported = torch.export.export(Block(), tuple(arguments)).module()
        same(exported(*arguments)[0], results[0][0])


def test_autocast(device, backend):
    x, weight, bias, residual = operands(ODD, torch.bfloat16, device, parameters=torch.float32)
    want = fr.bn_add_relu(x, weight, bias, residual)
    with torch.autocast(device, torch.bfloat16):
        for got, expected in zip(fr.bn_add_relu(x, weight, bias, residual), want, strict=True):
            same(got, expected)
        assert fr.bn_add_relu(x.float())[0].dtype == stock(x.float(), None, None, None)[0].dtype


def test_function_transforms(device, backend):
    xs = randn((4, *ODD), torch.float64, device)
    _, weight, bias, residual = operands(ODD, torch.float64, device)

    def y_of(function):
        return lambda x, weight: function(x, weight, bias, residual)[0]

    def check(got, want):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)

    want = torch.stack([y_of(fr.bn_add_relu)(x, weight) for x in xs])
    check(torch.func.vmap(y_of(fr.bn_add_relu), (0, None))(xs, weight), want)
    losses = [lambda x, w, f=f: y_of(f)(x, w).square().sum() for f in (fr.bn_add_relu, stock)]
    mine, theirs = (torch.func.grad(loss, (0, 1)) for loss in losses)
    per_sample = torch.func.vmap(mine, (0, None))(xs, weight)
    for i, x in enumerate(xs):
        x = x.clone().requires_grad_()
        w = weight.clone().requires_grad_()
        expected = torch.autograd.grad(losses[1](x, w), (x, w))
        for got, single, value in zip(per_sample, mine(x.detach(), weight), expected, strict=True):
            check(got[i], value)
            check(single, value)
    del theirs


ERRORS = {
    "3-D": (lambda x: (x[0],), ValueError, "x must be 4-D (N, C, H, W), got 3-D of shape (5, 4"),
    "weight of another length": (
        lambda x: (x, torch.ones(4)),
        RuntimeError,
        "weight must be floating point of shape (5,) on cpu, got float32 of shape (4,) on cpu",
    ),
    "integer bias": (
        lambda x: (x, None, torch.ones(5, dtype=torch.int64)),
        RuntimeError,
        "bias must be floating point of shape (5,) on cpu, got int64",
    ),
    "residual would broadcast": (
        lambda x: (x, None, None, x[:1]),
        RuntimeError,
        "residual must be float32 of shape (2, 5, 4, 4) on cpu, got float32 of shape (1, 5, 4, 4)",
    ),
    "uint8": (lambda x: (x.byte(),), RuntimeError, "got uint8; convert it first"),
    "other device": (
        lambda x: (x, torch.ones(5, device="meta")),
        RuntimeError,
        "on cpu, got float32 of shape (5,) on meta",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error_messages(case):
    make, error, words = ERRORS[case]
    with pytest.raises(error, match="bn_add_relu: .*" + re.escape(words)):
        fr.bn_add_relu(*make(torch.zeros(2, 5, 4, 4)))


def test_backward_checks_its_arguments():
    x, mean = torch.zeros(2, 5, 4, 4), torch.zeros(5)
    backward = torch.ops.fused_resnet.bn_add_relu_backward
    with pytest.raises(RuntimeError, match=r"bn_add_relu_backward: dy must be .*\(2, 5, 4, 4\)"):
        backward(x[:1], x, x, None, mean, mean, EPS, True, True, True)
    with pytest.raises(RuntimeError, match="bn_add_relu_backward: y must be given"):
        backward(x, x, None, None, mean, mean, EPS, True, True, True)
    with pytest.raises(RuntimeError, match=r"bn_add_relu_backward: mean must be .*\(4,\)"):
        backward(x, x, x, None, mean[:4], mean, EPS, True, True, True)


@pytest.mark.large
@pytest.mark.parametrize("layout", DENSE)
def test_more_than_two_to_the_31_elements(device, backend, layout):
    skip_if_too_large(backend, device)
    W = 2**15
    shape = (1, 2, 2**15 + 1, W)
    x = torch.zeros(2**31 + 2 * W, dtype=torch.bfloat16, device=device)
    x = x.view(shape) if layout == "contiguous" else x.view(1, *shape[2:], 2).permute(0, 3, 1, 2)
    count = x.numel() // 2
    x[0, 1, -1, -2:] = torch.tensor([-3.0, 3.0])
    y, mean, var = fr.bn_add_relu(x, eps=1.0)
    assert mean.tolist() == [0.0, 0.0] and var[0] == 0
    assert var[1].item() == pytest.approx(18 / count, rel=1e-6)
    assert y[0, 1, -1, -3:].tolist() == [0.0, 0.0, 3.0]
    assert y[0, 0, 0].count_nonzero() == 0 and y[0, 0, -1].count_nonzero() == 0


def test_concurrent_calls(device, backend):
    cases = [operands((4, 64, 14, 14), torch.float32, device) for _ in range(8)]
    serial = [fr.bn_add_relu(*case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for got, want in zip(
                pool.map(lambda c: fr.bn_add_relu(*c), cases), serial, strict=True
            ):
                for a, b in zip(got, want, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
