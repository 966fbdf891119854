"""Fixtures for all tests: device x backend, fixed seeds, poisoned memory.

The tolerance rule is `fused_resnet.tolerance`, which `fused-resnet parity` also uses.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterator

import pytest

# Before torch loads OpenMP: waiting threads yield their core. When tests run in parallel, each with
# one thread per core, spinning takes most of the time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if not torch.cuda.is_available():
    # Without a GPU, run the Triton kernels on CPU tensors in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Their convolutions would round float32 operands to TF32, which stock on the CPU does not.
    torch.backends.cudnn.allow_tf32 = False

import fused_resnet as fr
from fused_resnet.kernels import registry
from tests import pairwise
from tests.emulator import emulation
from tests.kernels.cuda import machines
from tests.kernels.triton import interpreter

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.register()

# Ops whose CUDA kernels also run on CPU tensors, in the emulator (tests/emulator/emulator.h).
EMULATED_OPS = ("add_relu", "bn_add_relu", "conv_bn_relu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrizes `backend` over all registered backends. A module that sets OP = "add_relu" (or
    another op) gets only those that implement it on some device, and "emulated" for ops in
    EMULATED_OPS."""
    if "backend" not in metafunc.fixturenames:
        return
    op = getattr(metafunc.module, "OP", None)
    names = [
        name
        for name in registry.names()
        if op is None or any(name in table[op] for table in registry.PREFERENCE.values())
    ]
    names += ["emulated"] if op in EMULATED_OPS and "emulated" not in names else []
    metafunc.parametrize("backend", names, indirect=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-combinations", action="store_true", help="run all tests marked pairwise"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if item.get_closest_marker("slow_interpreted") and pairwise.is_interpreted(params):
            item.add_marker("slow")
    pairwise.select(config, items)


_GPUS = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *_GPUS])
def device(request: pytest.FixtureRequest) -> str:
    """The device of a test: "cpu", and "cuda" if available (test_backends.py reports if not)."""
    return request.param


@pytest.fixture
def backend(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """The backend forced during the test; skips with the reason if it is unavailable."""
    op = getattr(request.module, "OP", None)
    if request.param == "emulated":
        request.getfixturevalue("emulator")
    reason = None if op is None else registry.missing(op, request.param, device)
    if reason is not None:
        pytest.skip(reason)
    if request.param == "triton" and device == "cpu":
        request.getfixturevalue("quick_interpreter")
    try:
        with fr.use_backend(request.param):
            yield request.param
    except RuntimeError as error:
        if "use_backend" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture
def emulator(device: str) -> None:
    """Builds and loads the emulated CUDA kernels, with a fixed thread order. Disables TF32, which
    stock on the CPU does not use either."""
    if device != "cpu":
        pytest.skip("the emulator runs CUDA kernels on CPU tensors")
    if emulation.unavailable() is not None:
        pytest.skip(str(emulation.unavailable()))
    emulation.load()
    emulation.seed(0)
    torch.backends.cudnn.conv.fp32_precision = "ieee"


@pytest.fixture(params=["emulated", *_GPUS])
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs the raw CUDA kernels (machines.py) in the emulator and, if available, on a GPU."""
    if request.param == "cuda":
        reason = registry.missing("conv_bn_relu", "native", "cuda")
    else:
        reason = emulation.unavailable()
    if reason is not None:
        pytest.skip(reason)
    with machines.running_on("cuda" if request.param == "cuda" else "cpu"):
        yield


@pytest.fixture
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables the integer overflow checks of Triton's interpreter, half of its run time;
    test_triton.py keeps them."""
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    quick = dataclasses.replace(builder.options, sanitize_overflow=False)
    monkeypatch.setattr(builder, "options", quick)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of every captured training step; on the CPU the graphs are simulated."""
    from tests.graphs import recorded_steps

    return recorded_steps.play(monkeypatch)


@pytest.fixture(params=["family", pytest.param("fuse", marks=pytest.mark.slow)])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test of `model_helpers.pair` with this package's networks, and with torchvision's
    changed by `fuse`."""
    helpers = importlib.import_module("tests.models.model_helpers")
    monkeypatch.setattr(helpers, "WAY", request.param)
    return request.param


@pytest.fixture(autouse=True)
def reset_global_state() -> Iterator[None]:
    """Seeds every test with 0 and restores the global settings after it."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    conv = torch.backends.cudnn.conv
    precision = conv.fp32_precision
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
    if conv.fp32_precision != precision:  # a value that was set no longer follows the wider switch
        conv.fp32_precision = precision


@pytest.fixture
def poison() -> None:
    """Fills uninitialized memory with NaN, so that unwritten elements are detected."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
