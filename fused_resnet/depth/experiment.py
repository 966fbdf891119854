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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fused_resnet.fusion.training.activation_memory import LEVELS, set_activation_memory
from fused_resnet.models.cifar import BLOCKS, cifar_resnet
from fused_resnet.train.loop import need
from fused_resnet.train.state import write_whole

from . import profiles, ultra
from .setting import KINDS, Config, Data, make, number
from .steps import Steps

_PROBE = 256  # images that profiles are taken on
_DISTANCES = tuple(round(-1 + 0.125 * i, 3) for i in range(17))


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
        return [number(layer.value) for layer in found]

    def looks(self, model: nn.Module) -> dict[str, Any]:
        """A trained network's gradients and responses, and the loss around it."""
        model.train()
        found: dict[str, Any] = {"gradients": self.gradients(model)}
        responses = profiles.response_profile(model, self.data.x[:_PROBE])
        found["responses"] = [number(layer.value) for layer in responses]
        losses = profiles.loss_along(model, self.loss, _DISTANCES, seed=0)
        found["around"] = {"distances": _DISTANCES, "losses": [number(v) for v in losses]}
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
