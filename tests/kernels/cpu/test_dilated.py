"""Dilated convolutions for inference on the CPU: taps in the padding, bands of columns, interleaved
Winograd tiles; dilations around the size of the image."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.kernels import registry
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.cpu.convolution import NativeConv
from fused_resnet.kernels.problem import convolution as problem_of
from tests.kernels.cpu.test_train_convolution import (
    VARIANTS,
    WINOGRAD_4X4_ERROR,
    dtype,
    implementations,
)
from tests.ops.op_cases import close, fused_conv, integers, lifted, randn

__all__ = ["dtype"]  # a fixture
LAST = torch.channels_last

# name -> x's (N, C, H, W), K, kernel (R, S), stride, padding, dilation, groups
CASES = {
    # Winograd, tiles interleaved in one dimension or both, images that they do not divide.
    "2": ((2, 32, 13, 14), 48, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    "2 and 3": ((1, 48, 14, 19), 80, (3, 3), (1, 1), (2, 3), (2, 3), 1),
    "3 and 1": ((3, 16, 11, 9), 16, (3, 3), (1, 1), (3, 1), (3, 1), 1),
    "1 and 2, other padding": ((2, 32, 9, 11), 32, (3, 3), (1, 1), (0, 3), (1, 2), 1),
    "2, tiles of 4 x 4": ((2, 64, 16, 15), 64, (3, 3), (1, 1), (2, 1), (2, 1), 1),
    "2 and 2, tiles of 4 x 4": ((2, 64, 32, 24), 80, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    "2, many weights": ((1, 528, 8, 8), 256, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    # The direct kernel, in bands of columns.
    "4": ((1, 272, 20, 20), 256, (3, 3), (1, 1), (4, 4), (4, 4), 1),
    "4, stride 2": ((2, 32, 17, 19), 70, (3, 3), (2, 2), (4, 4), (4, 4), 1),
    "4, stride 2 and 3": ((2, 18, 17, 19), 24, (3, 3), (2, 3), (3, 5), (4, 5), 1),
    "4, groups": ((2, 64, 9, 11), 64, (3, 3), (1, 1), (4, 4), (4, 4), 4),
    "5x5": ((2, 16, 9, 13), 32, (5, 5), (1, 1), (6, 4), (3, 2), 1),
    "7x1": ((2, 16, 9, 4), 32, (7, 1), (1, 1), (6, 0), (2, 1), 1),
    "few channels": ((2, 3, 9, 8), 16, (3, 3), (1, 1), (5, 5), (5, 5), 1),
    "wide padding": ((2, 16, 5, 6), 32, (3, 3), (1, 1), (9, 8), (4, 5), 1),
}
# A dilation that is the image's size, one less, one more, or much larger, in either dimension.
for down, right in itertools.product((6, 7, 8, 30), (8, 9, 10, 30)):
    CASES[f"{down} and {right} of 7 x 9"] = (
        (2, 32, 7, 9), 48, (3, 3), (1, 1), (down, right), (down, right), 1
    )  # fmt: skip


def packed(case: str, dtype: torch.dtype, weight: Tensor, *norm: Tensor) -> NativeConv:
    """The convolution with scale and shift, or without."""
    K = len(weight)
    geometry = CASES[case][3:]
    reason = registry.missing(problem_of(weight.shape, dtype, *geometry), "native", "cpu")
    if reason is not None:
        pytest.skip(reason)
    norm = norm or (torch.ones(K), torch.zeros(K))
    return fused_conv(NativeConv, weight, *norm, dtype, *geometry)


def operands(case: str, dtype: torch.dtype, make=randn) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and residual, channels_last."""
    shape, K, kernel, *_, groups = CASES[case]
    x, weight = make(shape, dtype), make((K, shape[1] // groups, *kernel), dtype)
    if make is randn:
        weight = weight / weight[0].numel() ** 0.5
    residual = make(convolved(case, x.double(), weight.double()).shape, dtype)
    x, weight, residual = (t.contiguous(memory_format=LAST) for t in (x, weight, residual))
    return x, weight, residual


def convolved(case: str, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, *CASES[case][3:])


@pytest.mark.parametrize("dtype", VARIANTS, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: str, dtype: torch.dtype) -> None:
    """relu(conv * scale + shift + residual), also in the residual's memory, by 1 to 3 threads."""
    x, weight, residual = operands(case, dtype)
    scale, shift = torch.rand(len(weight)) + 0.5, torch.randn(len(weight))
    conv = packed(case, dtype, weight, scale, shift)

    def reference(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        y = convolved(case, x, weight)
        y = y * scale.to(y.dtype)[:, None, None] + shift.to(y.dtype)[:, None, None]
        return torch.relu(y + residual)

    exact = reference(*map(lifted, (x, weight, residual)))
    stock = reference(x, weight, residual)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = conv.run(x, residual, Activation.RELU)
        close(("y",), [y], [stock], [exact], dtype)
        added = residual.clone(memory_format=torch.preserve_format)
        conv.run(x, added, Activation.RELU, overwrite=True)
        assert torch.equal(added, y)


@pytest.mark.parametrize("dtype", VARIANTS, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_integers_are_exact(case: str, dtype: torch.dtype) -> None:
    """One wrong index changes the result; a pixel's rounding may differ with tiles of 4 x 4, whose
    transforms contain sixths."""
    x, weight, residual = operands(case, dtype, integers)
    y = packed(case, dtype, weight).run(x, residual, Activation.NONE)
    exact = convolved(case, x.double(), weight.double()) + residual.double()
    if "4 x 4" in case and dtype == torch.bfloat16:
        error = (y.double() - exact).abs() - (exact.to(dtype).double() - exact).abs()
        assert error.max() <= WINOGRAD_4X4_ERROR
    else:
        assert torch.equal(y, exact.to(dtype))


def test_large_weights_are_transformed_where_pixels_are_many() -> None:
    """512 x 512 weights for dilated layers, which have at least four times the pixels."""
    weight, one = torch.randn(512, 512, 3, 3), torch.ones(512)
    for d, size in ((1, 0), (2, 16 * 512 * 512)):
        problem = problem_of(weight.shape, torch.float32, (1, 1), (d, d), (d, d), 1)
        if registry.missing(problem, "native", "cpu") is None:
            assert NativeConv(problem, weight, one, one).tensors[1].numel() == size


@pytest.mark.parametrize("dtype", VARIANTS, indirect=True)
def test_weights_packed_once_serve_any_size(dtype: torch.dtype) -> None:
    """Which taps lie in the padding, and whether Winograd pays, depends on the call."""
    for dilation, K in itertools.product((2, 5, 12), (48, 32)):
        x, weight, _ = operands("2", dtype, integers)
        case = f"any size, {dilation}, {K}"
        pair = (dilation, dilation)
        CASES[case] = (x.shape, K, (3, 3), (1, 1), pair, pair, 1)
        weight = weight[:K]
        conv = packed(case, dtype, weight)
        for shape in ((2, 20, 20), (1, 5, 9), (3, 24, 12), (5, 13, 13), (1, 1, 1), (2, 20, 20)):
            x = integers((shape[0], 32, *shape[1:]), dtype).contiguous(memory_format=LAST)
            exact = convolved(case, x.double(), weight.double())
            assert torch.equal(conv.run(x, None, Activation.NONE), exact.to(dtype)), shape
        del CASES[case]


@pytest.mark.parametrize("dtype", VARIANTS, indirect=True)
@pytest.mark.parametrize("case", ["7 and 9 of 7 x 9", "30 and 30 of 7 x 9"])
def test_taps_that_read_only_padding_are_skipped(case: str, dtype: torch.dtype) -> None:
    """Even if they are non-finite, as in stock's channels_last convolution."""
    x, weight, _ = operands(case, dtype)
    alone = packed(case, dtype, weight * F.pad(torch.ones(1, 1), (1, 1, 1, 1)))
    for value in (float("nan"), float("inf")):
        other = torch.full_like(weight, value)
        other[:, :, 1, 1] = weight[:, :, 1, 1]
        y = packed(case, dtype, other).run(x, None, Activation.NONE)
        assert y.isfinite().all()
        assert torch.equal(y, alone.run(x, None, Activation.NONE))


@pytest.mark.parametrize("dtype", VARIANTS, indirect=True)
@pytest.mark.parametrize("case", ["2", "2 and 3", "2 and 2, tiles of 4 x 4", "4, groups"])
def test_special_values_stay_where_stock_has_them(case: str, dtype: torch.dtype) -> None:
    """Also where the result overwrites the residual, so that every pixel is written once."""
    x, weight, residual = operands(case, dtype)
    conv = packed(case, dtype, weight)
    for value in (float("nan"), float("inf"), 3e38):
        x[0, -1, 2, 3] = value
        y = residual.clone(memory_format=torch.preserve_format)
        conv.run(x, y, Activation.RELU, overwrite=True)
        want = torch.relu(convolved(case, x.float(), weight.float()) + residual.float()).to(dtype)
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.isinf(), want.isinf())


def test_memory_beyond_x_is_not_read() -> None:
    implementations()
    for case in CASES:
        x, weight, _ = operands(case, torch.float32)
        around = torch.full((len(x) + 2, *x.shape[1:]), float("nan"))
        around = around.contiguous(memory_format=LAST)
        around[1:-1] = x
        conv = packed(case, torch.float32, weight)
        want = conv.run(x, None, Activation.NONE)
        assert torch.equal(conv.run(around[1:-1], None, Activation.NONE), want), case
