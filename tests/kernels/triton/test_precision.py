"""The Triton kernels' rounding: operands in TF32, divisions and roots; and TF32 on AMD's GPUs."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fused_resnet import layout
from fused_resnet.kernels import registry
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.cuda.convolution import GpuConv
from fused_resnet.kernels.problem import Geometry, Problem
from fused_resnet.kernels.target import Target
from tests import ROOT

triton = pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = registry.missing("conv_bn_relu", "triton", DEVICE)
if REASON:
    pytest.skip(REASON, allow_module_level=True)

from fused_resnet.kernels.triton import backward, convolution, elementwise, support  # noqa: E402
from fused_resnet.kernels.triton.configs import Config  # noqa: E402

SMALL = Config(32, 32, 16, 4, 2)
NAN = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).item()  # CUDA's


@pytest.fixture
def tensor_cores(monkeypatch):
    """Allows TF32; the interpreter's products truncate their operands, as tensor cores do."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    if not support.on_host():
        return
    builder = type(importlib.import_module("triton.runtime.interpreter").interpreter_builder)
    create_dot = builder.create_dot

    def truncated(handle):
        bits = np.ascontiguousarray(handle.data).view(np.int32) & ~0x1FFF
        return type(handle)(bits.view(np.float32), handle.dtype)

    def dot(self, a, b, d, input_precision, *rest):
        if input_precision.name == "TF32":
            a, b = truncated(a), truncated(b)
        return create_dot(self, a, b, d, input_precision, *rest)

    monkeypatch.setattr(builder, "create_dot", dot)


@pytest.mark.parametrize("C, groups", [(64, 1), (3, 1), (16, 4)], ids=["64", "in runs", "groups"])
def test_tf32_is_rounded_without_bias(tensor_cores, C, groups):
    """Truncated operands, all positive, make every output 7e-4 too small."""
    geometry = Geometry((1, 1), (1, 1), (1, 1), groups)
    problem = Problem("conv_bn_relu", torch.float32, (32, C // groups, 3, 3), geometry)
    x = layout.channels_last(torch.rand(2, C, 9, 8, device=DEVICE))
    weight, ones = torch.rand(problem.weight_shape, device=DEVICE), torch.ones(32, device=DEVICE)
    x[1, 0, 0, 0], x[1, 1, 8, 7] = NAN, math.inf
    conv = GpuConv(problem, weight, ones, 0 * ones)
    y = layout.channels_last_empty((2, 32, 9, 8), x).fill_(torch.nan)
    convolution.run_conv(conv, x, None, Activation.RELU, y, SMALL)
    wanted = torch.nn.functional.conv2d(x.double(), weight.double(), None, *geometry)
    errors = (y / wanted - 1)[wanted.isfinite()]
    assert errors.mean().abs() < 3e-5, errors.mean()
    assert errors.abs().max() < 6e-4, errors.abs().max()
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y.isinf(), wanted.isinf())


def test_gradients_in_tf32_are_rounded_without_bias(tensor_cores):
    geometry = Geometry((2, 2), (1, 1), (1, 1))
    x, weight = torch.rand(2, 16, 12, 12, device=DEVICE), torch.rand(32, 16, 3, 3, device=DEVICE)
    g = torch.rand(2, 32, 6, 6, device=DEVICE)
    exact = torch.ops.aten.convolution_backward(
        g.double(), x.double(), weight.double(), None, *geometry[:3], False, [0, 0], 1,
        [True, True, False],
    )  # fmt: skip
    dx = backward.convolution_dx(g, weight, x.shape, geometry)
    dweight = backward.convolution_dweight(g, x, weight.shape, geometry)
    for mine, want in zip((dx, dweight), exact, strict=False):
        errors = mine / want - 1
        assert errors.mean().abs() < 3e-5 and errors.abs().max() < 6e-4, errors.mean()


def test_rounding_to_tf32():
    bits = [0x3F800FFF, 0x3F801000, 0xBF801000, 0x00001000, 0x7F7FFFFF, 0x7F800000, 0xFF800000]
    want = [0x3F800000, 0x3F802000, 0xBF802000, 0x00002000, 0x7F800000, 0x7F800000, 0xFF800000]
    x, y = (torch.tensor(v).to(torch.int32).view(torch.float32).to(DEVICE) for v in (bits, want))
    assert torch.equal(elementwise.round_to_tf32(x), y)
    assert elementwise.round_to_tf32(torch.full((2,), NAN, device=DEVICE)).isnan().all()


def test_tf32_on_amd():
    """Triton compiles it for one of AMD's architectures alone."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    problem = Problem("conv_bn_relu", torch.float32, (64, 64, 1, 1))
    assert convolution.supports(problem, Target("amd", "gfx942")) is None
    reason = convolution.supports(problem, Target("amd", "gfx90a"))
    assert reason == "Triton does not multiply TF32 operands on gfx90a"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert convolution.supports(problem, Target("amd", "gfx90a")) is None


COMPILE = """
import triton_resources as resources
jobs = {job.kernel: job for job in resources.batch_norm_jobs("float32", 90)}
for kernel in ("bn_stats_merge_kernel", "bn_reduce_merge_kernel"):
    found = resources.compiled(jobs[kernel])
    assert "error" not in found.found and found.found["approximate"] == [], (kernel, found.found)
"""


@pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="not in a checkout")
def test_batch_norm_divides_and_takes_roots_exactly(tmp_path):
    """In the PTX; the interpreter always does. triton_resources.py checks all kernels in CI."""
    path = [str(ROOT / "benchmarks/kernels/triton"), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
