"""Fixtures every test file shares: device x backend, fixed seeds, poisoned memory.

The tolerance rule is `fused_resnet.tolerance`, the same that `fused-resnet parity` uses.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterator

import pytest

# Before torch loads OpenMP: a thread that waits for another gives its core away. Where tests run
# side by side, each with as many threads as there are cores, spinning takes most of the time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if not torch.cuda.is_available():
    # Without a GPU the Triton kernels run on CPU tensors, in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fused_resnet as fr
from fused_resnet.kernels import registry
from tests.emulator import emulation
from tests.kernels.cuda import machines

# The ops whose CUDA kernels run on CPU tensors too, in tests/emulator/emulator.h's machine.
EMULATED_OPS = ("add_relu", "bn_add_relu", "conv_bn_relu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` runs over every backend there is; a module that sets OP = "add_relu" (or another
    op) leaves out those that have no implementation of it on any device. "emulated" is added for
    modules whose OP it has."""
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


_GPUS = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *_GPUS])
def device(request: pytest.FixtureRequest) -> str:
    """The device a test computes on: every one there is (test_backends.py says which is not)."""
    return request.param


@pytest.fixture
def backend(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """The backend that serves the ops during the test; skipped, with the reason, if not there."""
    op = getattr(request.module, "OP", None)
    if request.param == "emulated":
        request.getfixturevalue("emulator")
    reason = None if op is None else registry.missing(op, request.param, device)
    if reason is not None:
        pytest.skip(reason)
    if request.param == "triton" and device == "cpu":
        request.getfixturevalue("quick_interpreter")
    try:
        chosen = fr.use_backend(request.param)
        with chosen:
            yield request.param
    except RuntimeError as error:
        if "use_backend" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture
def emulator(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated CUDA kernels, built and loaded, always in the same order of threads. float32 is
    not multiplied as TF32 then, since stock on the CPU does not either."""
    if device != "cpu":
        pytest.skip("the emulator runs CUDA kernels on CPU tensors")
    if emulation.unavailable() is not None:
        pytest.skip(str(emulation.unavailable()))
    emulation.load()
    emulation.seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=["emulated", *_GPUS])
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """The raw CUDA kernels by machines.py, in the emulator and on a GPU where there is one."""
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
    """Triton's interpreter without its check of every integer for overflow, which takes half of the
    time; test_triton.py leaves it on."""
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    quick = dataclasses.replace(builder.options, sanitize_overflow=False)
    monkeypatch.setattr(builder, "options", quick)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of every recording of a training step; on the CPU they are played ones."""
    from tests.graphs import recorded_steps

    return recorded_steps.play(monkeypatch)


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test starts from one seed and leaves the global switches as it found them."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def poison() -> None:
    """Uninitialised memory comes filled with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
