"""The setting of the depth experiment: its options, its data, its networks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fused_resnet.models.cifar import cifar_resnet
from fused_resnet.train import data as datasets

KINDS = ("plain", "residual")


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


class Setting(Protocol):
    """What a training step of the experiment needs of it."""

    config: Config
    data: Data


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


def number(value: float) -> float | None:
    """JSON has no infinities and no NaN."""
    return value if math.isfinite(value) else None
