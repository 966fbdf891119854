"""A run from its first step to its last, and its files: what `fused-resnet train` does."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import machine
from ..checkpoint import CheckpointError, load_into
from . import checkpointing, data, distributed
from .checkpointing import Metrics, read_metrics, write_whole
from .config import Config, option, require_libraries
from .diagnose import NonFinite
from .distributed import Place
from .plot import plot_metrics
from .trainer import OutOfMemory, Test, Trainer

__all__ = ["Config", "OutOfMemory", "Result", "Trainer", "run"]

PLOT_EVERY_S = 60.0


@dataclasses.dataclass(frozen=True)
class Result:
    """test_accuracy: share of the test images told right at the end, by the averaged weights where
    there are some; test_loss: their mean cross-entropy; steps: taken in all, those of earlier
    processes included; folder: where the run's files are."""

    test_accuracy: float
    test_loss: float
    steps: int
    folder: Path


def _silent(*_: object) -> None:
    return


def run(
    config: Config,
    say: Callable[[str], None] = _silent,
    *,
    resume: bool = False,
    warn: Callable[[str], None] | None = None,
    progress: Callable[[int, int, float], None] = _silent,
) -> Result:
    """Trains and tests, and writes in `config.folder`:

        metrics.jsonl       a line per step {step, epoch, loss, lr, gradient_norm}, and per epoch
                            {step, epoch, test_accuracy, test_loss, images_per_s}
        metrics.png         a plot of them
        config.json         every setting, and the machine
        checkpoint-STEP.pt  the last `config.keep`, each whole at any moment

    resume: goes on from the newest whole checkpoint there, with the losses that the run would have
    had without stopping; from the start where there is none yet.
    say: takes lines for people; warn: lines about what is wrong but does not stop the run, default
    `say`; progress: (step, steps in all, loss), after every step. Under torchrun every process
    calls this, and the first one alone writes and speaks.
    Raises ValueError that names the option, ImportError that names the extra, CheckpointError,
    NonFinite (then the checkpoint is of the step before) and OutOfMemory.
    """
    require_libraries(config.data)
    with _switches(config), distributed.processes(config) as place:
        return _Run(config, place, say, warn or say, progress).go(resume)


@contextlib.contextmanager
def _switches(config: Config) -> Iterator[None]:
    """Threads and determinism, as they were afterwards."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what PyTorch asks for
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


class _Run:
    def __init__(
        self,
        config: Config,
        place: Place,
        say: Callable[[str], None],
        warn: Callable[[str], None],
        progress: Callable[[int, int, float], None],
    ) -> None:
        self.config, self.place, self.folder = config, place, config.folder
        self.say = say if place.first else _silent
        self.warn = warn  # every process: each reads files of its own
        self.progress = progress if place.first else _silent
        self.data = data.load(config.data, config.root, config.size)
        self.classes = len(self.data.classes)
        count = len(self.data.train.items)
        self.per_epoch = count // config.batch
        if self.per_epoch < 1:
            raise ValueError(
                f"--batch must be at most the {count} training images, got {config.batch}"
            )
        self.trainer = Trainer(config, self.classes, self.per_epoch, place)
        self.test = Test(float("nan"), float("nan"))
        self.metrics: Metrics | None = None
        self.named: set[str] = set()
        self.plotted = time.monotonic()

    def go(self, resume: bool) -> Result:
        trainer = self.trainer
        state = self._find(resume)
        if state is not None:
            self._restore(state)
        self._open(0 if state is None else state["metrics_bytes"])
        try:
            if trainer.taken == trainer.steps:
                self.say(f"finished before: all {trainer.steps} steps are taken")
            while trainer.taken < trainer.steps:
                self._epoch(trainer.taken // self.per_epoch)
            self._plot()
        finally:
            if self.metrics is not None:
                self.metrics.close()
        return Result(self.test.accuracy, self.test.loss, trainer.taken, self.folder)

    # --- files ------------------------------------------------------------------------------------

    def _find(self, resume: bool) -> dict[str, Any] | None:
        """The state to go on from; the first process decides, and all fail where it does."""
        answer: tuple[str | None, str | None] = (None, None)
        if self.place.first:
            try:
                answer = (self._choose(resume), None)
            except ValueError as error:
                answer = (None, str(error))
        chosen, problem = distributed.tell(answer, self.place)
        if problem is not None:
            raise CheckpointError(problem)
        return None if chosen is None else checkpointing.read(self.folder / chosen)

    def _choose(self, resume: bool) -> str | None:
        if not checkpointing.files(self.folder):
            if resume:
                self.say(f"nothing to resume in {self.folder}: starting")
            return None
        found = checkpointing.newest(self.folder, self.warn)
        assert found is not None
        path, state = found
        other = _difference(state["config"], self.config.fixed())
        if other is not None:
            raise ValueError(
                f"--out {self.folder} holds a run of another configuration ({path.name}: {other}); "
                f"choose another --out"
            )
        if not resume:
            raise ValueError(
                f"--out {self.folder} holds this run, after step {state['step']} of "
                f"{self.trainer.steps}: --resume goes on with it, another --out starts anew"
            )
        self.say(f"resuming from {path.name}, after step {state['step']} of {self.trainer.steps}")
        return path.name

    def _restore(self, state: dict[str, Any]) -> None:
        if self.config.parallel == "ddp":
            path = self.folder / f"checkpoint-{state['step']:08d}.pt"
            load_into(self.trainer.model, state["model"], self.config.model, path)
        self.trainer.load(state)
        self.test = Test(*state["test"])

    def _open(self, metrics_bytes: int) -> None:
        if not self.place.first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {**dataclasses.asdict(self.config), **self.config.fixed()}
        where = machine.provenance("training", self.place.device.type)
        content = {**settings, "processes": self.place.processes, "machine": where}
        text = json.dumps(content, indent=1).encode() + b"\n"
        write_whole(self.folder / checkpointing.SETTINGS, lambda file: file.write(text))
        self.metrics = Metrics(self.folder / checkpointing.METRICS, metrics_bytes)
        if self.metrics.missing:
            self.warn(f"{self.folder / checkpointing.METRICS}: rows of earlier steps are missing")

    def _save(self) -> str:
        """Writes a checkpoint; its name. Every process calls this."""
        state = self.trainer.state()
        if self.metrics is not None:
            state |= {"metrics_bytes": self.metrics.sync(), "test": tuple(self.test)}
            checkpointing.save(self.folder, state, self.config.keep)
        return f"checkpoint-{self.trainer.taken:08d}.pt"

    def _add(self, row: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.add(row)

    def _plot(self) -> None:
        if self.metrics is None:
            return
        rows = read_metrics(self.folder / checkpointing.METRICS)
        title = f"{self.config.model}, {self.config.data}"
        plot_metrics(rows, self.folder / checkpointing.PLOT, title)
        self.plotted = time.monotonic()

    # --- the loop ---------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> None:
        c, trainer = self.config, self.trainer
        batches = data.Batches(
            len(self.data.train.items), c.batch, seed=c.seed, epoch=epoch,
            first=trainer.taken - epoch * self.per_epoch,
            rank=self.place.rank, processes=self.place.processes,
        )  # fmt: skip
        began, images = time.perf_counter(), 0
        for x, y, problems in data.loader(self.data.train, batches, c.seed, c.workers):
            self._report(problems)
            try:
                step = trainer.step(x, y)
            except NonFinite as error:
                name = self._save()
                raise NonFinite(f"{error}; {self.folder / name} is of the step before") from None
            images += c.batch
            self._add({"step": trainer.taken, "epoch": epoch, **step._asdict()})
            self.progress(trainer.taken, trainer.steps, step.loss)
            if trainer.taken % c.checkpoint_every == 0 and trainer.taken % self.per_epoch:
                self._save()
        rate = images / (time.perf_counter() - began)
        self.test = trainer.test(self.data.test, self.classes, self._report)
        self._add({
            "step": trainer.taken, "epoch": epoch, "test_accuracy": self.test.accuracy,
            "test_loss": self.test.loss, "images_per_s": round(rate, 1),
        })  # fmt: skip
        self._save()
        self.say(
            f"epoch {epoch + 1} of {c.passes}: loss {step.loss:.4f}, test accuracy "
            f"{self.test.accuracy:.2%}, {rate:.0f} images/s"
        )
        if time.monotonic() - self.plotted > PLOT_EVERY_S:
            self._plot()

    def _report(self, problems: list[str]) -> None:
        for problem in problems:
            if problem and problem not in self.named:
                self.named.add(problem)
                self.warn(f"left out: {problem}")


def _difference(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first option that differs: "--lr 0.1, not 0.2"."""
    for name, value in now.items():
        if name in then and then[name] != value:
            return f"{option(name)} {then[name]}, not {value}"
    return None
