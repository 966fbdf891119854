"""The residual learning experiment: plain and residual networks of growing depth, trained with the
same settings, and their gradients, responses and losses.

He et al. 2015 (1512.03385), section 4.2; He et al. 2016 (1603.05027); Li et al. 2018 (1712.09913).
Every finished part is written atomically to its own file, so an interrupted report can be resumed.
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

from fused_resnet.checks import at_least, one_of
from fused_resnet.fusion.training.activation_memory import LEVELS, set_activation_memory
from fused_resnet.models.cifar import BLOCKS, cifar_resnet
from fused_resnet.train.loop import need
from fused_resnet.train.state import write_whole

from . import profiles, ultra
from .setting import KINDS, Config, Data, make, number
from .steps import Steps

_PROBE = 256  # images used for profiles
_DISTANCES = tuple(round(-1 + 0.125 * i, 3) for i in range(17))


def check(config: Config) -> None:
    """Raise ValueError naming the option if a setting is invalid."""
    one_of("--data", config.data, ("digits", "cifar10"))
    need("depth", "torchvision", *(["sklearn"] if config.data == "digits" else []))
    one_of("--block", config.block, BLOCKS)
    one_of("--activation-memory", config.activation_memory, LEVELS)
    for option, value in (
        ("--seeds", config.seeds), ("--epochs", config.epochs or 1), ("--batch", config.batch or 2),
        ("--deep-steps", config.deep_steps),
    ):  # fmt: skip
        at_least(option, value, 1)
    with torch.device("meta"):
        for depth in (*config.depths, *config.deep):
            cifar_resnet(depth, block=config.block)


class Experiment:
    """The parts of one report. say: called with lines of text; progress: with parts done and total
    parts."""

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
                f"--batch must be at most {len(self.data.x)}, the number of images, got {c.batch}"
            )
        self._check_settings()
        self.parts: list[tuple[str, Callable[[], dict[str, Any]]]] = []
        for seed, depth, kind in itertools.product(range(c.seeds), c.depths, KINDS):
            name = f"train-{kind}-{depth}-{seed}"
            self.parts.append((name, partial(self.train, kind, depth, seed)))
        for depth, kind in itertools.product((*c.depths, *c.deep), KINDS):
            self.parts.append((f"start-{kind}-{depth}", partial(self.start, kind, depth)))
        for depth in c.deep:
            self.parts.append((f"deep-{depth}", partial(ultra.run, self, depth)))

    def _check_settings(self) -> None:
        """Raise ValueError if the folder contains parts of a report with different settings."""
        free = {"out", "seeds", "depths", "deep"}
        settings = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in free}
        file = self.folder / "settings.json"
        if file.exists():
            previous = json.loads(file.read_text())
            changed = next((k for k in settings if previous.get(k) != settings[k]), None)
            if changed is not None:
                raise ValueError(
                    f"--out {self.config.out} contains parts of a report with "
                    f"--{changed.replace('_', '-')} {previous.get(changed)}, "
                    f"not {settings[changed]}; "
                    "choose another --out"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(settings))

    def run(self) -> dict[str, dict[str, Any]]:
        """Every part by name; finished parts of an earlier run are read from their files."""
        parts: dict[str, dict[str, Any]] = {}
        for i, (name, make_part) in enumerate(self.parts):
            self.progress(i, len(self.parts))
            self._done = i
            file = self.folder / f"{name}.json"
            if not file.exists():
                began = time.perf_counter()
                part = make_part()
                part["seconds"] = time.perf_counter() - began
                write_whole(file, json.dumps(part, allow_nan=False))
            parts[name] = json.loads(file.read_text())
        self.progress(len(self.parts), len(self.parts))
        return parts

    # --- training ---------------------------------------------------------------------------------

    def train(self, kind: str, depth: int, seed: int) -> dict[str, Any]:
        """Errors by epoch: during training, and on the test images after each epoch. For the first
        seed also the profiles of the trained network."""
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

    # --- profiles of a network --------------------------------------------------------------------

    def loss(self, model: nn.Module, images: int = _PROBE) -> Tensor:
        return cross_entropy(model(self.data.x[:images]), self.data.y[:images])

    def gradients(self, model: nn.Module, images: int = _PROBE) -> list[float | None]:
        profile = profiles.gradient_profile(model, partial(self.loss, images=images))
        return [number(layer.value) for layer in profile]

    def looks(self, model: nn.Module) -> dict[str, Any]:
        """The gradients and responses of a trained network, and the loss around it."""
        model.train()
        trained: dict[str, Any] = {"gradients": self.gradients(model)}
        responses = profiles.response_profile(model, self.data.x[:_PROBE])
        trained["responses"] = [number(layer.value) for layer in responses]
        losses = profiles.loss_along(model, self.loss, _DISTANCES, seed=0)
        trained["around"] = {"distances": _DISTANCES, "losses": [number(v) for v in losses]}
        return trained

    def start(self, kind: str, depth: int) -> dict[str, Any]:
        """Gradients before training, with and without norms, for both initializations; on fewer
        images if their activations would not fit in memory."""
        images = ultra.images_that_fit(self.config, depth, _PROBE, self.data.size)
        cases = []
        for bn in (True, False):
            for init in ("he", "default"):
                model = make(self.config, kind, depth, 0, self.data.classes, bn=bn, init=init)
                set_activation_memory(model, "low")
                gradients = self.gradients(model, images)
                cases.append({"bn": bn, "init": init, "gradients": gradients})
        return {"kind": kind, "depth": depth, "images": images, "cases": cases}
