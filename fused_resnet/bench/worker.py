"""Runs a benchmark contender in its own process.

The state in which one contender leaves the allocator and the heap changes the speed of the next: in
a shared process, eager's training step on the CPU was measured a quarter faster than in its own
(ResNet-110, 32 x 32) and a seventh slower (ResNet-50, 224 x 224). A separate process per contender
is what its users have.
"""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from . import memory
from .contenders import Case, Unavailable, make_data
from .entry import WARM_BELOW_S, enter


class Worker:
    """The parent's side: `ask` sends one line and returns the process's answer."""

    def __init__(self, name: str, case: Case, threads: int) -> None:
        request = json.dumps({"name": name, "case": asdict(case), "threads": threads})
        self._name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fused_resnet.bench.worker", request],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, question: str) -> Any:
        """Raises Unavailable if the contender is, and RuntimeError with the last line of stderr if
        the process failed."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(question, file=stdin, flush=True)
        line = stdout.readline()
        if not line:
            assert self._process.stderr is not None
            lines = self._process.stderr.read().strip().splitlines() or ["no message"]
            raise RuntimeError(lines[-1])
        answer = json.loads(line)
        if isinstance(answer, dict) and "unavailable" in answer:
            raise Unavailable(answer["unavailable"])
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def _serve(request: dict[str, Any]) -> None:
    torch.set_num_threads(request["threads"])
    case = Case(**request["case"])
    out, sys.stdout = sys.stdout, sys.stderr  # keeps libraries' output out of the answers

    def answer(value: Any) -> None:
        print(json.dumps(value), file=out, flush=True)

    entry: Any = None

    def enter_case() -> dict[str, Any]:
        nonlocal entry
        try:
            entry = enter(request["name"], case, make_data(case))
        except Unavailable as error:
            return {"unavailable": str(error)}
        return {
            "construct_s": entry.construct_s, "first_call_s": entry.first_call_s,
            "call_s": entry.call_s, "output": entry.output.tolist(),
        }  # fmt: skip

    def sample() -> float:
        gc.collect()
        gc.disable()
        if entry.call_s >= WARM_BELOW_S:
            entry.step()  # refills caches and memory that the other processes displaced
        entry.sample()
        gc.enable()
        return entry.times_s[-1]

    def saved() -> dict[str, int]:
        if entry.step.model is None:
            return {}
        return {
            "saved_bytes": memory.saved_bytes(entry.step),
            "activation_peak_bytes": memory.activation_peak_bytes(entry.step),
        }

    questions: dict[str, Callable[[], Any]] = {
        "enter": enter_case,
        "sample": sample,
        "saved": saved,
        "peak": lambda: memory.process_peak_bytes(request["name"], case),
    }
    for line in sys.stdin:
        answer(questions[line.strip()]())


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
