"""Builds, calls and times one contender of a case."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import contenders
from .contenders import Case, Step
from .machine import synchronize

MIN_SAMPLE_S = 0.02  # shorter calls are repeated until one sample lasts this long
WARM_BELOW_S = 0.1  # for shorter calls, each sample is preceded by one untimed call


def timer(device: torch.device) -> float:
    """Seconds, after everything that was launched on the device."""
    synchronize(device)
    return time.perf_counter()


@dataclass
class Entry:
    """One contender of a case, and its seconds per call in each round."""

    name: str
    step: Step
    device: torch.device
    construct_s: float
    first_call_s: float
    call_s: float
    output: Tensor
    owned_bytes: int
    times_s: list[float] = field(default_factory=list)

    @property
    def repeats(self) -> int:
        return max(1, math.ceil(MIN_SAMPLE_S / max(self.call_s, 1e-6)))

    @property
    def sample_s(self) -> float:
        warm = self.call_s if self.call_s < WARM_BELOW_S else 0.0
        return self.call_s * self.repeats + warm

    def sample(self) -> None:
        """Time `repeats` calls."""
        if self.call_s < WARM_BELOW_S:
            self.step()
        start = timer(self.device)
        for _ in range(self.repeats):
            self.step()
        self.times_s.append((timer(self.device) - start) / self.repeats)


def enter(name: str, case: Case, data: contenders.Data) -> Entry:
    """Build a contender and call it three times: the first call, one to warm up, one to time."""
    device = torch.device(case.device)
    cuda = device.type == "cuda"
    held = torch.cuda.memory_allocated(device) if cuda else 0
    t0 = timer(device)
    step = contenders.build(name, case, data)
    t1 = timer(device)
    output = step().detach().float().cpu().clone()
    t2 = timer(device)
    step()
    t3 = timer(device)
    step()
    t4 = timer(device)
    owned = torch.cuda.memory_allocated(device) - held if cuda else 0
    return Entry(name, step, device, t1 - t0, t2 - t1, t4 - t3, output, owned)
