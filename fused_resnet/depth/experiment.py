"""The experiment behind residual learning: plain and residual networks of growing depth, trained
alike, and what their gradients, responses and losses look like.

He et al. 2015 (1512.03385), section 4.2; He et al. 2016 (1603.05027); Li et al. 2018 (1712.09913).
Every finished part is a file of its own, written whole, so that a report that is interrupted goes
on where it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from fused_resnet.fusion.training.activation_memory import LEVELS, set_activation_memory
from fused_resnet.models.cifar import BLOCKS, cifar_resnet
from fused_resnet.train import data as datasets
from fused_resnet.train.loop import need
from fused_resnet.train.state import write_whole

from . import profiles, ultra

KINDS = ("plain", "residual")
WARM_UP_DEPTH = 110  # from here on the paper starts with a tenth of the learning rate,
WARM_UP_ERROR = 0.8  # until a batch's error is below this
_PROBE = 256  # images that profiles are taken on
_DISTANCES = tuple(round(-1 + 0.125 * i, 3) for i in range(17))


@dataclasses.dataclass(frozen=True)
class Config:
    """Each field is an option of `fused-resnet depth`."""

    data: str = "digits"  # or "cifar10"
    root: str | None = None  # where cifar10 is
    depths: tuple[int, ...] = (20, 56, 110)
    seeds: int = 3
    epochs: int | None = None  # None: 30, of cifar10 164
    batch: int | None = None  # None: 64, of cifar10 128
    lr: float | None = None  # at its peak; None: 0.05, of cifar10 0.1
    block: str = "basic"  # or "preact", "preact_bottleneck"
    deep: tuple[int, ...] = (1202,)  # residual networks that are trained for some steps alone
    deep_steps: int = 60
    activation_memory: str = "low"  # of the deep ones
    stochastic_depth: float = 0.0  # of the residual ones
    zero_init_residual: bool = True  # each of their blocks starts as its shortcut
    out: str = "runs/depth"


class Data:
    """Images in memory, normalised: x (N, 3, H, W), y (N,), of training and testing."""

    def __init__(self, config: Config) -> None:
        found = datasets.load(config.data, config.root, 8 if config.data == "digits" else None)
        self.classes = len(found.classes)
        self._augment = found.train[1] if config.data == "cifar10" else None
        self._source = found.train[0]
        self.x, self.y = _stacked(found.train[0], found.test[1])
        self.test_x, self.test_y = _stacked(*found.test)
        self.size = self.x.shape[-1]
        self._background = float(self.x.min())

    def batches(self, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in a new order, every image augmented; a last batch that is not full is left
        out."""
        order = torch.randperm(len(self.x), generator=generator)
        for some in order.split(batch):
            if len(some) < batch:
                return
            if self._augment is None:
                x = moved(self.x[some], self._background, generator)
            else:
                x = torch.stack([self._augment(self._source[int(i)][0]) for i in some])
            yield x.contiguous(memory_format=torch.channels_last), self.y[some]


def moved(x: Tensor, background: float, generator: torch.Generator) -> Tensor:
    """x (N, C, H, W), every image moved by -1, 0 or 1 pixels down and as many to the right."""
    N, _, H, W = x.shape
    around = pad(x, [1, 1, 1, 1], value=background)
    down, right = torch.randint(0, 3, (2, N, 1), generator=generator)
    rows, columns = down + torch.arange(H), right + torch.arange(W)
    images = torch.arange(N)[:, None, None]
    return around[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _stacked(source: Iterable[Any], transform: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    pairs = [(transform(image), label) for image, label in source]
    x = torch.stack([image for image, _ in pairs]).contiguous(memory_format=torch.channels_last)
    return x, torch.tensor([label for _, label in pairs])


def make(
    config: Config, kind: str, depth: int, seed: int, classes: int, *, bn: bool = True,
    init: str | None = None,
) -> Any:  # fmt: skip
    """A network in training. init: "he" or "default", PyTorch's own of convolutions, for every
    layer; None: He's, and where the settings say so each residual block as its shortcut."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {}
    if not bn:
        options["norm_layer"] = lambda channels: nn.Identity()
    if kind == "residual":
        options["stochastic_depth"] = config.stochastic_depth
        options["zero_init_residual"] = config.zero_init_residual and init is None
    shortcut = "none" if kind == "plain" else "identity"
    model = cifar_resnet(depth, classes, shortcut, config.block, **options)
    if init == "default":
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                m.reset_parameters()
    return model.to(memory_format=torch.channels_last).train()


def check(config: Config) -> None:
    """ValueError that names the option."""
    if config.data not in ("digits", "cifar10"):
        raise ValueError(f"--data must be one of digits, cifar10, got {config.data!r}")
    need("depth", "torchvision", *(["sklearn"] if config.data == "digits" else []))
    if config.block not in BLOCKS:
        raise ValueError(f"--block must be one of {', '.join(BLOCKS)}, got {config.block!r}")
    if config.activation_memory not in LEVELS:
        raise ValueError(
            f"--activation-memory must be one of {', '.join(LEVELS)}, "
            f"got {config.activation_memory!r}"
        )
    for option, value in (
        ("--seeds", config.seeds), ("--epochs", config.epochs or 1), ("--batch", config.batch or 2),
        ("--deep-steps", config.deep_steps),
    ):  # fmt: skip
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    with torch.device("meta"):
        for depth in (*config.depths, *config.deep):
            cifar_resnet(depth, block=config.block)


class Experiment:
    """The parts of one report. say: takes a line of text; progress: parts done, parts in all."""

    def __init__(
        self, config: Config, say: Callable[[str], None] = lambda line: None,
        progress: Callable[[float, int], None] = lambda done, parts: None,
    ) -> None:  # fmt: skip
        check(config)
        self.say, self.progress = say, progress
        cifar = config.data == "cifar10"
        self.config = c = dataclasses.replace(
            config,
            epochs=config.epochs or (164 if cifar else 30),
            batch=config.batch or (128 if cifar else 64),
            lr=config.lr or (0.1 if cifar else 0.05),
        )
        self.folder = Path(c.out) / "parts"
        self.data = Data(c)
        if c.batch is not None and c.batch > len(self.data.x):
            raise ValueError(
                f"--batch must be at most {len(self.data.x)}, the images there are, got {c.batch}"
            )
        self._same_settings()
        self.parts: list[tuple[str, Callable[[], dict[str, Any]]]] = []
        for seed, depth, kind in itertools.product(range(c.seeds), c.depths, KINDS):
            name = f"train-{kind}-{depth}-{seed}"
            self.parts.append((name, partial(self.train, kind, depth, seed)))
        for depth, kind in itertools.product((*c.depths, *c.deep), KINDS):
            self.parts.append((f"start-{kind}-{depth}", partial(self.start, kind, depth)))
        for depth in c.deep:
            self.parts.append((f"deep-{depth}", partial(ultra.run, self, depth)))

    def _same_settings(self) -> None:
        """Parts of other settings are no parts of this report."""
        free = {"out", "seeds", "depths", "deep"}
        mine = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in free}
        file = self.folder / "settings.json"
        if file.exists():
            other = json.loads(file.read_text())
            changed = next((k for k in mine if other.get(k) != mine[k]), None)
            if changed is not None:
                raise ValueError(
                    f"--out {self.config.out} holds parts of a report with "
                    f"--{changed.replace('_', '-')} {other.get(changed)}, not {mine[changed]}; "
                    "choose another --out"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda f: f.write(json.dumps(mine).encode()))

    def run(self) -> dict[str, dict[str, Any]]:
        """Every part by its name; those of an earlier run are read."""
        found: dict[str, dict[str, Any]] = {}
        for i, (name, make_part) in enumerate(self.parts):
            self.progress(i, len(self.parts))
            self._done = i
            file = self.folder / f"{name}.json"
            if not file.exists():
                began = time.perf_counter()
                part = make_part()
                part["seconds"] = time.perf_counter() - began
                text = json.dumps(part, allow_nan=False)
                write_whole(file, lambda f, text=text: f.write(text.encode()))
            found[name] = json.loads(file.read_text())
        self.progress(len(self.parts), len(self.parts))
        return found

    # --- training ---------------------------------------------------------------------------------

    def train(self, kind: str, depth: int, seed: int) -> dict[str, Any]:
        """Errors epoch by epoch: while training, and on the test images after each epoch. Of the
        first seed, what the trained network looks like too."""
        c = self.config
        model = make(c, kind, depth, seed, self.data.classes)
        steps = Steps(self, model, depth, seed)
        curve: dict[str, Any] = {
            "kind": kind, "depth": depth, "seed": seed, "loss": [], "train_error": [],
            "test_error": [], "diverged": None,
        }  # fmt: skip
        for epoch in range(steps.epochs):
            loss, error = steps.epoch()
            if not math.isfinite(loss):
                curve["diverged"] = steps.taken
                self.say(f"{kind} {depth}, seed {seed}: diverged in step {steps.taken}")
                return curve
            curve["loss"].append(loss)
            curve["train_error"].append(error)
            curve["test_error"].append(self.test_error(model))
            self.progress(self._done + (epoch + 1) / steps.epochs, len(self.parts))
        self.say(
            f"{kind} {depth}, seed {seed}: training error {curve['train_error'][-1]:.2%}, "
            f"test error {curve['test_error'][-1]:.2%}"
        )
        if seed == 0:
            curve |= self.looks(model)
        return curve

    @torch.no_grad()
    def test_error(self, model: nn.Module) -> float:
        model.eval()
        wrong = 0
        for x, y in zip(self.data.test_x.split(512), self.data.test_y.split(512), strict=True):
            wrong += int((model(x).argmax(1) != y).sum())
        model.train()
        return wrong / len(self.data.test_y)

    # --- looking at a network ---------------------------------------------------------------------

    def loss(self, model: nn.Module, images: int = _PROBE) -> Tensor:
        return cross_entropy(model(self.data.x[:images]), self.data.y[:images])

    def gradients(self, model: nn.Module, images: int = _PROBE) -> list[float | None]:
        found = profiles.gradient_profile(model, partial(self.loss, images=images))
        return [_number(layer.value) for layer in found]

    def looks(self, model: nn.Module) -> dict[str, Any]:
        """A trained network's gradients and responses, and the loss around it."""
        model.train()
        found: dict[str, Any] = {"gradients": self.gradients(model)}
        responses = profiles.response_profile(model, self.data.x[:_PROBE])
        found["responses"] = [_number(layer.value) for layer in responses]
        losses = profiles.loss_along(model, self.loss, _DISTANCES, seed=0)
        found["around"] = {"distances": _DISTANCES, "losses": [_number(v) for v in losses]}
        return found

    def start(self, kind: str, depth: int) -> dict[str, Any]:
        """Gradients before training, with and without norms, by both initialisations; of fewer
        images where so many would not fit in memory."""
        images = ultra.images_that_fit(self.config, depth, _PROBE, self.data.size)
        cases = []
        for bn in (True, False):
            for init in ("he", "default"):
                model = make(self.config, kind, depth, 0, self.data.classes, bn=bn, init=init)
                set_activation_memory(model, "low")
                gradients = self.gradients(model, images)
                cases.append({"bn": bn, "init": init, "gradients": gradients})
        return {"kind": kind, "depth": depth, "images": images, "cases": cases}


def _number(value: float) -> float | None:
    """JSON has no infinities and no NaN."""
    return value if math.isfinite(value) else None


def paper_factor(step: int, steps: int, warming: bool) -> float:
    """The learning rate of step `step` of `steps`, both from 0, over its peak: a tenth from half of
    the steps on, a hundredth from three quarters on (32k and 48k of 64k); at most a tenth while
    warming. Source: He et al. 2015 (1512.03385), section 4.2."""
    factor = 0.01 if step >= steps * 3 // 4 else 0.1 if step >= steps // 2 else 1.0
    return min(factor, 0.1) if warming else factor


class Steps:
    """SGD with momentum, as in the paper. Its learning rate: `schedule` of the optimizer where that
    is given, else the paper's on cifar10, else one cycle over all epochs (Smith and Topin 2017,
    1708.07120)."""

    def __init__(
        self, experiment: Experiment, model: nn.Module, depth: int, seed: int,
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
        """The loss and how many images were told wrong, before the update."""
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
        """Mean loss and error of an epoch while it trains; a loss that is no number ends it."""
        losses, wrong, images = [], 0, 0
        for x, y in self.data.batches(self.batch, self.generator):
            loss, missed = self.step(x, y)
            losses.append(loss)
            wrong, images = wrong + missed, images + len(y)
            if not math.isfinite(loss):
                return loss, 1.0
        return sum(losses) / len(losses), wrong / images
