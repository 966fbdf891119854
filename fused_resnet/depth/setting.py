"""Options, data and networks of the depth experiment."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

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
    root: str | None = None  # folder of cifar10
    depths: tuple[int, ...] = (20, 56, 110)
    seeds: int = 3
    epochs: int | None = None  # None: 30; cifar10: 164
    batch: int | None = None  # None: 64; cifar10: 128
    lr: float | None = None  # peak; None: 0.05; cifar10: 0.1
    block: str = "basic"  # or "preact", "preact_bottleneck"
    deep: tuple[int, ...] = (1202,)  # residual networks trained for deep_steps only
    deep_steps: int = 60
    activation_memory: str = "low"  # of the deep networks
    stochastic_depth: float = 0.0  # of the residual networks
    zero_init_residual: bool = True  # each residual block is initialized to its shortcut
    out: str = "runs/depth"


class Data:
    """Normalized images in memory, x (N, 3, H, W), y (N,), for training and testing."""

    def __init__(self, config: Config) -> None:
        loaded = datasets.load(config.data, config.root, 8 if config.data == "digits" else None)
        self.classes = len(loaded.classes)
        self._augment = loaded.train[1] if config.data == "cifar10" else None
        self._source = loaded.train[0]
        self.x, self.y = _stack(loaded.train[0], loaded.test[1])
        self.test_x, self.test_y = _stack(*loaded.test)
        self.size = self.x.shape[-1]
        self._background = float(self.x.min())

    def batches(self, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of augmented images in random order, without an incomplete last batch."""
        order = torch.randperm(len(self.x), generator=generator)
        for indices in order.split(batch):
            if len(indices) < batch:
                return
            if self._augment is None:
                x = _shift(self.x[indices], self._background, generator)
            else:
                x = torch.stack([self._augment(self._source[int(i)][0]) for i in indices])
            yield x.contiguous(memory_format=torch.channels_last), self.y[indices]


def _shift(x: Tensor, background: float, generator: torch.Generator) -> Tensor:
    """x (N, C, H, W), every image shifted by -1, 0 or 1 pixels down and to the right."""
    N, _, H, W = x.shape
    padded = pad(x, [1, 1, 1, 1], value=background)
    down, right = torch.randint(0, 3, (2, N, 1), generator=generator)
    rows, columns = down + torch.arange(H), right + torch.arange(W)
    images = torch.arange(N)[:, None, None]
    return padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _stack(source: Iterable[Any], transform: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    pairs = [(transform(image), label) for image, label in source]
    x = torch.stack([image for image, _ in pairs]).contiguous(memory_format=torch.channels_last)
    return x, torch.tensor([label for _, label in pairs])


def make(
    config: Config, kind: str, depth: int, seed: int, classes: int, *, bn: bool = True,
    init: str | None = None,
) -> Any:  # fmt: skip
    """A network in training mode. init: "he", or "default" for PyTorch's initialization of
    convolutions; None: "he", with zero_init_residual as in the settings."""
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
    """None for non-finite values, which JSON cannot represent."""
    return value if math.isfinite(value) else None
