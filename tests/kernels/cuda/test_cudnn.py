"""cuDNN's fused convolutions, computed by PyTorch's operations: the probe and the fallback."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from fused_resnet.kernels import registry, tuning
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.convolution import Unsupported
from fused_resnet.kernels.cuda import cudnn
from fused_resnet.kernels.cuda.convolution import GpuConv
from fused_resnet.kernels.problem import Geometry, Problem
from fused_resnet.layout import channels_last


class Allocator:
    """Like PyTorch's on a GPU: what is freed is allocated next, with its contents."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def empty_like(self, like: Tensor) -> Tensor:
        memory = self._free.pop() if self._free else torch.zeros_like(like)
        t = memory.view_as(memory)
        weakref.finalize(t, self._free.append, memory)
        return t

    def full_like(self, like: Tensor, value: float) -> Tensor:
        return self.empty_like(like).fill_(value)


class Fused:
    """Both operations as PyTorch computes them. fault: "reads": its uninitialised output is added,
    times zero; "wrong"; "drops NaN": the ReLU; "elsewhere": its output is never in memory that the
    caller has freed. fails: the message of an error, or None."""

    def __init__(self, fault: str = "", fails: str | None = None) -> None:
        self.allocator = Allocator()
        self.fault, self.fails, self.calls = fault, fails, 0

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *geometry
    ) -> Tensor:
        self.calls += 1
        if self.fails is not None:
            raise RuntimeError(self.fails)
        z = torch.conv2d(x, weight, bias)
        y = torch.empty_like(z) if self.fault == "elsewhere" else self.allocator.empty_like(z)
        if residual is None and self.fault == "reads":
            residual = 0 * y
        y.copy_((z if residual is None else z + residual).relu())
        if self.fault == "drops NaN":
            y.nan_to_num_(0)
        if self.fault == "wrong":
            y += 1
        return y


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("", None),
        ("reads", "cuDNN's fused convolution reads its uninitialised output"),
        ("wrong", "cuDNN's fused convolution gives wrong results"),
        ("drops NaN", "cuDNN's fused ReLU turns NaN into zero"),
        ("elsewhere", "cuDNN's fused convolution cannot be checked in memory full of NaN"),
    ],
)
def test_probe(monkeypatch, fault, reason):
    fused = Fused(fault)
    monkeypatch.setattr(cudnn, "_fused", fused)
    monkeypatch.setattr(torch, "full_like", fused.allocator.full_like)
    assert cudnn._probe("cpu") == reason


@pytest.mark.parametrize(
    "message",
    [
        "GET was unable to find an engine to execute this computation",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        "an illegal memory access was encountered",
    ],
)
def test_a_convolution_without_an_engine_falls_back(monkeypatch, message):
    """With the reason, once; every other error is raised. `tune` does not time the fallback."""
    fused = Fused(fails=message)
    monkeypatch.setattr(cudnn, "_fused", fused)
    monkeypatch.setattr(
        tuning, "choice_for", lambda *_: tuning.Choice("vendor", cudnn.CudnnConfig())
    )
    registry.warn_once.cache_clear()
    x = channels_last(torch.randn(2, 8, 5, 5, dtype=torch.bfloat16))
    weight, scale = torch.randn(16, 8, 1, 1, dtype=torch.bfloat16), torch.rand(16)
    problem = Problem(
        "conv_bn_relu", torch.bfloat16, (16, 8, 1, 1), Geometry((1, 1), (0, 0), (1, 1))
    )
    conv = GpuConv(problem, weight, scale, scale)
    if "illegal" in message:
        with pytest.raises(RuntimeError, match="illegal") as error:
            conv.run(x, None, Activation.RELU)
        assert not isinstance(error.value, Unsupported)
        return
    with pytest.raises(Unsupported, match="no fused convolution"):
        conv.run_by("vendor", cudnn.CudnnConfig(), x, None, Activation.RELU)
    with pytest.warns(RuntimeWarning, match=r"cuDNN has no .* x \(2, 8, 5, 5\).*falling back"):
        y = conv.run(x, None, Activation.RELU)
    want = torch.conv2d(x.float(), weight.float()) * scale.view(-1, 1, 1) + scale.view(-1, 1, 1)
    torch.testing.assert_close(y.float(), want.relu(), rtol=1e-2, atol=1e-2)
    calls = fused.calls
    assert torch.equal(conv.run(x, None, Activation.RELU), y) and fused.calls == calls
