"""The gradient of a convolution's input with the sums of the gradient of the norm before it, on the
CPU; and what is no finite number where the weights for it are packed late."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_resnet.kernels.training.native import Native
from fused_resnet.kernels.training.protocol import Geometry, Norm, Normed
from tests.kernels.cpu.test_train_convolution import (
    CASES,
    FORMS,
    LAST,
    dtype,
    makers,
    operands,
    poison_pool,
)
from tests.ops.op_cases import lifted, randn, same

__all__ = ["dtype"]  # a fixture
SERVED = [
    case
    for case, (shape, K, (R, S), stride, _, dilation) in CASES.items()
    if not (shape[1] % 16 or K % 16) and R * S <= 9 and (dilation == (1, 1) or stride == (1, 1))
]
EPS = 1e-3


def normed_operands(
    case: str, dtype: torch.dtype, kernels: Native
) -> tuple[Tensor, Tensor, Geometry, Normed]:
    """dy, weight and what a norm makes the convolution's input of, its channels not alike."""
    x, weight, dy, g = operands(case, dtype)
    C = x.shape[1]
    # Means of which rounding to float32 takes some off, where x has the digits for that.
    step = 300.3 if dtype == torch.float32 else 1
    means = (torch.arange(C).view(-1, 1, 1) % 7 - 3) * step
    x = (x + means).to(dtype).contiguous(memory_format=LAST)
    norm = Norm(randn((C,), torch.float32) + 0.5, randn((C,), torch.float32) * 0.3, EPS)
    return dy, weight, g, Normed(x, norm, kernels.statistics(x))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", FORMS, indirect=True)
@pytest.mark.parametrize("case", SERVED)
def test_sums_come_with_it(case: str, dtype: torch.dtype, threads: int) -> None:
    """dx as without them, to the last bit; the sums of dx, as it was rounded, where the ReLU let it
    through. A pixel left out, or taken twice, is off by a thousandth of the terms and more."""
    mine, _ = makers()
    torch.set_num_threads(threads)
    dy, weight, g, normed = normed_operands(case, dtype, mine)
    x, _, (stats,) = normed
    y = mine.apply(normed, None, True)
    assert 0.1 < (y > 0).float().mean() < 0.9
    poison_pool()
    dx, made = mine.relu_gradient(dy, y, weight, g, normed)
    assert torch.equal(dx, mine.input_gradient(dy, x, weight, g))
    masked = lifted(dx) * (y > 0)
    centred = lifted(x) - stats[0].view(-1, 1, 1)
    assert made.shape == (3, x.shape[1])
    for row, terms in enumerate((masked, masked * centred)):
        # Measured: at most 2.1e-7.
        error = (made[row] - terms.sum((0, 2, 3))).abs()
        assert (error <= 1e-6 * terms.abs().sum((0, 2, 3)) + 1e-30).all(), row
    assert not made[2].any()


@pytest.mark.parametrize("dtype", FORMS, indirect=True)
@pytest.mark.parametrize("case", ["3x3", "3x3, many tiles", "pointwise, many pixels"])
def test_the_norms_gradients_by_them(case: str, dtype: torch.dtype) -> None:
    """What the sums are for: as by the norm's own pass over dx, but for their last digits."""
    mine, _ = makers()
    dy, weight, g, normed = normed_operands(case, dtype, mine)
    y = mine.apply(normed, None, True)
    dx, made = mine.relu_gradient(dy, y, weight, g, normed)
    want = mine.norm_gradients(dx, y, normed, alone=True)[0]
    for name, a, b in zip(
        want._fields, mine.norm_gradients_by(made, dx, y, normed), want, strict=True
    ):
        # Measured: at most 4e-7; a bfloat16 may fall on its neighbour.
        close = 2e-2 if a.dtype == torch.bfloat16 else 2e-6
        assert ((a - b).abs().max() <= close * b.abs().max()).item(), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "case", ["3x3, even", "3x3 of 16, rows of 16 tiles", "pointwise, many pixels", "3x3, stride 2"]
)
def test_sums_of_what_is_no_number(case: str, value: float) -> None:
    """What bn_reduce says of the same dx: nothing of pixels that were left to the direct form."""
    mine, _ = makers()
    dy, weight, g, normed = normed_operands(case, torch.float32, mine)
    dy[-1, :, -1, -1] = value
    x, norm, (stats,) = normed
    dx, made = mine.relu_gradient(dy, mine.apply(normed, None, True), weight, g, normed)
    same(dx, mine.input_gradient(dy, x, weight, g))
    want, _ = torch.ops.fused_resnet_native.bn_reduce(
        dx, None, x, stats, norm.weight, norm.bias, EPS, True, None, None, False
    )
    assert not want.isfinite().all()
    assert torch.equal(made.isfinite(), want.isfinite())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", ["3x3, even", "3x3 of 16, rows of 16 tiles", "3x3, many tiles"])
def test_what_is_no_number_beside_what_is_added(case: str, value: float) -> None:
    """The sum takes the memory of what is added, so nothing can be computed a second time."""
    mine, stock = makers()
    x, weight, dy, g = operands(case, torch.float32)
    dy[0, 0, 3, 3] = value
    added = randn(x.shape, torch.float32).contiguous(memory_format=LAST)
    want = stock.input_gradient(dy, x, weight, g, added.clone(memory_format=torch.preserve_format))
    found = mine.input_gradient(dy, x, weight, g, added)
    finite = want.isfinite()
    assert 0 < (~finite).sum() < want.numel()
    assert torch.equal(found.isfinite(), finite)
    torch.testing.assert_close(found[finite], want[finite], rtol=1e-4, atol=1e-4)


def test_errors_name_the_argument() -> None:
    mine, _ = makers()
    op = torch.ops.fused_resnet_native.input_gradient_and_sums
    for case, shape in (("3x3", r"\(2, 32, 9, 11\)"), ("3x3, stride 2", r"\(2, 48, 15, 12\)")):
        dy, weight, g, (x, norm, (stats,)) = normed_operands(case, torch.float32, mine)
        sizes = [list(pair) for pair in g[:3]]
        vectors = (norm.weight, norm.bias, EPS)
        with pytest.raises(RuntimeError, match="x must be float32 and have as many channels"):
            op(dy, weight, *sizes, x[:, :16], stats, *vectors)
        with pytest.raises(RuntimeError, match="x must be float32 and have as many channels"):
            op(dy, weight, *sizes, x.bfloat16(), stats, *vectors)
        with pytest.raises(RuntimeError, match="stride, padding and dilation must be pairs"):
            op(dy, weight, [1], *sizes[1:], x, stats, *vectors)
        with pytest.raises(RuntimeError, match=r"statistics must be float64 of shape \(2, "):
            op(dy, weight, *sizes, x, stats.float(), *vectors)
        with pytest.raises(RuntimeError, match=r"weight must be float32 of shape \("):
            op(dy, weight, *sizes, x, stats, stats[0], *vectors[1:])
        with pytest.raises(RuntimeError, match=f"{shape}|does not match a|x must be channels_last"):
            op(dy, weight, *sizes, x[:, :, 1:].contiguous(memory_format=LAST), stats, *vectors)
        with pytest.raises(RuntimeError, match=r"x must be channels_last|dx must have x's strides"):
            op(dy, weight, *sizes, x.contiguous(), stats, *vectors)
    dy, weight, g, (x, norm, (stats,)) = normed_operands("3x3", torch.float32, mine)
    with pytest.raises(RuntimeError, match="no kernel for dilation with stride"):
        op(dy, weight, [2, 2], [1, 1], [2, 2], x, stats, norm.weight, norm.bias, EPS)
