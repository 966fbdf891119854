"""Training steps of the depth experiment."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

WARM_UP_DEPTH = 110  # from this depth on the paper starts with a tenth of the learning rate,
WARM_UP_ERROR = 0.8  # until the error of a batch is below this


def paper_factor(step: int, steps: int, warming: bool) -> float:
    """The learning rate of step `step` (from 0) of `steps`, relative to its peak: 0.1 from half of
    the steps on, 0.01 from three quarters on (32k and 48k of 64k); at most 0.1 while warming.
    Source: He et al. 2015 (1512.03385), section 4.2."""
    factor = 0.01 if step >= steps * 3 // 4 else 0.1 if step >= steps // 2 else 1.0
    return min(factor, 0.1) if warming else factor


class Steps:
    """SGD with momentum, as in the paper. Learning rate: `schedule(optimizer)` if given, else the
    paper's on cifar10, else one cycle over all epochs (Smith and Topin 2017, 1708.07120)."""

    def __init__(
        self, experiment: Any, model: nn.Module, depth: int, seed: int,
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:  # fmt: skip
        c, self.data = experiment.config, experiment.data
        assert c.epochs is not None and c.batch is not None and c.lr is not None
        self.model, self.batch, self.epochs = model, c.batch, c.epochs
        self.taken = 0
        self.generator = torch.Generator().manual_seed(1000 + seed)
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=c.lr, momentum=0.9, weight_decay=1e-4
        )
        steps = len(self.data.x) // c.batch * c.epochs
        self.warming = depth >= WARM_UP_DEPTH
        self.schedule: LRScheduler
        if schedule is not None:
            self.schedule = schedule(self.optimizer)
        elif c.data == "cifar10":
            self.schedule = LambdaLR(
                self.optimizer, lambda step: paper_factor(step, steps, self.warming)
            )
        else:
            self.schedule = OneCycleLR(self.optimizer, c.lr, total_steps=steps)

    def step(self, x: Tensor, y: Tensor) -> tuple[float, int]:
        """The loss and the number of misclassified images, before the update."""
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(x)
        loss = cross_entropy(logits, y)
        self.taken += 1
        value = float(loss.detach())
        wrong = int((logits.detach().argmax(1) != y).sum())
        if not math.isfinite(value):
            return value, wrong
        loss.backward()
        self.optimizer.step()
        self.warming = self.warming and wrong >= WARM_UP_ERROR * len(y)
        self.schedule.step()
        return value, wrong

    def epoch(self) -> tuple[float, float]:
        """Mean training loss and error of an epoch; a non-finite loss ends it."""
        losses, wrong, images = [], 0, 0
        for x, y in self.data.batches(self.batch, self.generator):
            loss, missed = self.step(x, y)
            losses.append(loss)
            wrong, images = wrong + missed, images + len(y)
            if not math.isfinite(loss):
                return loss, 1.0
        return sum(losses) / len(losses), wrong / images
