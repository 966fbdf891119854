"""Data sets for training: scikit-learn's digits, CIFAR-10, a folder of images.

The augmentation of an image is seeded by (seed, epoch, index), the order of an epoch by
(seed, epoch). A run that is interrupted and resumed therefore sees the same batches, with any
number of workers and processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from fused_resnet.checks import one_of
from fused_resnet.parity.images import MEAN, STD, open_rgb

NAMES = ("digits", "cifar10", "folder")
_TEST_EVERY = 5  # of a data set without a split, every fifth image is for testing


class Data(NamedTuple):
    """train, test: (source, transform): source[i] is (uint8 image (3, H, W) or a path, class)."""

    train: tuple[Sequence[Any], Callable[[Any], Tensor]]
    test: tuple[Sequence[Any], Callable[[Any], Tensor]]
    classes: list[str]


def load(name: str, root: str | None, size: int | None) -> Data:
    """The data set `name` with images of `size` x `size` pixels (None: its default).

    Raises ValueError naming the option if the data set is unknown or not on disk.
    """
    one_of("--data", name, NAMES)
    if name == "digits":
        return _digits(size or 32)
    return _cifar10(root, size or 32) if name == "cifar10" else _folder(root, size or 224)


def _transform(*steps: Any, mean: Sequence[float], std: Sequence[float]) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def _split(items: list[Any]) -> tuple[list[Any], list[Any]]:
    test = items[::_TEST_EVERY]
    return [item for i, item in enumerate(items) if i % _TEST_EVERY], test


def _digits(size: int) -> Data:
    """1,797 handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak 1998), part of scikit-learn;
    every fifth is for testing."""
    from sklearn.datasets import load_digits
    from torchvision.transforms import v2

    digits = load_digits()
    images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8)
    images = images[:, None].expand(-1, 3, -1, -1)
    items = list(zip(images.unbind(), (int(c) for c in digits.target), strict=True))
    train, test = _split(items)
    statistics: dict[str, Any] = {"mean": (0.3,) * 3, "std": (0.38,) * 3}
    augment = v2.RandomAffine(degrees=10, translate=(0.1, 0.1))
    return Data(
        (train, _transform(v2.Resize(size), augment, **statistics)),
        (test, _transform(v2.Resize(size), **statistics)),
        [str(i) for i in range(10)],
    )


def _cifar10(root: str | None, size: int) -> Data:
    from torchvision.datasets import CIFAR10
    from torchvision.transforms import v2

    if root is None:
        raise ValueError("--root must name the folder that contains cifar-10-batches-py, got none")
    try:
        sets = [CIFAR10(root, train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise ValueError(
            f"--root {root}: CIFAR-10 is missing or damaged ({error}); torchvision's "
            f"CIFAR10({root!r}, download=True) downloads it"
        ) from None
    items = [
        list(zip(torch.from_numpy(s.data).permute(0, 3, 1, 2).unbind(), s.targets, strict=True))
        for s in sets
    ]
    statistics: dict[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.2435, 0.2616)}
    resize = [] if size == 32 else [v2.Resize(size)]
    augment = (v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip())
    return Data(
        (items[0], _transform(*augment, *resize, **statistics)),
        (items[1], _transform(*resize, **statistics)),
        list(sets[0].classes),
    )


def _folder(root: str | None, size: int) -> Data:
    """root/train/CLASS/* and root/val (or test)/CLASS/*; or root/CLASS/*, every fifth for tests."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    if root is None or not Path(root).is_dir():
        raise ValueError(f"--root must be a folder with one subfolder per class, got {root!r}")
    parts = [Path(root, name) for name in ("train", "val", "test")]
    try:
        if parts[0].is_dir():
            held_out = next((part for part in parts[1:] if part.is_dir()), None)
            if held_out is None:
                raise ValueError(f"--root {root}: has train but neither val nor test")
            train, test = (ImageFolder(str(part)) for part in (parts[0], held_out))
            if train.classes != test.classes:
                raise ValueError(
                    f"--root {root}: train has classes {train.classes}, "
                    f"{held_out.name} {test.classes}"
                )
            items = train.samples, test.samples
            classes = train.classes
        else:
            whole = ImageFolder(root)
            items, classes = _split(whole.samples), whole.classes
    except FileNotFoundError as error:
        raise ValueError(f"--root {root}: {error}") from None
    statistics: dict[str, Any] = {"mean": MEAN, "std": STD}
    random_crop = (v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip())
    center_crop = (v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size))
    return Data(
        (items[0], _transform(v2.ToImage(), *random_crop, **statistics)),
        (items[1], _transform(v2.ToImage(), *center_crop, **statistics)),
        list(classes),
    )


def _mix(*numbers: int) -> int:
    """One seed from several integers."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return seed


@dataclass(eq=False)
class _Images(Dataset["tuple[Tensor, int] | None"]):
    """Item (epoch, index): the augmented image and its class.

    An unreadable file is reported by a warning. If `replaced`, the next readable image takes its
    place, so that every training batch has its full size; else the item is None.
    """

    source: Sequence[Any]
    transform: Callable[[Any], Tensor]
    seed: int
    replaced: bool

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int] | None:
        epoch, index = item
        for offset in range(len(self.source) if self.replaced else 1):
            image, label = self.source[(index + offset) % len(self.source)]
            try:
                image = image if isinstance(image, Tensor) else open_rgb(Path(image))
            except Exception as error:
                warnings.warn(f"skipped: {image}: {error}", stacklevel=2)
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_mix(self.seed, epoch, index))
                return self.transform(image), label
        if not self.replaced:
            return None
        raise ValueError("--root contains no readable image")


@dataclass(eq=False)
class Batches(Sampler[list[tuple[int, int]]]):
    """One epoch's batches of (epoch, index) from batch `first` on: this process's share of each.

    shuffled: in the order given by (seed, epoch), without an incomplete last batch.
    """

    count: int
    batch: int
    _: KW_ONLY
    seed: int
    epoch: int
    first: int = 0
    rank: int = 0
    processes: int = 1
    shuffled: bool = True

    def __len__(self) -> int:
        whole = self.count // self.batch if self.shuffled else -(-self.count // self.batch)
        return max(0, whole - self.first)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.arange(self.count)
        if self.shuffled:
            generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
            order = torch.randperm(self.count, generator=generator)
        for batch in order.split(self.batch)[self.first : self.first + len(self)]:
            share = batch[self.rank :: self.processes]
            if len(share):
                yield [(self.epoch, int(i)) for i in share]


def loader(
    part: tuple[Sequence[Any], Callable[[Any], Tensor]], batches: Batches, seed: int, workers: int,
    *, replaced: bool, device: torch.device,
) -> DataLoader[Any]:  # fmt: skip
    """Images (N, 3, H, W) and classes (N,) of each batch, on the host, for a model on `device`.

    replaced: whether an unreadable image is replaced by the next one. Else it is skipped, and a
    batch without a readable image is None.
    """
    return DataLoader(
        _Images(*part, seed, replaced), batch_sampler=batches, num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",  # which makes a CUDA context
        generator=torch.Generator().manual_seed(seed),  # else it advances the global generator
    )  # fmt: skip


def _collate(items: list[tuple[Tensor, int] | None]) -> Any:
    readable = [item for item in items if item is not None]
    return default_collate(readable) if readable else None
