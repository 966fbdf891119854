"""The native CPU ops called directly. C++ signatures are not checked against their schemas, so each
op is called with values that distinguish its arguments; for every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.kernels import native, registry
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.cpu import convolution
from fused_resnet.kernels.problem import Problem
from fused_resnet.kernels.problem import convolution as problem_of
from tests.ops.op_cases import DTYPES, fused_conv, randn, same

pytestmark = pytest.mark.skipif(native.load() is not None, reason=str(native.load()))
ops = torch.ops.fused_resnet_native
LAST = torch.channels_last


def supported(dtype: torch.dtype) -> bool:
    """Whether this processor has convolutions of `dtype`."""
    common = Problem("conv_bn_relu", dtype, (64, 64, 1, 1))
    return registry.missing(common, "native", "cpu") is None


def channels_last(shape, dtype) -> torch.Tensor:
    return randn(shape, dtype).contiguous(memory_format=LAST)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elementwise(dtype):
    x, r = channels_last((2, 7, 5, 3), dtype), channels_last((2, 7, 5, 3), dtype)
    same(ops.add_relu(x, r), torch.relu(x + r))
    same(ops.add_relu_backward(x, r), torch.where(r > 0, x, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [LAST, torch.contiguous_format], ids=str)
def test_batch_norm(dtype, memory_format):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, r, dy = (
        randn((3, 5, 4, 6), dtype).contiguous(memory_format=memory_format) for _ in range(3)
    )
    weight, bias = torch.rand(5, dtype=acc) + 0.5, torch.randn(5, dtype=acc)
    y, mean, var = ops.bn_add_relu(x, weight, bias, r, 0.25, True)
    inputs = [t.double().requires_grad_() for t in (x, weight, bias, r)]
    want = F.batch_norm(inputs[0], None, None, inputs[1], inputs[2], True, eps=0.25)
    want = torch.relu(want + inputs[3])
    near = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)
    torch.testing.assert_close(y.double(), want.detach(), rtol=near, atol=near)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        var.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-6
    )
    grads = torch.autograd.grad(want, inputs, torch.where(y > 0, dy, 0).double())
    got = ops.bn_add_relu_backward(dy, x, y, weight, mean, var, 0.25, True, True, True)
    for mine, exact in zip(got, grads, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=10 * near, atol=10 * near)
    for flags in ((True, False), (False, True), (False, False)):
        some = ops.bn_add_relu_backward(dy, x, y, weight, mean, var, 0.25, True, *flags)
        for mine, full, wanted in zip(some, got, (flags[0], True, True, flags[1]), strict=True):
            if wanted:
                torch.testing.assert_close(mine, full)
            else:
                assert mine.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_pool2d(dtype):
    for shape, kernel, stride, padding in (
        ((2, 64, 9, 7), (3, 3), (2, 2), (1, 1)),
        ((1, 5, 8, 6), (2, 3), (1, 2), (0, 1)),
        ((3, 33, 4, 4), (4, 4), (4, 4), (2, 2)),
        ((1, 1, 5, 5), (3, 2), (3, 1), (1, 0)),
    ):
        x = channels_last(shape, dtype)
        x[0, 0, 2, 1], x[-1, -1, 0, 0] = float("nan"), -float("nan")
        x[0, -1, 1, 1], x[0, 0, 3, 3] = float("inf"), -float("inf")
        x[0, 0, 0, :2] = torch.tensor([-0.0, 0.0])
        got = ops.max_pool2d(x, kernel, stride, padding)
        same(got, F.max_pool2d(x, kernel, stride, padding))
        assert got.is_contiguous(memory_format=LAST)
    low = channels_last((1, 8, 6, 6), dtype) - 100
    same(ops.max_pool2d(low, [3], [2], [1]), F.max_pool2d(low, 3, 2, 1))
    with pytest.raises(RuntimeError, match="max_pool2d: padding must be between 0 and half of"):
        ops.max_pool2d(low, [3], [2], [2])
    with pytest.raises(
        RuntimeError, match="max_pool2d: x of size 6 x 6 is smaller than the kernel"
    ):
        ops.max_pool2d(low, [9], [1], [1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_abs_max(dtype):
    x = channels_last((3, 37, 5, 7), dtype)
    assert ops.abs_max(x) == x.double().abs().max().item()
    x[1, 2, 3, 4] = -77
    assert ops.abs_max(x) == 77 and ops.abs_max(x[:0]) == 0
    x[0, 0, 0, 0] = -float("inf")
    assert ops.abs_max(x) == float("inf")
    x[2, 36, 4, 6] = float("nan")
    assert ops.abs_max(x) != ops.abs_max(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_channels_in_any_layout(dtype):
    """A convolution of fewer than 16 channels copies x with its padding, from any strides."""
    if registry.missing(Problem("conv_bn_relu"), "native", "cpu") is not None:
        pytest.skip("the native convolution needs a processor with AVX2")
    for C in (1, 3, 5):
        weight, scale, shift = torch.randn(20, C, 3, 4), torch.rand(20), torch.randn(20)
        problem = problem_of(weight.shape, dtype, (2, 1), (2, 3), (1, 1), 1)
        conv = convolution.NativeConv(problem, weight, scale, shift)
        x = randn((2, C, 9, 8), dtype)
        for view in (x, x.transpose(2, 3), x[:, :, 1:, ::2], x.double()):
            want = conv.run(view.to(dtype).contiguous(memory_format=LAST), None, Activation.RELU)
            assert torch.equal(conv.run(view, None, Activation.RELU), want)
            assert torch.equal(
                conv.run(view.contiguous(memory_format=LAST), None, Activation.RELU), want
            )
        with pytest.raises(RuntimeError, match=rf"x must have shape .* C at most {C}"):
            conv.run(torch.cat([x, x], 1), None, Activation.RELU)


@pytest.mark.parametrize(
    ("weight", "dilation", "groups", "words"),
    [
        ((16, 16, 9, 15), (1, 1), 1, "more than 128 taps"),
        ((24, 4, 3, 3), (1, 1), 2, "groups whose outputs"),
        ((16, 16, 3, 3), (2, 2), 1, None),
    ],
)
def test_why_a_convolution_is_not_packed(weight, dilation, groups, words):
    if registry.missing(Problem("conv_bn_relu"), "native", "cpu") is not None:
        pytest.skip("the native convolution needs a processor with AVX2")
    reason = native.convolution_reason(weight, torch.float32, dilation, groups)
    assert words in reason if words else reason is None
    assert "no kernel" in native.convolution_reason(weight, torch.float64, dilation, groups)
    assert "no kernel" in native.convolution_reason(weight, torch.int64, dilation, groups)
    if words:
        vector, pair = torch.ones(weight[0]), (1, 1)
        with pytest.raises(RuntimeError, match=f"pack_convolution: {words}"):
            ops.pack_convolution(torch.ones(weight), vector, vector, pair, pair, dilation, groups)


def test_convolution_rejects_invalid_operands():
    if not supported(torch.float32):
        pytest.skip("the native convolution needs a processor with AVX2")
    conv = fused_conv(
            convolution.NativeConv,
        torch.randn(70, 32, 3, 3), torch.ones(70), torch.zeros(70), torch.float32,
        (1, 1), (1, 1), (1, 1), 1,
    )  # fmt: skip
    x = torch.randn(2, 32, 5, 5).contiguous(memory_format=LAST)
    conv.run(x, None, Activation.RELU)
    for bad, words in (
        (x.contiguous(), "must be channels_last"),
        (x[:, :31].contiguous(memory_format=LAST), "must have 32 channels, got 31"),
        (x.double(), "x must be torch.float32, got torch.float64"),
        (x.bfloat16(), "x must be torch.float32, got torch.bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=f"conv_bn_relu: .*{words}|{words}"):
            conv.run(bad, None, Activation.RELU)
    with pytest.raises(RuntimeError, match="residual must be float32 of shape"):
        conv.run(x, x, Activation.RELU)
    strided = fused_conv(
            convolution.NativeConv,
        torch.randn(64, 32, 3, 3), torch.ones(64), torch.zeros(64), torch.float32,
        (2, 2), (1, 1), (1, 1), 1,
    )  # fmt: skip
    assert strided.tensors[1].numel() == 0
    strided.tensors[1] = torch.zeros(16 * 32 * 64)
    with pytest.raises(RuntimeError, match="winograd must be packed in float32 for a 3x3"):
        strided.run(x, None, Activation.RELU)


# name -> x's (N, C, H, W), K, kernel, stride, padding, dilation, groups
CASES = {
    "pointwise": ((2, 48, 13, 9), 80, (1, 1), 1, 0, 1, 1),
    "pointwise, many pixels": ((2, 64, 61, 59), 144, (1, 1), 1, 0, 1, 1),
    "pointwise, stride 2": ((2, 48, 13, 9), 64, (1, 1), 2, 0, 1, 1),
    "odd channels": ((2, 33, 6, 5), 18, (3, 3), 1, 1, 1, 1),
    "Winograd": ((3, 48, 13, 14), 80, (3, 3), 1, 1, 1, 1),
    "Winograd, tiles of 4 x 4": ((3, 64, 13, 18), 112, (3, 3), 1, 1, 1, 1),
    "Winograd, 16 channels": ((2, 16, 33, 17), 16, (3, 3), 1, 1, 1, 1),
    "3x3, stride 2, dilated": ((2, 32, 17, 20), 70, (3, 3), 2, 2, 2, 1),
    "grouped": ((2, 64, 9, 8), 64, (3, 3), 1, 1, 1, 4),
    "stem": ((2, 3, 37, 30), 64, (7, 7), 2, 3, 1, 1),
}


@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_by_dot_product_and_in_float32(case, widened):
    """relu(conv * scale + shift + residual) is within one rounding of float64, also when it
    overwrites the residual."""
    if not supported(torch.bfloat16):
        pytest.skip("the native convolution needs a processor with AVX2")
    shape, K, kernel, *geometry = CASES[case]
    try:
        native.widen_bfloat16(widened)
        if native.widens_bfloat16() != widened:
            pytest.skip("this processor has no dot product of bfloat16")
        weight = torch.randn(K, shape[1] // geometry[-1], *kernel) / 8
        scale, shift = torch.rand(K) + 0.5, torch.randn(K)
        pairs = [(n, n) for n in geometry[:3]]
        problem = problem_of(weight.shape, torch.bfloat16, *pairs, geometry[3])
        reason = registry.missing(problem, "native", "cpu")
        if reason is not None:
            assert not widened
            pytest.skip(reason)
        conv = fused_conv(
            convolution.NativeConv, weight, scale, shift, torch.bfloat16, *pairs, geometry[3]
        )
        winograd = case.startswith("Winograd") and (widened or "4 x 4" in case)
        assert (conv.tensors[1].numel() > 0) == winograd
        x = channels_last(shape, torch.bfloat16)
        rounded = weight.bfloat16().double()
        sums = torch.nn.functional.conv2d(x.double(), rounded, None, *geometry)
        residual = channels_last(tuple(sums.shape), torch.bfloat16)
        exact = sums * scale.double()[:, None, None] + shift.double()[:, None, None]
        exact = torch.relu(exact + residual.double())
        y = conv.run(x, residual, Activation.RELU, overwrite=True)
    finally:
        native.widen_bfloat16(None)
    assert y.data_ptr() == residual.data_ptr()
    # Half a unit in the last place of bfloat16, and the error of the float32 sums; measured: 4e-8,
    # with tiles of 4 x 4 3e-5.
    error = (y.double() - exact).abs()
    assert (error <= exact.abs() * 2.0**-8 + (1e-4 if "4 x 4" in case else 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("C", "K"), [(32, 48), (16, 16), (64, 64)])
def test_tiles_that_overflow_are_computed_directly(C, K, dtype):
    """Winograd sums may overflow where the convolution's do not: 3e38 - (-3e38) is Inf."""
    if not supported(dtype):
        pytest.skip("the native convolution needs a processor with AVX2")
    weight = torch.zeros(K, C, 3, 3)
    weight[:, :, 1, 1] = torch.eye(K, C)
    native.widen_bfloat16(True)
    try:
        conv = fused_conv(
            convolution.NativeConv,
            weight,
            torch.ones(K),
            torch.zeros(K),
            dtype,
            (1, 1),
            (1, 1),
            (1, 1),
            1,
        )
    finally:
        native.widen_bfloat16(None)
    assert conv.tensors[1].numel() > 0
    x = channels_last((2, C, 12, 12), dtype)
    x[1, 3, 4, 4], x[1, 3, 4, 6] = 3e38, -3e38
    residual = channels_last((2, K, 12, 12), dtype)
    want = (x.float() + residual[:, :C].float()).to(dtype)
    got = conv.run(x, residual, Activation.NONE, overwrite=True)
    assert torch.isfinite(got).all() and torch.equal(got, residual)
    # Tiles that read one of the two and have finite sums are accurate relative to 3e38 only.
    one_of_them = torch.zeros(2, C, 12, 12, dtype=torch.bool)
    rtol = 1e-6
    if C == 64 and dtype == torch.bfloat16:
        # Tiles of 4 x 4, of which others overflow; sums that are ties may round differently.
        one_of_them[1, 3, :4, :4] = True
        rtol = 2**-7
    else:
        one_of_them[1, 3, 3:7, 2:4] = one_of_them[1, 3, 3:7, 6:8] = True
        one_of_them[1, 3, 4, 6] = False
    torch.testing.assert_close(got[:, :C][~one_of_them], want[~one_of_them], rtol=rtol, atol=1e-5)


def test_overwriting_the_residual_gives_equal_results():
    if not supported(torch.float32):
        pytest.skip("the native convolution needs a processor with AVX2")
    for dtype in filter(supported, (torch.float32, torch.bfloat16)):
        for groups in (1, 5):
            conv = fused_conv(
            convolution.NativeConv,
                torch.randn(80, 60 // groups, 3, 3), torch.rand(80), torch.randn(80), dtype,
                (1, 1), (1, 1), (1, 1), groups,
            )  # fmt: skip
            x, residual = (channels_last((3, c, 5, 9), dtype) for c in (60, 80))
            want = conv.run(x, residual, Activation.RELU)
            overwritten = residual.clone()
            assert torch.equal(conv.run(x, overwritten, Activation.RELU, overwrite=True), want)
            assert torch.equal(overwritten, want)


def test_result_does_not_depend_on_thread_count():
    x = channels_last((4, 64, 28, 28), torch.float32)
    weight, bias = torch.rand(64), torch.rand(64)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outputs = [ops.add_relu(x, x), ops.max_pool2d(x, [3], [2], [1])]
        if supported(torch.float32):
            g = torch.Generator().manual_seed(0)
            w = torch.randn(96, 64, 3, 3, generator=g)
            conv = fused_conv(
                convolution.NativeConv,
                w,
                torch.ones(96),
                torch.zeros(96),
                torch.float32,
                (1, 1),
                (1, 1),
                (1, 1),
                1,
            )
            outputs.append(conv.run(x, None, Activation.NONE))
        results.append(outputs)
        y = ops.bn_add_relu(x, weight, bias, None, 1e-5, True)[0]
        torch.testing.assert_close(y, F.relu(F.batch_norm(x, None, None, weight, bias, True)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_narrower_instruction_sets(capability):
    """PyTorch's ATEN_CPU_CAPABILITY also selects these kernels; every build passes these tests."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "FR_NESTED": "1"}
    if os.environ.get("FR_NESTED"):
        pytest.skip("already the nested run")
    code = "from fused_resnet.kernels import native; print(native.build_info()['cpu_isa'])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert run.stdout.strip() in (
        {"default": ("generic", "neon")}.get(capability, ("avx2", "neon"))
    )
    tests = [__file__, "-q", "-x", "-p", "no:cacheprovider", "-k", "not capability"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *tests],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout


def test_build_info_and_kernels():
    info = native.build_info()
    assert info["compiler"] and info["torch_target_version"] == "2.11"
    assert set(info["conv_dtypes"]) <= {"float32", "bfloat16", "float16"}
    on_cpu = [k for k in native.kernels() if k["device"] == "cpu"]
    assert {k["arch"] for k in on_cpu} == {info["cpu_isa"]}
    names = {k["name"] for k in on_cpu}
    assert {"add_relu", "block_forward", "bn_apply", "pack_convolution"} <= names
    assert not any("gemm" in str(name) for name in names)
