"""One process's model, optimizer and schedule, and what a step does with them."""

from __future__ import annotations

import contextlib
import random
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..activation_memory import LEVELS, set_activation_memory
from . import distributed, optim
from .config import Config, make_model
from .data import Batches, Part, loader
from .diagnose import NonFinite, first_gradient, locate
from .distributed import Place

LEAST_SCALE = 1.0  # a float16 gradient that overflows even unscaled is no matter of the scale


class OutOfMemory(RuntimeError):
    """A step did not fit in memory; the message says what needs less. The trainer goes on."""


class Step(NamedTuple):
    """Of one optimizer step: the mean loss over all images, the learning rate it was taken with,
    the gradient's norm before clipping (infinite where a GradScaler left the step out)."""

    loss: float
    lr: float
    gradient_norm: float


class Test(NamedTuple):
    """Over all test images of all processes: the share told right, and the mean cross-entropy."""

    accuracy: float
    loss: float


class Trainer:
    """A model in training, `steps` optimizer steps in all, `per_epoch` in an epoch.

    trainer.step(x, y): x (n, 3, H, W) float32, y (n,) int64: this process's images of one batch.
    """

    def __init__(
        self,
        config: Config,
        classes: int,
        per_epoch: int,
        place: Place,
        model: nn.Module | None = None,
    ) -> None:
        """model: in place of the one that `config` names."""
        if config.batch % (place.processes * config.accumulate):
            raise ValueError(
                f"--batch must be a multiple of processes x --accumulate, {place.processes} x "
                f"{config.accumulate}, got {config.batch}"
            )
        if config.amp == "float16" and config.parallel == "fsdp":
            raise ValueError("--amp must be no or bfloat16 with --parallel fsdp, got float16")
        self.config, self.place = config, place
        self.steps = per_epoch * config.passes
        self.taken = 0  # steps so far
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model = make_model(config, classes) if model is None else model
        model = model.to(place.device).to(memory_format=self.layout).train()
        if config.activation_memory != "full":
            set_activation_memory(model, config.activation_memory)
        self.average: Any = None
        if config.ema is not None:
            self.average = _averaged(model, config.ema)
            if config.parallel == "fsdp":
                distributed.shard(self.average.module, place)
        self.parallel = distributed.prepare_distributed(model, config, place)
        wrapped = isinstance(self.parallel, nn.parallel.DistributedDataParallel)
        inner: Any = self.parallel.module if wrapped else self.parallel
        self.model: nn.Module = inner
        self.optimizer = optim.make_optimizer(
            config.optimizer, self.model, config.peak_lr, config.momentum, config.decay
        )
        warmup = round(config.warmup * per_epoch)
        self.schedule = optim.make_schedule(self.optimizer, self.steps, warmup)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=config.amp == "float16")

    # --- a step -----------------------------------------------------------------------------------

    def step(self, x: Tensor, y: Tensor) -> Step:
        """Forward, backward, update. Where it raises NonFinite or OutOfMemory, everything is as it
        was before."""
        lr = self.optimizer.param_groups[0]["lr"]
        before = [b.clone() for b in self.model.buffers()]
        try:
            total = self._passes(x, y)
        except (RuntimeError, MemoryError) as error:
            self._undo(before)
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the step's activations
            self._give_back()
            raise OutOfMemory(self._advice(error)) from None
        loss = float(distributed.mean(total, self.place))
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        self._check_finite(loss, norm, x, before)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        with warnings.catch_warnings():
            if self.scaler.is_enabled():  # which may have left out the very first step
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.schedule.step()
        self.taken += 1
        return Step(loss, lr, norm)

    def _passes(self, x: Tensor, y: Tensor) -> Tensor:
        """Backward passes over equal parts of x; the mean loss of this process's images."""
        parts = list(zip(*(t.chunk(self.config.accumulate) for t in (x, y)), strict=True))
        total = torch.zeros((), device=self.place.device)
        for i, (images, labels) in enumerate(parts):
            last = i + 1 == len(parts)
            alone = distributed.without_reduction(self.parallel)
            with contextlib.nullcontext() if last else alone:
                logits = self.forward(self.parallel, images)
                labels = labels.to(self.place.device, non_blocking=True)
                smoothing = self.config.label_smoothing
                loss = cross_entropy(logits, labels, label_smoothing=smoothing) / len(parts)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits (n, classes) float32 of x (n, 3, H, W)."""
        x = x.to(self.place.device, non_blocking=True).contiguous(memory_format=self.layout)
        amp = self.config.amp
        dtype = torch.float16 if amp == "float16" else torch.bfloat16
        with torch.autocast(self.place.device.type, dtype, enabled=amp != "no"):
            return model(x).float()

    def _clip(self) -> float:
        """The norm of the whole gradient, which is then no longer than --clip."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm: Any = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        # Scaling by a norm that is not finite would hide which gradient was not.
        if self.config.clip is not None and value < float("inf"):
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip, norm)
        return value

    def _check_finite(self, loss: float, norm: float, x: Tensor, before: list[Tensor]) -> None:
        finite = abs(loss) < float("inf") and abs(norm) < float("inf")  # False for NaN
        if finite:
            return
        skips = self.scaler.is_enabled() and self.scaler.get_scale() > LEAST_SCALE
        if skips and abs(loss) < float("inf"):
            return  # the scaler leaves this step out and tries a smaller scale
        gradient = first_gradient(self.model)
        self._undo(before)
        where = self._where(x)
        if where is None:
            where = "the loss" if gradient is None else f"the gradient of {gradient}"
        raise NonFinite(
            f"step {self.taken + 1}: the loss is {loss:g}, the norm of the gradient {norm:g}; "
            f"{where} is the first that is not finite"
        )

    def _where(self, x: Tensor) -> str | None:
        """The first thing in a forward of x that is not finite, in any process."""
        # One layer by itself cannot be run everywhere: a norm over all processes is part of its
        # block, and a sharded block's parameters are there only while the block runs.
        inside = not self.config.sync_bn and self.config.parallel == "ddp"
        model = self.parallel if self.config.parallel == "fsdp" else self.model

        def run(part: Tensor) -> Tensor:
            return self.forward(model, part)

        parts = x.to(self.place.device).chunk(self.config.accumulate)
        found = [locate(self.model, part, run, inside=inside) for part in parts]
        own = next((where for where in found if where is not None), None)
        everywhere = distributed.gather(own, self.place)
        for rank, where in enumerate(everywhere):
            if where is not None:
                return where if self.place.processes == 1 else f"{where} (process {rank})"
        return None

    def _undo(self, buffers: list[Tensor]) -> None:
        """Before the step: no gradients, and running statistics as they were."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for b, value in zip(self.model.buffers(), buffers, strict=True):
                b.copy_(value)

    def _give_back(self) -> None:
        from .. import release_memory

        release_memory()
        if self.place.device.type == "cuda":
            torch.cuda.empty_cache()

    def _advice(self, error: BaseException) -> str:
        c = self.config
        levels = " or ".join(LEVELS[LEVELS.index(c.activation_memory) + 1 :])
        less = [f"--activation-memory {levels}"] if levels else []
        less += [f"--accumulate {2 * c.accumulate}", f"a --batch below {c.batch}"]
        message = (str(error).splitlines() or ["no message"])[0]
        return f"step {self.taken + 1} did not fit in memory ({message}); try {', '.join(less)}"

    # --- a test -----------------------------------------------------------------------------------

    @torch.no_grad()
    def test(self, part: Part, classes: int, report: Callable[[list[str]], None]) -> Test:
        """Accuracy and loss on `part`, of the averaged weights where there are some; `report` takes
        what the loader says about files."""
        from torchmetrics import MeanMetric
        from torchmetrics.classification import MulticlassAccuracy

        c, place = self.config, self.place
        model: nn.Module = self.model if self.average is None else self.average.module
        distributed.share_buffers(model, place)
        together: Any = {"sync_on_compute": place.processes > 1}
        accuracy = MulticlassAccuracy(classes, average="micro", validate_args=False, **together)
        mean = MeanMetric(**together)
        accuracy, mean = accuracy.to(place.device), mean.to(place.device)
        batches = Batches(
            len(part.items), c.batch, rank=place.rank, processes=place.processes, training=False
        )
        model.eval()
        for i, (x, y, problems) in enumerate(loader(part, batches, c.seed, c.workers)):
            report(problems)
            logits = self.forward(model, x)
            readable = y >= 0
            if batches.counted(i) and bool(readable.any()):
                logits = logits[readable.to(place.device)]
                y = y[readable].to(place.device)
                accuracy.update(logits, y)
                mean.update(cross_entropy(logits, y, reduction="none"))
        model.train()
        return Test(float(accuracy.compute()), float(mean.compute()))

    # --- state ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that later steps depend on, whole; every process calls this."""
        numbers: dict[str, Any] = {
            "python": random.getstate(), "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if self.place.device.type == "cuda" else None,
        }  # fmt: skip
        average: dict[str, Any] | None = None
        if self.average is not None:
            model = distributed.model_state(self.average.module)
            average = {"count": int(self.average.n_averaged), "model": model}
        return {
            "config": self.config.fixed(), "step": self.taken, "average": average,
            "model": distributed.model_state(self.model),
            "optimizer": distributed.optimizer_state(self.model, self.optimizer),
            "schedule": self.schedule.state_dict(), "scaler": self.scaler.state_dict(),
            "random": distributed.gather(numbers, self.place),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Back to where `state` was taken; every process calls this."""
        distributed.load_model_state(self.model, state["model"])
        distributed.load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            distributed.load_model_state(self.average.module, state["average"]["model"])
            self.average.n_averaged.fill_(state["average"]["count"])
        self.taken = int(state["step"])
        if self.place.rank < len(state["random"]):
            numbers = state["random"][self.place.rank]
            random.setstate(numbers["python"])
            torch.set_rng_state(numbers["torch"])
            if self.place.device.type == "cuda" and numbers["cuda"] is not None:
                torch.cuda.set_rng_state(numbers["cuda"])


def _averaged(model: nn.Module, decay: float) -> Any:
    """The exponential average of weights and running statistics, which starts at the first step's
    (Polyak and Juditsky 1992; PyTorch's swa_utils)."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    ema = get_ema_multi_avg_fn(decay)

    def apart(averaged: Any, current: Any, count: Any) -> None:
        # PyTorch's function takes no list in which sharded weights and plain buffers are mixed.
        for sharded in (True, False):
            pairs = [
                pair
                for pair in zip(averaged, current, strict=True)
                if hasattr(pair[0], "full_tensor") == sharded
            ]
            if pairs:
                ema([a for a, _ in pairs], [c for _, c in pairs], count)

    average = AveragedModel(model, multi_avg_fn=apart, use_buffers=True)
    return average.requires_grad_(False)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what was missing: a GPU's, the CPU allocator's, or our pool's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return any(w in str(error) for w in words)
