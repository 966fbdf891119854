"""The training loop of `fused-resnet train`, on one process or under torchrun."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fused_resnet.checks import at_least, one_of
from fused_resnet.fusion.training.activation_memory import CHOICES, set_activation_memory
from fused_resnet.graphs.training_step import training_step
from fused_resnet.layers.sync_batch_norm import convert_sync_batchnorm
from fused_resnet.models import cifar
from fused_resnet.models.resnet import get_model, list_models
from fused_resnet.parity.checkpoint import CheckpointError

from . import data as datasets
from . import distributed, optim, state
from .diagnose import first_non_finite, first_of

NEEDED = ("torchvision", "torchmetrics")
AMP = ("no", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a training run. Each field is an option of `fused-resnet train`."""

    model: str = "resnet18"  # a ResNet of this package, or e.g. cifar_resnet20
    data: str = "digits"  # "digits", "cifar10" or "folder"
    root: str | None = None  # folder of cifar10 or of the images
    image_size: int | None = None  # pixels; None: 32; folder: 224
    epochs: int = 10
    batch: int = 64  # images per optimizer step, over all processes
    accumulate: int = 1  # backward passes per optimizer step
    optimizer: str = "sgd"  # "sgd" (Nesterov momentum), "adamw" or "lamb"
    lr: float | None = None  # peak; None: sgd 0.1 * batch / 256, else 1e-3
    momentum: float = 0.9  # sgd only
    weight_decay: float = 1e-4  # not applied to biases and norms
    warmup: float = 1.0  # epochs
    label_smoothing: float = 0.0
    amp: str = "no"  # "no", "bfloat16" or "float16" (with a GradScaler)
    ema: float | None = None  # decay per step of the moving average of the weights; tested instead
    clip: float | None = None  # maximum gradient norm
    channels_last: bool = True
    activation_memory: str = "auto"  # set_activation_memory's level
    cuda_graph: bool = False  # capture and replay the step (training_step)
    sync_bn: bool = False  # batch norm over all processes
    sharding: str = "none"  # "none", or "fsdp": parameters sharded over all processes
    seed: int = 0
    workers: int = 0  # data loading processes
    checkpoint_every: int = 100  # steps; also after every epoch
    device: str = "cpu"
    out: str | None = None  # folder; None: runs/MODEL-DATA


@dataclasses.dataclass
class Result:
    """test_accuracy: a fraction, of the averaged weights if ema is set; steps: their total number;
    folder: contains metrics.jsonl, config.json and the checkpoints."""

    test_accuracy: float
    steps: int
    folder: Path


class NonFinite(RuntimeError):
    """The loss or a gradient is non-finite; the message names the step and the layer."""


class OutOfMemory(RuntimeError):
    """A step ran out of memory; the message names options that need less."""


def run(
    config: Config,
    say: Callable[[str], None] = lambda line: None,
    *,
    resume: bool = False,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> Result:
    """Train and test; write OUT/metrics.jsonl, config.json, checkpoint.pt.

    say: called with lines of text; progress: called with step, total steps, loss. resume: continue
    from the newest complete checkpoint in OUT; the losses equal those of an uninterrupted run.
    Under torchrun every process calls this; only rank 0 writes.
    Raises ValueError naming the option if it is invalid or OUT contains a different run;
    CheckpointError; NonFinite; OutOfMemory.
    """
    _check(config)
    with distributed.processes(torch.device(config.device)) as (rank, processes, device):
        return _Run(config, say, progress, rank, processes, device).go(resume)


def need(what: str, *packages: str) -> None:
    """Raise ValueError with the pip command if one of `packages` is not installed."""
    missing = [n for n in packages if importlib.util.find_spec(n) is None]
    if missing:
        raise ValueError(f"{what} needs {' and '.join(missing)}: pip install fused-resnet[train]")


def _check(c: Config) -> None:
    need("training", *NEEDED)
    if cifar.named(c.model) is None:
        one_of("--model", c.model, [*list_models(), "cifar_resnet20 (any depth 6n + 2)"])
    one_of("--data", c.data, datasets.NAMES)
    one_of("--optimizer", c.optimizer, optim.NAMES)
    one_of("--amp", c.amp, AMP)
    one_of("--activation-memory", c.activation_memory, CHOICES)
    one_of("--sharding", c.sharding, distributed.SHARDINGS)
    for option, value, least in (
        ("--epochs", c.epochs, 1), ("--batch", c.batch, 2), ("--accumulate", c.accumulate, 1),
        ("--checkpoint-every", c.checkpoint_every, 1), ("--workers", c.workers, 0),
    ):  # fmt: skip
        at_least(option, value, least)
    if c.ema is not None and not 0 < c.ema < 1:
        raise ValueError(f"--ema must be between 0 and 1, got {c.ema}")
    if c.cuda_graph and (c.optimizer == "lamb" or c.accumulate > 1):
        raise ValueError(
            "--cuda-graph is for --optimizer sgd or adamw and --accumulate 1, got "
            f"{c.optimizer} and {c.accumulate}"
        )
    if c.amp == "float16" and torch.device(c.device).type == "cpu":
        raise ValueError("--amp float16 needs a GPU; on the CPU use bfloat16")


class _Run:
    def __init__(
        self, c: Config, say: Callable[[str], None], progress: Any, rank: int, processes: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        if c.batch % (processes * c.accumulate):
            raise ValueError(
                f"--batch must be a multiple of processes x --accumulate, {processes} x "
                f"{c.accumulate}, got {c.batch}"
            )
        if c.sharding != "none" and processes == 1:
            raise ValueError(
                f"--sharding {c.sharding} needs more than one process (torchrun), got one"
            )
        self.c, self.rank, self.processes, self.device = c, rank, processes, device
        self.say = say if rank == 0 else (lambda line: None)
        self.progress = progress if rank == 0 else (lambda step, steps, loss: None)
        self.folder = Path(c.out or f"runs/{c.model}-{c.data}")
        self.data = datasets.load(c.data, c.root, c.image_size)
        self.per_epoch = len(self.data.train[0]) // c.batch
        if self.per_epoch < 1:
            raise ValueError(
                f"--batch must be at most the {len(self.data.train[0])} images, got {c.batch}"
            )
        self.steps = self.per_epoch * c.epochs
        torch.manual_seed(c.seed)
        depth, classes = cifar.named(c.model), len(self.data.classes)
        model: nn.Module = (
            get_model(c.model, num_classes=classes)
            if depth is None
            else cifar.cifar_resnet(depth, classes)
        )
        layout = torch.channels_last if c.channels_last else torch.contiguous_format
        self.layout = layout
        self.model = model.to(device).to(memory_format=layout).train()
        set_activation_memory(self.model, c.activation_memory)
        if c.sync_bn:
            self.model = convert_sync_batchnorm(self.model)
        self.average: Any = None if c.ema is None else distributed.averaged(self.model, c.ema)
        if c.sharding == "fsdp":
            for m in (self.model, None if self.average is None else self.average.module):
                if m is not None:
                    distributed.shard(m, device)
        lr = c.lr
        if lr is None:
            lr = 0.1 * c.batch / 256 if c.optimizer == "sgd" else 1e-3
        self.optimizer = optim.make_optimizer(
            c.optimizer, self.model, lr, c.momentum, c.weight_decay, c.cuda_graph
        )
        self.schedule = optim.make_schedule(
            self.optimizer, self.steps, round(c.warmup * self.per_epoch)
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=c.amp == "float16")
        self.parallel: nn.Module = self.model
        if processes > 1:
            self.parallel = distributed.parallel(self.model, device, c.accumulate)
        # It skips the update if the result is non-finite: stop_at saves the state before the step.
        self.recorded = training_step(
            self.model, lambda y, labels: self.loss(y.float(), labels), self.optimizer,
            dtype=None if c.amp == "no" else getattr(torch, c.amp), scaler=self.scaler,
            max_norm=c.clip, skip_nonfinite=True,
        ) if c.cuda_graph else None  # fmt: skip
        if self.recorded is not None and self.recorded.reason is not None:
            raise ValueError(f"--cuda-graph {self.recorded.reason}")
        self.step = 0
        self.accuracy = 0.0
        self.metrics: state.Metrics | None = None

    # --- files ------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The settings that must be unchanged to resume a run."""
        free = {"out", "device", "workers", "checkpoint_every", "activation_memory", "sharding"}
        return {k: v for k, v in dataclasses.asdict(self.c).items() if k not in free}

    def start(self, resume: bool) -> None:
        checkpoint = state.newest(self.folder) if self.folder.is_dir() else None
        if self.processes > 1:
            steps = distributed.gather(None if checkpoint is None else int(checkpoint["step"]))
            if len(set(steps)) > 1:  # they would wait for each other at different steps
                raise CheckpointError(
                    f"checkpoint: --out {self.folder} contains step {steps[0]} on rank 0, but the "
                    f"ranks read steps {steps}; it must be a folder shared by all processes"
                )
        if checkpoint is not None and not resume:
            raise ValueError(
                f"--out {self.folder} contains a run of {checkpoint['step']} steps; continue it "
                f"with --resume or choose another --out"
            )
        if checkpoint is None and resume:
            raise ValueError(f"--resume: --out {self.folder} contains no checkpoint")
        if checkpoint is not None:
            self.restore(checkpoint)
            self.say(f"resuming after step {self.step} of {self.steps}")
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(dataclasses.asdict(self.c), indent=1) + "\n"
            state.write_whole(self.folder / "config.json", text)
            self.metrics = state.Metrics(self.folder, self.step)

    def save(self) -> None:
        """Gather the full state from all processes and write it on rank 0."""
        content = {
            "config": self.settings(), "step": self.step, "accuracy": self.accuracy,
            "model": distributed.model_state(self.model),
            "optimizer": distributed.optimizer_state(self.optimizer, self.rank == 0),
            "schedule": self.schedule.state_dict(), "scaler": self.scaler.state_dict(),
        }  # fmt: skip
        if self.average is not None:
            content["average"] = distributed.model_state(self.average)
        if self.rank == 0:
            state.save(self.folder, content)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        settings = self.settings()
        changed = {k: v for k, v in checkpoint["config"].items() if settings.get(k) != v}
        if changed:
            name, value = next(iter(changed.items()))
            raise CheckpointError(
                f"checkpoint: --out {self.folder} contains a run with --{name.replace('_', '-')} "
                f"{value}, not {settings.get(name)}"
            )
        distributed.load_model_state(self.model, checkpoint["model"])
        distributed.load_optimizer_state(self.optimizer, checkpoint["optimizer"])
        self.schedule.load_state_dict(checkpoint["schedule"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        if self.average is not None:
            distributed.load_model_state(self.average, checkpoint["average"])
        self.step, self.accuracy = int(checkpoint["step"]), float(checkpoint["accuracy"])

    # --- the loop ---------------------------------------------------------------------------------

    def go(self, resume: bool) -> Result:
        self.start(resume)
        try:
            if self.step == self.steps:
                self.say(f"already finished after {self.steps} steps")
            while self.step < self.steps:
                self.epoch(self.step // self.per_epoch)
        finally:
            if self.metrics is not None:
                self.metrics.close()
        return Result(self.accuracy, self.step, self.folder)

    def epoch(self, epoch: int) -> None:
        c = self.c
        first = self.step - epoch * self.per_epoch
        batches = datasets.Batches(
            len(self.data.train[0]), c.batch, seed=c.seed, epoch=epoch, first=first,
            rank=self.rank, processes=self.processes,
        )  # fmt: skip
        began, images = time.perf_counter(), 0
        loader = datasets.loader(
            self.data.train, batches, c.seed, c.workers, replaced=True, device=self.device
        )
        for x, y in loader:
            loss, norm = self.one_step(x, y)
            images += c.batch
            self.progress(self.step, self.steps, loss)
            self.add({"step": self.step, "epoch": epoch, "loss": loss, "gradient_norm": norm,
                      "lr": self.optimizer.param_groups[0]["lr"]})  # fmt: skip
            self.schedule.step()
            if self.step % c.checkpoint_every == 0 and self.step % self.per_epoch:
                self.save()
        seconds = time.perf_counter() - began
        self.accuracy, tested = self.test()
        self.add({"step": self.step, "epoch": epoch, "test_accuracy": self.accuracy,
                  "test_images": tested, "images_per_s": images / seconds})  # fmt: skip
        missing = len(self.data.test[0]) - tested
        skipped = f" of {tested} images, {missing} unreadable skipped" if missing else ""
        self.say(
            f"epoch {epoch + 1} of {c.epochs}: test accuracy {self.accuracy:.2%}{skipped}, "
            f"{images / seconds:.0f} images/s"
        )
        self.save()

    def add(self, row: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.add(row)

    def one_step(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Forward, backward and update for this process's share of a batch. Returns the mean loss
        over all processes and the norm of the gradient."""
        buffers = [b.clone() for b in self.model.buffers()]
        try:
            loss = self.backward(x, y) if self.recorded is None else self.replay(x, y)
        except RuntimeError as error:
            self.optimizer.zero_grad()
            if not _is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"step {self.step + 1} ran out of memory ({str(error).splitlines()[0]}); less is "
                f"needed with --activation-memory low, lower or minimal, with --accumulate "
                f"{2 * self.c.accumulate}, or with a --batch below {self.c.batch}"
            ) from error
        if self.recorded is not None:
            assert self.recorded.gradient_norm is not None
            norm = float(self.recorded.gradient_norm)
        else:
            if self.processes > 1:
                dist.all_reduce(loss, op=dist.ReduceOp.SUM)
                loss /= self.processes
            self.scaler.unscale_(self.optimizer)
            parameters = [p for p in self.model.parameters() if p.grad is not None]
            gradients = [p.grad for p in parameters if p.grad is not None]
            total = distributed.whole(nn.utils.get_total_norm(gradients))
            norm = float(total)
            # Skipped for a non-finite norm, which would make every gradient NaN.
            if self.c.clip is not None and norm < math.inf:
                nn.utils.clip_grads_with_norm_(parameters, self.c.clip, total)
        value = float(loss)
        scaled = self.scaler.is_enabled()  # then an overflow skips the step
        if not math.isfinite(value) or not (scaled or norm < math.inf):
            if self.recorded is not None:
                self.backward(x, y)  # the update was skipped: recompute the gradients for stop_at
            self.stop_at(x, value, buffers)
        if self.recorded is None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        return value, norm

    def replay(self, x: Tensor, y: Tensor) -> Tensor:
        """Run the whole step by `training_step` and return its loss."""
        assert self.recorded is not None
        images = x.to(self.device, memory_format=self.layout, non_blocking=True)
        return self.recorded(images, y)

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        c = self.c
        total = torch.zeros((), device=self.device)
        parts = list(zip(x.chunk(c.accumulate), y.chunk(c.accumulate), strict=True))
        for i, (images, labels) in enumerate(parts):
            images = images.to(self.device, memory_format=self.layout, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            with distributed.reducing(self.parallel, now=i + 1 == len(parts)):
                loss = self.loss(self.forward(self.parallel, images), labels) / len(parts)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        dtype = torch.bfloat16 if self.c.amp == "bfloat16" else torch.float16
        with torch.autocast(self.device.type, dtype, enabled=self.c.amp != "no"):
            return model(x).float()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels, label_smoothing=self.c.label_smoothing)

    def stop_at(self, x: Tensor, loss: float, buffers: list[Tensor]) -> None:
        """Save the state before this step and raise NonFinite naming the first bad layer."""
        with torch.no_grad():
            for b, before in zip(self.model.buffers(), buffers, strict=True):
                b.copy_(before)
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        flags = distributed.non_finite(
            [p.grad for p in parameters], single_process=self.processes == 1
        )
        bad = [name for name, flag in zip(names, flags, strict=True) if flag]
        self.optimizer.zero_grad(set_to_none=True)
        self.save()
        where = first_non_finite(self.model, x.to(self.device, memory_format=self.layout))
        if self.processes > 1:  # a process whose share is finite does not know the layer
            where = first_of(self.model, distributed.gather(where))
        if where is None:
            where = f"the gradient of {bad[-1]}" if bad else "the loss"
        raise NonFinite(
            f"step {self.step + 1}: the loss is {loss:g}; {where} is the first non-finite "
            f"value. The checkpoint in {self.folder} is of step {self.step}"
        )

    @torch.no_grad()
    def test(self) -> tuple[float, int]:
        """Accuracy over the readable test images of all processes, and their number."""
        from torchmetrics.classification import MulticlassAccuracy

        model = self.average if self.average is not None else self.model
        single_process = self.processes == 1
        metric = MulticlassAccuracy(
            num_classes=len(self.data.classes), average="micro", sync_on_compute=not single_process
        ).to(self.device)
        batches = datasets.Batches(
            len(self.data.test[0]), self.c.batch, seed=0, epoch=0, rank=self.rank,
            processes=self.processes, shuffled=False,
        )  # fmt: skip
        tested = torch.zeros((), dtype=torch.int64, device=self.device)
        with distributed.ready_for_testing(model, single_process):
            model.eval()
            for batch in datasets.loader(
                self.data.test, batches, 0, self.c.workers, replaced=False, device=self.device
            ):
                if batch is None:
                    continue
                x, y = batch
                x = x.to(self.device, memory_format=self.layout)
                metric.update(self.forward(model, x), y.to(self.device))
                tested += len(y)
            model.train()
        if not single_process:
            dist.all_reduce(tested)
        if not tested:
            raise ValueError(f"--root {self.c.root} contains no readable test image")
        return float(metric.compute()), int(tested)


def _is_out_of_memory(error: RuntimeError) -> bool:
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)
