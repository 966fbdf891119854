"""Contenders of a training benchmark, each in a process of its own."""

from __future__ import annotations

import pytest

from fused_resnet.bench import harness as bench
from fused_resnet.bench.contenders import Case, Unavailable
from fused_resnet.bench.worker import Worker
from tests.fusion.training.training_helpers import needs_native

CASE = Case("resnet18", 1, "float32", "train", "cpu")


@needs_native
def test_a_training_case_is_measured_in_processes_of_their_own(monkeypatch):
    started: list[Worker] = []

    class Counted(Worker):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            started.append(self)

    monkeypatch.setattr(bench, "Worker", Counted)
    monkeypatch.setattr(bench.machine, "measure_limits", lambda *_: LIMITS)
    events = bench.run(
        ["resnet18"], [1], ["float32"], modes=["train"], seconds=0, rounds=2, threads=1,
        contenders=["eager", "fused-minimal", "fused-graph"],
    )  # fmt: skip
    (case,) = bench.collect(events)["cases"]
    assert case["skipped"] == {"fused-graph": "fused-graph: CUDA graphs need a GPU"}
    eager, minimal = case["contenders"]["eager"], case["contenders"]["fused-minimal"]
    assert minimal["difference_to_eager"] < 1e-4  # the same weights and images
    assert minimal["saved_bytes"] < 0.3 * eager["saved_bytes"]
    assert minimal["activation_peak_bytes"] < eager["activation_peak_bytes"]
    assert len(minimal["times_ms"]) == 2 and min(minimal["times_ms"]) > 1
    assert len(started) == 3
    assert all(worker._process.poll() is not None for worker in started)  # nobody is left behind


LIMITS = {"flops": {"float32": 1e11}, "copy_bytes_per_s": 1e10}


def test_what_went_wrong_is_told():
    worker = Worker("fused", Case("resnet18", 1, "no_such_dtype", "train", "cpu"), 1)
    try:
        with pytest.raises(RuntimeError, match="no_such_dtype"):
            worker.ask("enter")
        with pytest.raises(RuntimeError):  # instead of waiting for one that is gone
            worker.ask("sample")
    finally:
        worker.close()
    worker = Worker("fused-graph", CASE, 1)
    try:
        with pytest.raises(Unavailable, match="CUDA graphs need a GPU"):
            worker.ask("enter")
    finally:
        worker.close()
