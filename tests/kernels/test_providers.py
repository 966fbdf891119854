"""What providers answer: one question, a problem on a target; None or the reason in one line."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fused_resnet as fr
from fused_resnet.kernels import cache, providers, registry, target, tuning
from fused_resnet.kernels import native as native_kernels
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.convolution import FusedConv
from fused_resnet.kernels.cuda import cudnn, implicit_gemm
from fused_resnet.kernels.problem import Geometry, Problem, convolution
from fused_resnet.kernels.registry import OPS, Provider
from fused_resnet.kernels.target import Target, target_of
from tests.emulator import emulation
from tests.kernels import registrations

CPU, AMPERE, CDNA3 = (
    Target("cpu", "avx512"), Target("nvidia", "sm_80"), Target("amd", "gfx942")
)  # fmt: skip
UNIT = ((1, 1), (0, 0), (1, 1))


def conv(dtype=torch.float32, K=64, C=64, taps=(1, 1), groups=1, **more: Any) -> Problem:
    return convolution((K, C // groups, *taps), dtype, *UNIT, groups)._replace(**more)


@pytest.fixture
def restored(monkeypatch):
    """Providers registered by a test are removed after it."""
    registrations.keep(monkeypatch)


# --- targets --------------------------------------------------------------------------------------


def gpu(monkeypatch, hip: str | None, **properties: Any) -> Target:
    """The target of a machine with such a GPU."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties)
    )
    return target_of.__wrapped__(torch.device("cuda"))


def test_an_amd_gpu_is_not_nvidias(monkeypatch):
    """HIP reports (9, 4) for a gfx942, beyond Hopper's (9, 0)."""
    name = "gfx942:sramecc+:xnack-"
    found = gpu(monkeypatch, "6.4", major=9, minor=4, gcnArchName=name)
    assert found == CDNA3
    assert found.capability < (8, 0)
    assert implicit_gemm.supports(conv(torch.float16), found) is not None
    # PyTorch reports MIOpen there as cuDNN, available.
    monkeypatch.setattr(cudnn, "unavailable", lambda: None)
    monkeypatch.setattr(providers, "_has_native", lambda *_: None)
    monkeypatch.setattr(native_kernels, "build_info", lambda: {"cuda_archs": "8.0 9.0a+PTX"})
    for backend in ("vendor", "native"):
        provider = registry.provider(backend, "cuda")
        for op in provider.ops:
            assert "gfx942" in provider.supports(Problem(op), found)
    hopper = gpu(monkeypatch, None, major=9, minor=0)
    assert hopper == ("nvidia", "sm_90") and hopper.capability == (9, 0)


def test_compute_capability():
    for architecture, capability in (("sm_86", (8, 6)), ("sm_90a", (9, 0)), ("sm_120", (12, 0))):
        assert Target("nvidia", architecture).capability == capability
        assert Target("amd", architecture).capability == (0, 0)
    assert CPU.capability == CDNA3.capability == Target("nvidia", "none").capability == (0, 0)


def test_targets_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert target_of.__wrapped__(torch.device("cuda")).architecture == "none"
    assert target_of(torch.device("cpu")).architecture in ("avx512", "avx2", "generic")
    assert target.multiprocessors(torch.device("meta")) == 1


# --- reasons --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "problem, on, words",
    [
        (conv(), CPU, None),
        (conv(), Target("cpu", "generic"), "needs a processor with AVX2"),
        (Problem("conv_bn_relu"), Target("cpu", "generic"), "needs a processor with AVX2"),
        (conv(torch.float64), CPU, "no kernel for this dtype"),
        (conv(taps=(12, 11)), CPU, "more than 128 taps"),
        (conv(K=40, groups=4), CPU, "groups whose outputs are not a multiple of 16"),
        (conv(K=40), CPU, None),
    ],
)
def test_the_native_convolutions_reasons(problem, on, words):
    reason = registry.provider("native", "cpu").supports(problem, on)
    if registry.missing("add_relu", "native", "cpu") is None:
        assert reason == words if words is None else words in reason


def test_an_odd_number_of_bfloat16_channels():
    if registry.missing("add_relu", "native", "cpu") is not None:
        pytest.skip("the extension is not built")
    native = registry.provider("native", "cpu")
    try:
        native_kernels.widen_bfloat16(True)
        assert native.supports(conv(torch.bfloat16, C=33), CPU) is None
        native_kernels.widen_bfloat16(False)
        if not native_kernels.widens_bfloat16():  # the processor has the dot product
            reason = native.supports(conv(torch.bfloat16, C=33), CPU)
            assert "an odd number of channels" in reason
        assert native.supports(conv(torch.bfloat16, C=3), CPU) is None  # a row of taps is one run
    finally:
        native_kernels.widen_bfloat16(None)


@pytest.mark.parametrize(
    "problem, on, words",
    [
        (conv(torch.float16), AMPERE, None),
        (conv(), AMPERE, "multiplies 16-bit and TF32 operands, not float32"),
        (conv(torch.float64), AMPERE, "not float64"),
        (
            conv(torch.float16),
            Target("nvidia", "sm_75"),
            "needs a GPU of sm_80 or later, not sm_75",
        ),
        (conv(torch.float16), CDNA3, "not gfx942"),
        (conv(torch.float16, C=12), AMPERE, None),  # padded
        (
            conv(torch.float16, C=12, groups=3),
            AMPERE,
            "channels of a group must be a multiple of 8",
        ),
        (conv(torch.float16, K=12), AMPERE, "outputs of a group must be a multiple of 8, got 12"),
        (conv(torch.float16, x_shape=(2**13, 64, 512, 512)), AMPERE, "more than 2^31 pixels"),
    ],
)
def test_the_cuda_convolutions_reasons(monkeypatch, problem, on, words):
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    monkeypatch.setattr(implicit_gemm, "tiles", lambda: [{}])
    reason = implicit_gemm.supports(problem, on)
    assert reason is None if words is None else words in reason


def test_the_other_providers_reasons():
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert "not float32" in cudnn.supports(conv(), AMPERE)
    assert "always apply a ReLU" in cudnn.supports(
        conv(torch.float16, activation=Activation.NONE), AMPERE
    )
    assert cudnn.supports(conv(torch.float16), AMPERE) is None
    vendor = registry.provider("vendor", "cpu")
    assert "does not compute float64" in vendor.supports(conv(torch.float64), CPU)
    assert registry.missing("add_relu", "vendor", "cpu") == "vendor has no add_relu for cpu"
    # Registered by the package; tests replace it where Triton's interpreter runs.
    assert providers.Triton("cpu").supports(Problem("add_relu"), CPU).startswith("Triton")
    for device in ("cpu", "cuda"):
        reference = registry.provider("reference", device)
        assert all(reference.supports(Problem(op), CPU) is None for op in OPS)
    for provider in registry._providers.values():
        for op in provider.ops:
            for on in (CPU, CDNA3, Target("nvidia", "sm_70"), Target("nvidia", "none")):
                reason = provider.supports(Problem(op), on)
                assert reason is None or (reason and "\n" not in reason)


class Gpu:
    """Stands in for a GPU whose current stream may be captured; logs the current devices."""

    def __init__(self, monkeypatch):
        self.capturing, self.devices, self.current = True, [], 0
        for name, value in {
            "is_initialized": lambda: True, "is_available": lambda: True,
            "is_current_stream_capturing": lambda: self.capturing, "device": self.device,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def device(self, device):
        self.devices.append(str(device))
        yield


def test_nothing_is_probed_during_a_capture(monkeypatch):
    """A failed probe would exclude Triton or cuDNN for as long as the process lives."""
    pytest.importorskip("triton")
    support = importlib.import_module("fused_resnet.kernels.triton.support")
    machine, probed = Gpu(monkeypatch), []
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(cudnn, "_probe", lambda: probed.append("cuDNN"))
    monkeypatch.setattr(support, "launch", lambda *a, **k: probed.append("Triton") or a[2].fill_(1))
    asked = {
        "cuDNN": cudnn.unavailable,
        "Triton": lambda: support.unavailable(Target("nvidia", "sm_90"), "cpu"),
    }
    for name, ask in asked.items():
        for cached in (cudnn.unavailable, support.unavailable):
            cached.cache_clear()
        try:
            machine.capturing = True
            with pytest.raises(RuntimeError, match=f"{name} cannot be probed .* warm up first"):
                ask()
            assert not probed
            machine.capturing = False
            assert ask() is None and probed.pop() == name
            machine.capturing = True
            assert ask() is None and not probed
        finally:
            for cached in (cudnn.unavailable, support.unavailable):
                cached.cache_clear()


def test_the_capture_of_the_tensors_device_counts(monkeypatch):
    machine = Gpu(monkeypatch)
    assert cache.capturing(SimpleNamespace(is_cuda=True, device=torch.device("cuda:1")))
    assert machine.devices == ["cuda:1"]
    assert not cache.capturing(torch.empty(1))


def test_a_forced_provider_that_supports_the_problem_is_the_only_one_asked(restored):
    def never(problem: Problem) -> str | None:
        raise AssertionError("asked")

    registry.register("native", "cpu", Answers(lambda p: None))
    registry.register("vendor", "cpu", Answers(never))
    with fr.use_backend("native"):
        assert registry.candidates(conv(), "cpu") == ("native",)


# --- the choice -----------------------------------------------------------------------------------


class Doubling(FusedConv):
    """As PyTorch computes it, times two, so that a test notices who ran."""

    def __init__(self, problem, weight, scale, shift):
        super().__init__(problem, weight, scale, shift)
        self.operands = weight, scale.view(-1, 1, 1), shift.view(-1, 1, 1)

    def run(self, x, residual, activation, overwrite=False):
        weight, scale, shift = self.operands
        y = torch.conv2d(x, weight, None, *self.geometry) * scale + shift
        y = y if residual is None else y + residual
        return 2 * activation(y)


class Neon(Provider):
    """A trial: 3x3 convolutions for another instruction set."""

    ops = ("conv_bn_relu",)
    asked = 0

    def target(self, device: torch.device) -> Target:
        return Target("cpu", "neon")

    def supports(self, problem: Problem, target: Target) -> str | None:
        self.asked += 1
        if target.architecture != "neon":
            return f"the trial needs neon, this is {target.architecture}"
        if problem.dtype is not None and problem.weight_shape[2:] != (3, 3):
            return "the trial computes 3x3 convolutions only"
        return None

    def convolution(self) -> Any:
        return Doubling


def test_a_provider_for_another_instruction_set(restored):
    x, weight = torch.randn(1, 8, 6, 6), torch.randn(16, 8, 3, 3)
    arguments = (x, weight, torch.ones(16), torch.zeros(16))
    want = fr.conv_bn_relu(*arguments, padding=1)
    pointwise = convolution((16, 8, 1, 1), x.dtype, *UNIT, 1)
    before = registry.choose(pointwise, "cpu")
    registry.register("native", "cpu", Neon())
    torch.testing.assert_close(fr.conv_bn_relu(*arguments, padding=1), 2 * want)
    assert registry.choose(convolution(weight.shape, x.dtype, *UNIT, 1), "cpu") == "native"
    assert before != "reference" and registry.choose(pointwise, "cpu") != "native"
    with pytest.warns(RuntimeWarning, match="native has no add_relu for cpu"):
        registry.warn_once.cache_clear()
        assert registry.choose("add_relu", "cpu") == "reference"


def test_a_provider_is_asked_once(restored):
    neon = Neon()
    registry.register("neon", "cpu", neon)
    for _ in range(3):
        assert registry.choose(conv(), "cpu") != "neon"
    assert neon.asked == 0  # not in the order of preference
    with fr.use_backend("neon"):
        for _ in range(3):
            assert registry.choose(conv(taps=(3, 3)), "cpu") == "neon"
            asked = neon.asked
        assert registry.choose(conv(taps=(3, 3)), "cpu") == "neon" and neon.asked == asked
        assert registry.convolution(conv(taps=(3, 3)), "cpu") is Doubling
        assert registry.convolution(conv(), "cpu") is None  # the reference
        assert (
            registry.choose("conv_bn_relu", "cpu") == "neon" != registry.choose("add_relu", "cpu")
        )
    for problem in (conv(taps=(3, 3)), "conv_bn_relu"):
        assert registry.choose(problem, "cpu") != "neon"


class Answers(Provider):
    """Supports what `answer` returns None for."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def supports(self, problem: Problem, target: Target) -> str | None:
        return self.answer(problem)


def test_problems_that_a_forced_backend_does_not_support_fall_back(restored):
    """To those after it in the order of preference."""
    wide = conv(K=128)
    for name, answer in (("native", "no"), ("vendor", None)):
        registry.register(
            name, "cpu", Answers(lambda p, a=answer: a if p.dtype is not None else None)
        )
    with fr.use_backend("native"):
        assert registry.candidates(wide, "cpu") == ("vendor",)
    registry.register("vendor", "cpu", Answers(lambda p: "no" if p.dtype is not None else None))
    registry.register("native", "cpu", Answers(lambda p: None))
    with fr.use_backend("vendor"):
        assert registry.candidates(wide, "cpu") == ("reference",)
    assert registry.candidates(wide, "cpu") == ("native", "reference")


def test_an_answer_may_depend_on_tf32(restored):
    def answer(problem: Problem) -> str | None:
        return None if problem.dtype is None or problem.gemm().operands == "tf32" else "no"

    registry.register("trial", "cpu", Answers(answer))
    with fr.use_backend("trial"):
        for allowed in (True, False, True):
            torch.backends.cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"
            assert (registry.choose(conv(), "cpu") == "trial") == allowed


SWITCHES = """
import os, sys
import torch
import fused_resnet as fr
from fused_resnet import dtypes
from fused_resnet.graphs import capture
from fused_resnet.kernels import problem, registry

backends = torch.backends
rows = [  # a user's statement, and what it allows to convolutions and to matrix products
    ("pass", True, False),
    ("backends.cudnn.allow_tf32 = False", False, False),
    ("backends.cuda.matmul.allow_tf32 = True", True, True),
    ("torch.set_float32_matmul_precision('high')", True, True),
    ("torch.set_float32_matmul_precision('highest')", True, False),
    ("backends.fp32_precision = 'ieee'", False, False),
    ("backends.fp32_precision = 'tf32'", True, True),
    ("backends.cudnn.fp32_precision = 'ieee'", False, False),
    ("backends.cudnn.fp32_precision = 'tf32'", True, True),
    ("backends.cudnn.conv.fp32_precision = 'ieee'", False, False),
    ("backends.cuda.matmul.fp32_precision = 'tf32'", True, True),
    ("backends.cuda.matmul.fp32_precision = 'ieee'", True, False),
    ("backends.fp32_precision = 'ieee'; backends.cudnn.allow_tf32 = True", True, False),
]
conv = problem.Problem("conv_bn_relu", torch.float32, (16, 16, 1, 1))
default = capture.settings("cuda", None)
for statement, convolutions, products in rows:
    if os.fork() == 0:  # a switch that was set cannot be unset
        exec(statement)
        assert dtypes.convolves_in_tf32() == convolutions, statement
        assert dtypes.multiplies_in_tf32() == products, statement
        assert conv.gemm().operands == ("tf32" if convolutions else "float32"), statement
        registry.candidates(conv, "cuda")
        changed = capture.settings("cuda", None) != default
        assert changed == ((convolutions, products) != (True, False)), statement
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0, statement
"""


def test_every_switch_of_tf32_is_followed():
    """Reading PyTorch's older switches raises after its newer ones were set."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", SWITCHES]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0, run.stderr


def test_amx_is_preferred_for_bfloat16_alone(restored, monkeypatch):
    for name in ("native", "vendor"):
        registry.register(name, "cpu", Answers(lambda p: None))
    for amx, first in ((True, "vendor"), (False, "native")):
        registry._candidates.clear()
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda a=amx: a)
        assert registry.choose(conv(torch.bfloat16), "cpu") == first
        assert registry.choose(conv(), "cpu") == "native"
        with fr.use_backend("native"):
            assert registry.choose(conv(torch.bfloat16), "cpu") == "native"


def test_the_compute_dtype_is_one_that_a_provider_supports(restored):
    for supported in ((torch.float32,), (torch.float32, torch.bfloat16), ()):
        for name in ("native", "vendor"):
            registry.register(name, "cpu", Answers(
                lambda p, s=supported: None if p.dtype is None or p.dtype in s else "no"
            ))  # fmt: skip
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            wider = supported and dtype != torch.float64
            want = dtype if dtype in supported else torch.float32 if wider else None
            assert registry.conv_dtype(dtype, "cpu") == want


def test_only_supported_convolutions_are_measured():
    if emulation.unavailable() is not None:
        pytest.skip(str(emulation.unavailable()))
    emulation.load()
    native = registry.provider("emulated", "cpu")
    device = torch.device("cpu")
    narrow = conv(torch.float16, K=12, x_shape=(1, 64, 8, 8))
    assert tuning.configurations(narrow, device, (native,)) == []
    assert tuning.configurations(narrow._replace(weight_shape=(16, 64, 1, 1)), device, (native,))


def test_the_reference_is_the_last_resort_on_gpus():
    """Of problems that depend on x's size or on what follows."""
    if emulation.unavailable() is not None:
        pytest.skip(str(emulation.unavailable()))
    emulation.load()
    device, weight = torch.device("cpu"), torch.randn(12, 16, 1, 1, dtype=torch.float16)
    problem = Problem("conv_bn_relu", torch.float16, (12, 16, 1, 1), Geometry(*UNIT))
    x = torch.randn(1, 16, 3, 3, dtype=torch.float16)
    with fr.use_backend("emulated"):
        assert registry.convolution(problem, "cpu") is None
        module = providers.GpuConv(problem, weight, torch.ones(12), torch.zeros(12))
        assert tuning.choice_for(problem._replace(x_shape=x.shape), device).backend == "reference"
        y = module.run(x, None, Activation.RELU)
    want = torch.conv2d(x.float(), weight.float()).relu().half()
    torch.testing.assert_close(y, want, rtol=1e-3, atol=1e-3)
