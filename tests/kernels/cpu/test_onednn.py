"""oneDNN's convolutions: no NaN reaches its ReLU, which would turn it into 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from fused_resnet.kernels import registry
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.cpu import onednn
from tests.models.model_helpers import images, pair
from tests.ops.op_cases import fused_conv

RELU, NONE = Activation.RELU, Activation.NONE
REASON = registry.missing("conv_bn_relu", "vendor", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
LAST, NAN = torch.channels_last, float("nan")


def convolution(gain: float = 1.0) -> tuple[onednn.PackedConv, Tensor]:
    """A 1x1 convolution that multiplies by `gain`, and an x (2, 16, 5, 5) with |x| <= 1."""
    weight = torch.eye(16).view(16, 16, 1, 1) * gain
    conv = fused_conv(
        onednn.PackedConv,
        weight,
        torch.ones(16),
        torch.zeros(16),
        torch.float32,
        (1, 1),
        (0, 0),
        (1, 1),
        1,
    )
    return conv, (torch.rand(2, 16, 5, 5) * 2 - 1).contiguous(memory_format=LAST)


@pytest.fixture
def measured(monkeypatch) -> list[Tensor]:
    """The tensors whose largest value was measured."""
    seen: list[Tensor] = []

    def max_abs(x: Tensor, _measure=onednn.max_abs) -> float:
        seen.append(x)
        return _measure(x)

    monkeypatch.setattr(onednn, "max_abs", max_abs)
    return seen


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_outputs_are_not_measured(measured, inference):
    conv, x = convolution()
    measured.clear()
    with torch.inference_mode(inference):
        y = conv.run(conv.run(x, None, RELU), None, RELU)
        again = conv.run(y, y, RELU, overwrite=True)  # y now holds the sum
        conv.run(again, again, NONE)
    assert len(measured) == 1 and measured[0] is x


def test_a_bound_is_measured_again_beyond_the_limit_and_after_writes(measured):
    conv, x = convolution(gain=1e5)
    shrink, _ = convolution(gain=1e-5)
    measured.clear()
    y = shrink.run(conv.run(x, None, RELU), None, NONE)
    torch.testing.assert_close(y, x.relu())
    assert len(measured) == 1
    y.copy_(x)
    y[0, 3, 2, 2] = NAN
    assert shrink.run(y, None, RELU)[0, 3, 2, 2].isnan() and measured[-1] is y
    # Every output is 0, but its bound is 16 times its input's.
    spread = fused_conv(
        onednn.PackedConv,
        torch.ones(16, 16, 1, 1) / 16, torch.full((16,), 16.0), torch.zeros(16), torch.float32,
        (1, 1), (0, 0), (1, 1), 1,
    )  # fmt: skip
    y = torch.stack([x[:, ::2], -x[:, ::2]], 2).flatten(1, 2).contiguous(memory_format=LAST)
    measured.clear()
    spread._unfused = None  # not called
    onednn._store_bound(y, onednn.max_abs(y))
    for _ in range(40):
        y = spread.run(y, None, NONE)
    assert 2 <= len(measured) <= 4 and not y.isnan().any()


@pytest.mark.parametrize("activation", [RELU, NONE])
@pytest.mark.parametrize("where", ["x", "residual"])
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf"), 3e38])
def test_separate_operations_beyond_the_bound(value, where, activation):
    conv, x = convolution(gain=2.0)
    residual = x.flip(0).contiguous(memory_format=LAST)
    (x if where == "x" else residual)[1, 2, 3, 4] = value
    y = conv.run(x, residual, activation)
    want = torch.conv2d(x, 2 * torch.eye(16).view(16, 16, 1, 1)) + residual
    torch.testing.assert_close(y, activation(want), equal_nan=True)
    assert y.is_contiguous(memory_format=LAST) and y.dtype == torch.float32


@pytest.mark.parametrize("value", [NAN, float("inf"), 1.0])
def test_nothing_is_measured_without_relu(measured, value):
    conv, x = convolution(gain=2.0)
    measured.clear()
    x[1, 2, 3, 1] = value
    y = conv.run(x, None, NONE)
    want = torch.conv2d(x, 2 * torch.eye(16).view(16, 16, 1, 1))
    torch.testing.assert_close(y, want, equal_nan=True)
    assert not measured
    conv.run(y, None, RELU)
    assert measured and all(t is y for t in measured)


def test_writes_without_a_version_counter_reach_the_next_block():
    """`.data` moves no version counter: an output of a block has no stored bound."""
    _, mine = pair("basic")
    x = images().contiguous(memory_format=LAST)
    with torch.no_grad(), fr.use_backend("vendor"):
        y = mine.layer1(torch.relu(mine.bn1(mine.conv1(x))))
        for edit in (lambda: None, lambda: y.data[0, 1, 2, 3].fill_(NAN)):
            edit()
            assert mine.layer2[0](y).isnan().any() == y.isnan().any()
        one, zero = torch.ones(8), torch.zeros(8)
        weight = torch.ones(8, 8, 1, 1)
        z = torch.rand(1, 8, 4, 4).contiguous(memory_format=LAST)
        z = fr.conv_bn_relu(z, weight, one, zero)
        z.data[0, 0, 0, 0] = NAN
        assert fr.conv_bn_relu(z, weight, one, zero)[0, :, 0, 0].isnan().all()


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_an_overwritten_residual_loses_its_bound(inference):
    conv, x = convolution()
    with torch.inference_mode(inference), torch.no_grad():
        bounded = conv.run(x, None, RELU)
        y = conv.run(torch.full_like(x, NAN), bounded, NONE, overwrite=True)
        assert conv.run(y, None, RELU).isnan().all()
