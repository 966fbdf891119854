"""`tuning.tune` and `measure`: order, the check of outputs, failures, and continued runs, on a
simulated GPU. tests/kernels/triton/test_triton.py tests files of winners and the command's table.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_resnet.bench import contenders, entry, machine
from fused_resnet.kernels import measure, registry, target, tuning
from fused_resnet.kernels.cuda import convolution
from fused_resnet.kernels.problem import Geometry, Problem
from fused_resnet.kernels.registry import Provider
from fused_resnet.train import distributed

GPU = torch.device("cuda:1")


def conv(C: int, dtype: torch.dtype = torch.float32, taps: int = 1) -> Problem:
    geometry = Geometry((1, 1), (taps // 2, taps // 2), (1, 1))
    return Problem("conv_bn_relu", dtype, (32, C, taps, taps), geometry, (2, C, 5, 6))


@dataclass(frozen=True)
class Config:
    tile: int

    def label(self) -> str:
        return f"tile {self.tile}"


class Backend(Provider):
    """Has three configurations. `log`: of compilations, if they are compiled ahead."""

    def __init__(self, name: str, log: list[Any] | None = None) -> None:
        self.name = name
        self.module = SimpleNamespace(
            CONFIG=Config, candidates=lambda gemm, target: [Config(i) for i in range(3)]
        )
        if log is not None:
            self.module.compile_ahead = lambda problem, config, device: log.append(
                ("compile", problem, config.tile, device)
            )

    def supports(self, problem, target):
        return None

    def gpu_convolution(self):
        return self.module


class Bench:
    """Two backends and two problems; notes what is measured on which device is waited for."""

    def __init__(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(tuning, "file_name", lambda device: "a_gpu.json")
        monkeypatch.setattr(tuning, "_winners", {})
        monkeypatch.setattr(registry, "gpu_convolution", lambda name: self.backends[0].module)
        monkeypatch.setattr(tuning, "gpu_convolution", registry.gpu_convolution)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(target, "target_of", lambda device: target.Target("nvidia", "sm_90"))
        monkeypatch.setattr(registry, "target_of", target.target_of)
        self.log: list[Any] = []
        self.backends = (Backend("triton", self.log), Backend("native"))
        self.problems = [conv(64), conv(128)]
        self.path = tmp_path / "fused_resnet" / "a_gpu.json"
        self.errors: dict[tuple[Any, ...], BaseException] = {}
        self.context_error: Exception | None = None

    def synchronize(self, device):
        self.log.append(("synchronize", device))
        if self.context_error is not None:
            raise self.context_error

    def measure(self, problem, backend, config):
        self.log.append(("measure", problem, backend, config.tile))
        if (problem, backend, config.tile) in self.errors:
            raise self.errors[problem, backend, config.tile]
        return 3.0 - config.tile

    def tune(self, **options: Any) -> tuning.Tuned:
        self.log.clear()
        return tuning.tune(self.problems, GPU, self.backends, self.measure, **options)

    def measured(self) -> list[Any]:
        return [what[1:] for what in self.log if what[0] == "measure"]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    yield Bench(monkeypatch, tmp_path)
    tuning.choice.cache_clear()


def test_own_kernels_first_and_triton_compiled_ahead(bench):
    tuned = bench.tune()
    one, other = bench.problems
    assert bench.measured() == [
        (problem, backend, tile)
        for backend in ("native", "triton") for problem in (one, other) for tile in range(3)
    ]  # fmt: skip
    compiled = [what for what in bench.log if what[0] == "compile"]
    assert {what[1:] for what in compiled} == {
        (p, tile, GPU) for p in (one, other) for tile in range(3)
    }
    for _, problem, tile, _ in compiled:
        ready = bench.log.index(("compile", problem, tile, GPU))
        assert ready < bench.log.index(("measure", problem, "triton", tile))
    assert tuned.complete and tuned.winners[one.gemm()] == {
        name: tuning.Choice(name, Config(2), 1.0) for name in ("native", "triton")
    }


def test_a_configuration_that_fails_is_skipped_while_the_gpu_works(bench):
    one = bench.problems[0]
    bench.errors[one, "native", 2] = RuntimeError("too many registers")
    tuned = bench.tune()
    assert tuned.winners[one.gemm()]["native"].config == Config(1)
    assert tuned.complete and not tuned.wrong and len(bench.measured()) == 12
    failed = bench.log.index(("measure", one, "native", 2))
    assert bench.log[failed + 1] == ("synchronize", GPU), "another device was waited for"
    assert bench.tune().winners == tuned.winners and not bench.measured()


def test_a_gpu_that_works_no_more_ends_the_run(bench):
    """After an illegal access every later configuration fails, and would appear not to run here."""
    one, other = bench.problems
    bench.errors[other, "native", 1] = RuntimeError("illegal memory access\nmore")
    bench.context_error = RuntimeError("illegal memory access")
    message = r"not work any more after native tile 1 .*illegal memory access\)\. The winners"
    with pytest.raises(tuning.Broken, match=message):
        bench.tune()
    assert bench.measured()[-1] == (other, "native", 1)
    winners = tuning.read(bench.path)
    assert winners[one.gemm()]["native"].config == Config(2)
    assert winners[other.gemm()]["native"].config == Config(0)
    # The next process continues after it.
    bench.context_error = None
    tuned = bench.tune()
    assert tuned.complete and bench.measured()[0] == (other, "native", 2)
    assert tuned.winners[other.gemm()]["native"].config == Config(2)
    assert len(bench.measured()) == 1 + 6


def test_an_interrupted_run_continues(bench):
    other = bench.problems[1]
    bench.errors[other, "native", 1] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        bench.tune()
    bench.errors.clear()
    tuned = bench.tune()
    assert bench.measured()[:2] == [(other, "native", 1), (other, "native", 2)]
    assert len(bench.measured()) == 8 and tuned.winners == tuning.read(bench.path)
    assert {c.config for by in tuned.winners.values() for c in by.values()} == {Config(2)}
    bench.tune()
    assert not bench.measured()
    assert bench.tune(again=True) == tuned and len(bench.measured()) == 12


def test_a_run_ends_after_its_time(bench, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tuning.time, "monotonic", lambda: now[0])
    measured = bench.measure

    def slow(*which):
        now[0] += 1.0
        return measured(*which)

    monkeypatch.setattr(bench, "measure", slow)
    for expected in (5, 5, 2):
        tuned = bench.tune(seconds=4.5)
        assert len(bench.measured()) == expected and tuned.complete == (expected == 2)
    assert len(tuning.read(bench.path)) == 2


def test_a_wrong_configuration_does_not_win(bench):
    one, _ = bench.problems
    for tile in range(3):
        bench.errors[one, "native", tile] = tuning.Wrong("y: largest error 3")
    bench.tune()  # of other kernels
    tuned = bench.tune(again=True)
    assert "native" not in tuned.winners[one.gemm()] and "triton" in tuned.winners[one.gemm()]
    assert len(tuned.wrong) == 3 and "native tile 0 is wrong" in tuned.wrong[0]
    assert ("synchronize", GPU) not in bench.log
    assert "native" not in tuning.read(bench.path)[one.gemm()]


def test_out_of_memory_is_measured_again(bench):
    one, _ = bench.problems
    bench.errors[one, "triton", 0] = torch.OutOfMemoryError("others use the GPU")
    assert not bench.tune().complete
    bench.errors.clear()
    assert bench.tune().complete and bench.measured() == [(one, "triton", 0)]


# --- the measurement ------------------------------------------------------------------------------


@pytest.fixture
def devices(monkeypatch):
    """The devices that were made current, or waited for."""
    seen: list[str] = []

    @contextlib.contextmanager
    def device(which):
        seen.append(str(which))
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda which: seen.append(str(which)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda which: seen.append(str(which)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return seen


class Exactly:
    """A backend that computes in float32, and what `change` makes of it."""

    def __init__(self, change):
        self.change = change

    def run_conv(self, conv, x, residual, activation, y, config):
        want = torch.conv2d(x.float(), conv.weight.float(), None, *conv.geometry)
        want = want * conv.scale.view(-1, 1, 1) + conv.shift.view(-1, 1, 1)
        return self.change(want.relu()).to(x.dtype)


def last_pixel_lost(y):
    y[-1, -1, -1, -1] = y.abs().max() + 1
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "change, right", [(lambda y: y, True), (lambda y: y.roll(1, 3), False),
                      (last_pixel_lost, False), (lambda y: y * 1.02, False)],
    ids=["right", "shifted", "the last pixel", "scaled"],
)  # fmt: skip
def test_outputs_are_checked_before_they_are_timed(monkeypatch, dtype, change, right):
    """In parts: the last pixel is in another one than the first."""
    monkeypatch.setattr(measure, "CHUNK", 1)
    monkeypatch.setattr(measure, "seconds", lambda call: call() is None or 2.0)
    monkeypatch.setattr(registry, "gpu_convolution", lambda name: Exactly(change))
    call = measure.measure_on(torch.device("cpu"))
    problem = conv(16, dtype, 3)
    if right:
        assert call(problem, "exactly", None) == 2.0
    else:
        with pytest.raises(tuning.Wrong, match=r"y: .* error .* allowed"):
            call(problem, "exactly", None)


def test_unwritten_outputs_are_wrong(monkeypatch):
    """The memory of an earlier output is reused, and would hold the right values."""
    backends = {"right": Exactly(lambda y: y), "nothing": SimpleNamespace(run_conv=lambda *a: None)}
    monkeypatch.setattr(measure, "seconds", lambda call: 1.0)
    monkeypatch.setattr(registry, "gpu_convolution", backends.__getitem__)
    call = measure.measure_on(torch.device("cpu"))
    kept: list[torch.Tensor] = []

    def reused(shape, x):
        if not kept:
            kept.append(torch.empty(shape, dtype=x.dtype))
        return kept[0]

    # An allocator with one block of this size.
    monkeypatch.setattr(convolution, "channels_last_empty", reused)
    monkeypatch.setattr(torch.Tensor, "new_full", lambda x, shape, v: reused(shape, x).fill_(v))
    backends["right"].change = lambda y: kept[0].copy_(y)
    assert call(conv(16), "right", None) == 1.0
    with pytest.raises(tuning.Wrong):
        call(conv(16), "nothing", None)


def test_time_is_that_of_graphs_on_the_right_device(monkeypatch, devices):
    """Launched one by one, kernels of a few us would all take as long as Python."""
    clock, log = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = clock[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    class Graph:
        def capture_begin(self, capture_error_mode):
            log.append(capture_error_mode)
            self.before = clock[0]

        def capture_end(self):
            self.seconds, clock[0] = clock[0] - self.before, self.before

        def replay(self):
            clock[0] += self.seconds * 0.1  # without Python

    def call():
        clock[0] += 4e-4

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "Stream": lambda: stream, "current_stream": lambda: stream, "Event": Event,
        "CUDAGraph": Graph, "stream": lambda s: contextlib.nullcontext(),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert measure.seconds(call) == pytest.approx(4e-5) and log == ["thread_local"]

    monkeypatch.setattr(measure, "_Case", lambda problem, device: SimpleNamespace(
        check=lambda *which: devices.append("checked")
    ))  # fmt: skip
    monkeypatch.setattr(measure, "seconds", lambda call: devices.append("timed") or 1.0)
    measure.measure_on(GPU)(conv(16), "native", None)
    assert devices == ["cuda:1", "checked", "timed"]


def test_benchmarks_use_the_device_they_are_asked_for(devices):
    assert machine.use_device("cuda:1") == GPU and devices == ["cuda:1"]
    with pytest.raises(ValueError, match="this machine has 2 CUDA GPUs"):
        machine.use_device("cuda:2")
    y = torch.ones(1)
    measured = entry.Entry("fused", contenders.Step(lambda: y), GPU, 0.0, 0.0, 0.0, y, 0)
    devices.clear()
    measured.sample()
    assert devices == ["cuda:1"] * 2
    machine._best_time(lambda: y, GPU)
    assert set(devices) == {"cuda:1"}


def test_training_uses_the_device_it_is_asked_for(devices, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with distributed.processes(GPU) as (rank, count, device):
        assert (rank, count, device) == (0, 1, GPU) and devices == ["cuda:1"]


@pytest.mark.parametrize("device, options", [("cuda:1", {"device_id": 1}), ("cpu", {})])
def test_other_engines_use_the_device_they_are_asked_for(monkeypatch, device, options):
    class Seen(Exception):
        pass

    def session(file, settings, providers):
        raise Seen(providers)

    name = "CUDAExecutionProvider" if device != "cpu" else "CPUExecutionProvider"
    engine = SimpleNamespace(
        SessionOptions=SimpleNamespace, InferenceSession=session,
        get_available_providers=lambda: [name],
    )  # fmt: skip
    monkeypatch.setattr(contenders, "_peer", lambda package: engine)
    monkeypatch.setattr(contenders, "_prepared", lambda *which: None)
    monkeypatch.setattr(contenders, "_images", lambda *which: None)
    monkeypatch.setattr(torch.onnx, "export", lambda *which, **how: None)
    case = contenders.Case("resnet18", 1, "float32", device=device)
    with pytest.raises(Seen) as seen:
        contenders._onnxruntime(case, None)
    assert seen.value.args == ([(name, options)],)
