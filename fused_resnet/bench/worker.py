"""A contender of a benchmark in a process of its own.

What one contender leaves in an allocator and in the heap helps or hinders the next: side by side in
one process, eager's training step on the CPU was measured a quarter faster than alone (ResNet-110,
32 x 32) and a seventh slower (ResNet-50, 224 x 224). So each has the process to itself that it has
at its user's.
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

from . import contenders as entrants
from . import memory
from .contenders import Case, Unavailable
from .entry import WARM_BELOW_S
from .entry import enter as new_entry


class Worker:
    """The parent's end: `ask` sends a line and returns what the process answers to it."""

    def __init__(self, name: str, case: Case, threads: int) -> None:
        request = json.dumps({"name": name, "case": asdict(case), "threads": threads})
        self._name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fused_resnet.bench.worker", request],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, question: str) -> Any:
        """Raises Unavailable where the contender is, RuntimeError with the last line that the
        process wrote where it failed."""
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
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer

    def answer(value: Any) -> None:
        print(json.dumps(value), file=out, flush=True)

    entry: Any = None

    def enter() -> dict[str, Any]:
        nonlocal entry
        try:
            entry = new_entry(request["name"], case, entrants.make_data(case))
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
            entry.step()  # caches, and memory that the host took back, are the others' until then
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

    questions: dict[str, Callable[[], Any]] = {"enter": enter, "sample": sample, "saved": saved}
    for line in sys.stdin:
        answer(questions[line.strip()]())


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
