"""Contenders of a training benchmark, each in its own process."""

from __future__ import annotations

import pytest

from fused_resnet.bench import harness
from fused_resnet.bench.contenders import Case, Unavailable
from fused_resnet.bench.worker import Worker
from tests.fusion.training.training_helpers import needs_native

CASE = Case("resnet18", 1, "float32", "train", "cpu")


@pytest.mark.slow
@needs_native
def test_each_contender_of_a_training_case_has_its_own_process(monkeypatch):
    started: list[Worker] = []

    class Counted(Worker):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            started.append(self)

    monkeypatch.setattr(harness, "Worker", Counted)
    monkeypatch.setattr(harness.machine, "measure_limits", lambda *_: LIMITS)
    events = harness.run(
        ["resnet18"], [1], ["float32"], modes=["train"], seconds=0, rounds=2, threads=1,
        contenders=["eager", "fused-minimal", "fused-graph"],
    )  # fmt: skip
    (case,) = harness.collect(events)["cases"]
    assert case["skipped"] == {"fused-graph": "fused-graph: CUDA graphs need a GPU"}
    eager, minimal = case["contenders"]["eager"], case["contenders"]["fused-minimal"]
    assert minimal["difference_to_eager"] < 1e-4  # the same weights and images
    assert minimal["saved_bytes"] < 0.3 * eager["saved_bytes"]
    assert minimal["activation_peak_bytes"] < eager["activation_peak_bytes"]
    assert len(minimal["times_ms"]) == 2 and min(minimal["times_ms"]) > 1
    assert len(started) == 3
    assert all(worker._process.poll() is not None for worker in started)  # all have ended


LIMITS = {"flops": {"float32": 1e11}, "copy_bytes_per_s": 1e10}


def test_errors_of_a_worker():
    worker = Worker("fused", Case("resnet18", 1, "no_such_dtype", "train", "cpu"), 1)
    try:
        with pytest.raises(RuntimeError, match="no_such_dtype"):
            worker.ask("enter")
        with pytest.raises(RuntimeError):  # the process has ended: no waiting
            worker.ask("sample")
    finally:
        worker.close()
    worker = Worker("fused-graph", CASE, 1)
    try:
        with pytest.raises(Unavailable, match="CUDA graphs need a GPU"):
            worker.ask("enter")
    finally:
        worker.close()
