"""The "vendor" convolution on GPUs (see kernels/tuning.py): PyTorch's semi-private
cudnn_convolution_relu and cudnn_convolution_add_relu, which are probed before use.

Batch normalisation is folded into the weights, which are rounded to their dtype, and the bias. The
ReLU is always applied, so convolutions without one are not supported; and none at all if cuDNN's
ReLU turns NaN into zero, unlike PyTorch's, or if the result depends on uninitialised memory: where
there is no residual, PyTorch passes the output itself as one, times zero.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.cache import refuse_capture
from fused_resnet.kernels.convolution import Unsupported
from fused_resnet.kernels.problem import Gemm, Problem
from fused_resnet.kernels.target import Target


@dataclass(frozen=True)
class CudnnConfig:
    """Empty: cuDNN chooses its algorithm itself."""

    def label(self) -> str:
        return "cuDNN"


CONFIG = CudnnConfig
# In PyTorch's messages: of its search by cuDNN's heuristics or measurements, and of cuDNN itself.
_NO_ENGINE = ("unable to find an engine", "CUDNN_STATUS_NOT_SUPPORTED")
_TRIES = 8  # of the probe, to get its output in memory that it has filled


@functools.cache
def unavailable() -> str | None:
    """None if the fused operations work on the current GPU, else the reason in one line."""
    if not torch.cuda.is_available():
        return "no GPU is available"
    if not torch.backends.cudnn.is_available():
        return "this PyTorch has no cuDNN"
    refuse_capture("cuDNN")
    try:
        return _probe()
    except Exception as error:  # treat any failure as unavailable
        return f"cuDNN's fused convolution failed its probe: {str(error).splitlines()[0]}"


@contextlib.contextmanager
def _nan_in_free_memory(like: Tensor) -> Iterator[set[int]]:
    """Leaves NaN in free blocks of the allocator, of the size of `like`; their addresses. Live
    blocks between them keep free ones from being merged."""
    blocks = [torch.full_like(like, torch.nan) for _ in range(64)]
    free = {block.data_ptr() for block in blocks[::2]}
    del blocks[::2]
    yield free


def _probe_alone(x: Tensor, weight: Tensor, bias: Tensor, expected: Tensor) -> str | None:
    """Compares the convolution without a residual, its output allocated in memory full of NaN."""
    for _ in range(_TRIES):
        with _nan_in_free_memory(expected) as free:
            y = _fused(x, weight, bias, None)
            in_nan = y.data_ptr() in free
        if y.isnan().any():
            return "cuDNN's fused convolution reads its uninitialised output"
        if not torch.equal(y, expected):
            return "cuDNN's fused convolution gives wrong results"
        if in_nan:
            return None
    return "cuDNN's fused convolution cannot be checked in memory full of NaN"


def _probe(device: str = "cuda") -> str | None:
    """Runs both operations on small integers, whose results are exact, in memory full of NaN, and
    on a NaN."""
    x = torch.arange(2 * 16 * 3 * 3, device=device).remainder(5).sub(2).view(2, 16, 3, 3)
    weight = torch.arange(16 * 16, device=device).remainder(3).sub(1).view(16, 16, 1, 1)
    x, weight = (t.half().contiguous(memory_format=torch.channels_last) for t in (x, weight))
    bias = torch.arange(16, device=device).remainder(4).sub(2).half()
    expected = F.conv2d(x, weight, bias)
    reason = _probe_alone(x, weight, bias, expected.relu())
    if reason is not None:
        return reason
    if not torch.equal(_fused(x, weight, bias, x), (expected + x).relu()):
        return "cuDNN's fused convolution and addition gives wrong results"
    x[0, 0, 0, 0] = torch.nan
    for residual in (None, x):
        if not _fused(x, weight, bias, residual)[0, :, 0, 0].isnan().all():
            return "cuDNN's fused ReLU turns NaN into zero"
    return None


def _fused(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *geometry: Any
) -> Tensor:
    stride, padding, dilation, groups = geometry or ((1, 1), (0, 0), (1, 1), 1)
    ops = torch.ops.aten
    if residual is None:
        return ops.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
    return ops.cudnn_convolution_add_relu(
        x, weight, residual, 1.0, bias, stride, padding, dilation, groups
    )


def supports(problem: Problem, target: Target) -> str | None:
    """None if cuDNN computes the convolution, else the reason in one line."""
    if problem.gemm().operands not in ("bfloat16", "float16", "tf32"):
        return f"cuDNN fuses 16-bit and TF32 convolutions, not {problem.gemm().operands}"
    relu = problem.activation == Activation.RELU
    return None if relu else "cuDNN's fused convolutions always apply a ReLU"


def candidates(gemm: Gemm, target: Target) -> list[CudnnConfig]:
    return [CudnnConfig()]


def choose(gemm: Gemm, target: Target, processors: int) -> CudnnConfig:
    return CudnnConfig()


def run_conv(
    conv: Any,
    x: Tensor,
    residual: Tensor | None,
    activation: Activation,
    y: Tensor,
    config: CudnnConfig,
) -> Tensor:
    """x, residual channels_last -> the output of a `GpuConv`, in memory allocated by cuDNN instead
    of y. activation must be RELU. Raises `Unsupported` where cuDNN has no kernel for it."""

    def fold() -> Tensor:
        folded = conv.weight.float() * conv.scale.view(-1, 1, 1, 1)
        return folded.to(conv.dtype).contiguous(memory_format=torch.channels_last)

    weight = conv.cached("vendor", fold)
    bias = conv.cached("vendor bias", lambda: conv.shift.to(conv.dtype))
    try:
        return _fused(x, weight, bias, residual, *conv.geometry)
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_ENGINE):
            raise
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and {x.dtype}"
        raise Unsupported(f"cuDNN has no fused convolution for {shapes}") from error
