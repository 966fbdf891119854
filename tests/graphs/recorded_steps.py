"""Simulated CUDA graphs for the tests of `fr.training_step` without a GPU. As on a GPU, a capture
runs the step's Python code and computes nothing; a replay runs the step on the memory and with the
settings of its capture, and increments no version counter."""

from __future__ import annotations

import contextlib
import importlib

import torch

module = importlib.import_module("fused_resnet.graphs.training_step")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Stream:
    """Stands in for a CUDA stream; logs which stream waits for which."""

    def __init__(self, name="side"):
        self.name = name

    def wait_stream(self, other):
        LOG.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        LOG.append(f"{self.name} waits for the last turn")


class Event:
    def record(self, stream):
        LOG.append(f"{stream.name} ends its turn")


class Graph:
    """Stands in for a CUDA graph of the step whose `_run` was called during capture."""

    def replay(self):
        LOG.append("replay")
        step, x, target, loss, norm, groups = self.call
        optimizer = step.optimizer
        now = [dict(group) for group in optimizer.param_groups]
        versions = [(t, t._version) for t in world(step)]
        for group, then in zip(optimizer.param_groups, groups, strict=True):
            group.update(then)
        result = RUN(step, x, target)
        loss.data.copy_(result)
        if norm is not None:
            norm.data.copy_(step.gradient_norm)
        for group, then in zip(optimizer.param_groups, now, strict=True):
            group.update(then)
        for t, version in versions:
            torch._C._autograd._unsafe_set_version_counter((t,), (version,))


LOG: list[str] = []
RUN = module.TrainingStep._run


def world(step):
    """Every tensor that a step may modify."""
    states = [t for s in step.optimizer.state.values() for t in s.values()]
    scaler = [] if step.scaler is None else [step.scaler._scale, step.scaler._growth_tracker]
    return [*step.model.parameters(), *step.model.buffers(), *states, *scaler]


def play(monkeypatch):
    """Simulates graphs on the CPU; returns the list of the inputs' shapes of all captures."""
    made, recording = [], []
    record = module.TrainingStep._record

    def noted(step, memory, x, target):
        made.append(tuple(x.shape))
        return record(step, memory, x, target)

    monkeypatch.setattr(module.TrainingStep, "_record", noted)
    if DEVICE == "cuda":
        return made
    LOG.clear()
    current = [Stream("main")]

    @contextlib.contextmanager
    def stream(on):
        current.append(on)
        yield
        current.pop()

    @contextlib.contextmanager
    def graph(made, *, pool, stream, capture_error_mode):
        LOG.append(f"record on {stream.name}")
        recording.append(made)
        yield
        recording.pop()
        LOG.append("recorded")

    def run(step, x, target):
        LOG.append(f"step on {current[-1].name}")
        if not recording:
            return RUN(step, x, target)
        assert all(p.grad is None for p in step.model.parameters())
        before = [(t, t.detach().clone()) for t in world(step)]
        groups = [{k: v for k, v in g.items() if k != "params"}
                  for g in step.optimizer.param_groups]  # fmt: skip
        loss = RUN(step, x, target)
        for t, content in before:
            t.data.copy_(content)
        loss.data.fill_(float("nan"))
        recording[-1].call = (step, x, target, loss, step.gradient_norm, groups)
        return loss

    monkeypatch.setattr(module.TrainingStep, "_run", run)
    monkeypatch.setattr(module, "_on_gpu", lambda device: True)
    for name, fake in {
        "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": graph, "stream": stream,
        "current_stream": lambda: current[-1], "graph_pool_handle": object,
        "device": lambda device: contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    return made


@contextlib.contextmanager
def switched(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def called(function, argument, otherwise, **options):
    function(argument, **options)
    try:
        yield
    finally:
        function(otherwise)


_MATMUL, _CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
# PyTorch's settings that change what a forward computes, as context managers.
SETTINGS = {
    "allow_tf32": lambda: switched(_CUDNN, "allow_tf32", True),
    "matmul.allow_tf32": lambda: switched(_MATMUL, "allow_tf32", True),
    "conv.fp32_precision": lambda: switched(_CUDNN.conv, "fp32_precision", "tf32"),
    "matmul.fp32_precision": lambda: switched(_MATMUL, "fp32_precision", "tf32"),
    "float32_matmul": lambda: called(torch.set_float32_matmul_precision, "high", "highest"),
    "float16 sums": lambda: switched(_MATMUL, "allow_fp16_accumulation", True),
    "cudnn.deterministic": lambda: switched(_CUDNN, "deterministic", True),
    "cudnn.benchmark": lambda: switched(_CUDNN, "benchmark", True),
    "deterministic": lambda: called(
        torch.use_deterministic_algorithms, True, False, warn_only=True
    ),
    "default dtype": lambda: called(torch.set_default_dtype, torch.float64, torch.float32),
}
