"""A convolution's input gradient with the fused sums of the preceding norm's gradient, on the CPU;
and non-finite values where the fallback's weights are packed on demand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_resnet.kernels.training.native import Native, sizes
from fused_resnet.kernels.training.protocol import Geometry, Norm, Normed
from tests.kernels.cpu.test_train_convolution import (
    CASES,
    LAST,
    VARIANTS,
    dtype,
    implementations,
    operands,
    poison_pool,
)
from tests.ops.op_cases import lifted, randn, same

__all__ = ["dtype"]  # a fixture
FUSED = [
    case
    for case, (shape, K, (R, S), stride, _, dilation, *_groups) in CASES.items()
    if not (shape[1] % 16 or K % 16) and R * S <= 9 and (dilation == (1, 1) or stride == (1, 1))
    if case != "depthwise"
]
EPS = 1e-3


def normed_operands(
    case: str, dtype: torch.dtype, kernels: Native
) -> tuple[Tensor, Tensor, Geometry, Normed]:
    """dy, weight, geometry and the norm before the convolution; channels have different means."""
    x, weight, dy, g = operands(case, dtype)
    C = x.shape[1]
    # In float32, means that are not exactly representable.
    step = 300.3 if dtype == torch.float32 else 1
    means = (torch.arange(C).view(-1, 1, 1) % 7 - 3) * step
    x = (x + means).to(dtype).contiguous(memory_format=LAST)
    norm = Norm(randn((C,), torch.float32) + 0.5, randn((C,), torch.float32) * 0.3, EPS)
    return dy, weight, g, Normed(x, norm, kernels.statistics(x))


@pytest.mark.pairwise
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", VARIANTS, indirect=True)
@pytest.mark.parametrize("case", FUSED)
def test_fused_sums(case: str, dtype: torch.dtype, threads: int) -> None:
    """dx is bitwise equal to dx without sums; the sums are those of the rounded dx where y > 0. A
    missing or duplicated pixel would change them by a thousandth of the terms or more."""
    mine, _ = implementations()
    torch.set_num_threads(threads)
    dy, weight, g, normed = normed_operands(case, dtype, mine)
    x, _, (stats,) = normed
    y = mine.apply(normed, None, True)
    assert 0.1 < (y > 0).float().mean() < 0.9
    poison_pool()
    dx, sums = mine.relu_gradient(dy, y, weight, g, normed)
    assert torch.equal(dx, mine.input_gradient(dy, x, weight, g))
    masked = lifted(dx) * (y > 0)
    centred = lifted(x) - stats[0].view(-1, 1, 1)
    assert sums.shape == (3, x.shape[1])
    for row, terms in enumerate((masked, masked * centred)):
        # Measured: at most 2.1e-7.
        error = (sums[row] - terms.sum((0, 2, 3))).abs()
        assert (error <= 1e-6 * terms.abs().sum((0, 2, 3)) + 1e-30).all(), row
    assert not sums[2].any()


@pytest.mark.parametrize("dtype", VARIANTS, indirect=True)
@pytest.mark.parametrize("case", ["3x3", "3x3, many tiles", "pointwise, many pixels"])
def test_norm_gradients_from_fused_sums(case: str, dtype: torch.dtype) -> None:
    """The norm's gradients equal those of a separate pass over dx, up to rounding."""
    mine, _ = implementations()
    dy, weight, g, normed = normed_operands(case, dtype, mine)
    y = mine.apply(normed, None, True)
    dx, sums = mine.relu_gradient(dy, y, weight, g, normed)
    want = mine.norm_gradients(dx, y, normed, has_residual=False)[0]
    for name, a, b in zip(
        want._fields, mine.norm_gradients_from_sums(sums, dx, y, normed), want, strict=True
    ):
        # Measured: at most 4e-7; a value of 16 bits may round to its neighbour.
        tolerance = max(2e-6, 2 * torch.finfo(a.dtype).eps)
        assert ((a - b).abs().max() <= tolerance * b.abs().max()).item(), name


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(
    "dtype, least", [(torch.float16, 2.0**-24), (torch.bfloat16, 2.0**-133)], ids=str
)
def test_outputs_that_round_to_zero(
    dtype: torch.dtype, least: float, layout: torch.memory_format
) -> None:
    """The mask of a recomputed y is that of y as stored: half the least positive value is 0."""
    mine, _ = implementations()
    norm = Norm(torch.zeros(16), least * torch.arange(16) / 8, EPS)
    x, dy = (randn((2, 16, 5, 7), dtype).contiguous(memory_format=layout) for _ in range(2))
    normed = Normed(x, norm, mine.statistics(x))
    y = mine.apply(normed, None, True)
    positive = norm.bias > least / 2
    assert torch.equal((y > 0).amax((0, 2, 3)), positive) and 0 < positive.sum() < 16
    got = mine.norm_gradients(dy, y, normed, has_residual=False)[0]
    assert torch.equal(got.dbias != 0, positive)
    torch.testing.assert_close(got.dbias, lifted(dy).sum((0, 2, 3)).float() * positive)
    if layout == LAST:
        g, weight = Geometry((1, 1), (0, 0), (1, 1), 1), torch.eye(16).view(16, 16, 1, 1)
        dx, sums = mine.relu_gradient(dy, y, weight, g, normed)
        assert torch.equal(dx, dy)
        torch.testing.assert_close(sums[0], lifted(dy).sum((0, 2, 3)) * positive)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "case", ["3x3, even", "3x3 of 16, rows of 16 tiles", "pointwise, many pixels", "3x3, stride 2"]
)
def test_fused_sums_of_non_finite_values(case: str, value: float) -> None:
    """The sums are non-finite where those of bn_reduce are, also for pixels that the Winograd
    algorithm leaves to the direct one."""
    mine, _ = implementations()
    dy, weight, g, normed = normed_operands(case, torch.float32, mine)
    dy[-1, :, -1, -1] = value
    x, norm, (stats,) = normed
    dx, sums = mine.relu_gradient(dy, mine.apply(normed, None, True), weight, g, normed)
    same(dx, mine.input_gradient(dy, x, weight, g))
    want, _ = torch.ops.fused_resnet_native.bn_reduce(
        dx, None, x, stats, norm.weight, norm.bias, EPS, True, None, None, False
    )
    assert not want.isfinite().all()
    assert torch.equal(sums.isfinite(), want.isfinite())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", ["3x3, even", "3x3 of 16, rows of 16 tiles", "3x3, many tiles"])
def test_non_finite_values_with_an_added_tensor(case: str, value: float) -> None:
    """The sum overwrites the added tensor, so no pixel can be recomputed."""
    mine, stock = implementations()
    x, weight, dy, g = operands(case, torch.float32)
    dy[0, 0, 3, 3] = value
    added = randn(x.shape, torch.float32).contiguous(memory_format=LAST)
    want = stock.input_gradient(dy, x, weight, g, added.clone(memory_format=torch.preserve_format))
    dx = mine.input_gradient(dy, x, weight, g, added)
    finite = want.isfinite()
    assert 0 < (~finite).sum() < want.numel()
    assert torch.equal(dx.isfinite(), finite)
    torch.testing.assert_close(dx[finite], want[finite], rtol=1e-4, atol=1e-4)


def test_errors_name_the_argument() -> None:
    mine, _ = implementations()
    op = torch.ops.fused_resnet_native.input_gradient_and_sums
    for case, shape in (("3x3", r"\(2, 32, 9, 11\)"), ("3x3, stride 2", r"\(2, 48, 15, 12\)")):
        dy, weight, g, (x, norm, (stats,)) = normed_operands(case, torch.float32, mine)
        vectors = (norm.weight, norm.bias, EPS)
        few = x[:, :16].contiguous(memory_format=LAST)
        for bad in (few, x.bfloat16(), x.contiguous()):
            with pytest.raises(RuntimeError, match=f"x must be float32 of shape {shape}"):
                op(dy, weight, sizes(g), bad, stats, *vectors)
        with pytest.raises(RuntimeError, match="geometry must be stride, padding and dilation"):
            op(dy, weight, [1], x, stats, *vectors)
        with pytest.raises(RuntimeError, match=r"statistics must be float64 of shape \(2, "):
            op(dy, weight, sizes(g), x, stats.float(), *vectors)
        with pytest.raises(RuntimeError, match=r"weight must be float32 of shape \("):
            op(dy, weight, sizes(g), x, stats, stats[0], *vectors[1:])
        with pytest.raises(RuntimeError, match="does not match a"):
            low = torch.cat([x, x], 2).contiguous(memory_format=LAST)
            op(dy, weight, sizes(g), low, stats, *vectors)
    dy, weight, g, (x, norm, (stats,)) = normed_operands("3x3", torch.float32, mine)
    with pytest.raises(RuntimeError, match="no kernel for dilation with stride"):
        op(dy, weight, [2, 2, 1, 1, 2, 2, 1], x, stats, norm.weight, norm.bias, EPS)
