"""Data sets for training: scikit-learn's digits, CIFAR-10, a folder of images.

The order of an epoch is drawn from (seed, epoch), and every image's augmentation from (seed, epoch,
index): a run that is interrupted anywhere and resumed goes on with the very next batch, and sees
what it would have seen, with any number of workers and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..images import MEAN, STD, _open_rgb, _reason

TEST_EVERY = 5  # of a set that comes without a test set, every fifth image is for testing
DIGITS_MAX = 16  # scikit-learn's digits are counts of pixels in 4 x 4 squares

NO_LABEL = -1  # of a test image that cannot be read


class Part(NamedTuple):
    """items: (uint8 image (3, H, W) or path, class); transform: an image of them -> float32
    (3, size, size), normalised."""

    items: Sequence[tuple[Any, int]]
    transform: Callable[[Any], Tensor]
    training: bool


class Data(NamedTuple):
    train: Part
    test: Part
    classes: list[str]


def load(name: str, root: str | None, size: int) -> Data:
    """The data set `name`: "digits", "cifar10" or "folder" (in `root`), images of size x size.

    ValueError that names the option where the set is not in `root`, or is not one.
    """
    return {"digits": _digits, "cifar10": _cifar10, "folder": _folder}[name](root, size)


def _compose(steps: Sequence[Any], mean: Sequence[float], std: Sequence[float]) -> Any:
    from torchvision.transforms import v2

    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def _split(items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    return [x for i, x in enumerate(items) if i % TEST_EVERY], list(items[::TEST_EVERY])


def _digits(root: str | None, size: int) -> Data:
    """1,797 handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak 1998), shipped with
    scikit-learn: 1,437 for training, every fifth for testing. Shifted by up to a pixel."""
    from sklearn.datasets import load_digits
    from torchvision.transforms import v2

    found = load_digits()
    grey = torch.from_numpy(found.images).mul(255 / DIGITS_MAX).round().to(torch.uint8)
    images = grey[:, None].expand(-1, 3, -1, -1).contiguous()
    train, test = _split(list(zip(images.unbind(), map(int, found.target), strict=True)))
    pixels = torch.stack([image for image, _ in train]).float() / 255
    norm = ([pixels.mean().item()] * 3, [pixels.std().item()] * 3)
    shift = [v2.RandomCrop(8, padding=1)]
    resize = [] if size == 8 else [v2.Resize(size, antialias=True)]
    return Data(
        Part(train, _compose([*shift, *resize], *norm), True),
        Part(test, _compose(resize, *norm), False),
        [str(i) for i in range(10)],
    )


def _cifar10(root: str | None, size: int) -> Data:
    """Krizhevsky 2009: 50,000 and 10,000 images of 32 x 32. Augmented as in He et al. 2015, section
    4.2: four pixels of padding, a random crop, a random flip."""
    from torchvision.datasets import CIFAR10
    from torchvision.transforms import v2

    try:
        sets = [CIFAR10(root, train=train, download=False) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"--root must hold CIFAR-10 as torchvision.datasets.CIFAR10(root, download=True) "
            f"leaves it (cifar-10-batches-py), got {root!r}: {error}"
        ) from None
    train, test = (
        list(zip(torch.from_numpy(s.data).permute(0, 3, 1, 2).unbind(), s.targets, strict=True))
        for s in sets
    )
    norm = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    resize = [] if size == 32 else [v2.Resize(size, antialias=True)]
    augment = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    return Data(
        Part(train, _compose([*augment, *resize], *norm), True),
        Part(test, _compose(resize, *norm), False),
        list(sets[0].classes),
    )


def _folder(root: str | None, size: int) -> Data:
    """root/train/CLASS/* and root/val/CLASS/* (or test); or root/CLASS/*, every fifth for testing.
    Augmented as in torchvision's references: random resized crop and flip."""
    from torchvision.transforms import v2

    base = Path(str(root))
    if (base / "train").is_dir():
        held = next((base / name for name in ("val", "test") if (base / name).is_dir()), None)
        if held is None:
            raise ValueError(f"--root must have val or test beside train, got {root!r}")
        (train, classes), (test, others) = _listed(base / "train"), _listed(held)
        if classes != others:
            odd = sorted(set(classes) ^ set(others))
            raise ValueError(
                f"--root must have the same classes in train and {held.name}, got {root!r}, where "
                f"{odd[0]} is in one of them"
            )
    else:
        items, classes = _listed(base)
        train, test = _split(items)
    crop = [v2.ToImage(), v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    centre = [v2.ToImage(), v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size)]
    return Data(
        Part(train, _compose(crop, MEAN, STD), True),
        Part(test, _compose(centre, MEAN, STD), False),
        classes,
    )


def _listed(folder: Path) -> tuple[list[tuple[str, int]], list[str]]:
    """Files and classes of a folder with one folder per class."""
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder), allow_empty=False)
    except (FileNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--root must hold a folder of images for each class, got {folder}: {reason}"
        ) from None
    return found.samples, list(found.classes)


def mix(*numbers: int) -> int:
    """One seed made of several numbers: splitmix64's finaliser over each in turn (Steele et al.
    2014, "Fast splittable pseudorandom number generators")."""
    mask, seed = 2**64 - 1, 0
    for number in numbers:
        seed = (seed + number + 0x9E3779B97F4A7C15) & mask
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & mask
        seed ^= seed >> 31
    return seed >> 1  # a manual_seed is below 2**63


class _Images(Dataset[tuple[Tensor, int, str]]):
    """Item (epoch, index): image (3, size, size), class, and "" or which file could not be read.

    A training image that cannot be read is replaced by the next one that can, so that batches keep
    their size; a test image gets no class and is left out of the count.
    """

    def __init__(self, part: Part, seed: int) -> None:
        self._part, self._seed = part, seed

    def __len__(self) -> int:
        return len(self._part.items)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int, str]:
        epoch, index = item
        before = torch.random.default_generator.get_state()
        # The CPU's generator alone: manual_seed would set a GPU's too.
        torch.random.default_generator.manual_seed(mix(self._seed, epoch, index))
        try:
            return self._read(index)
        finally:
            torch.random.default_generator.set_state(before)

    def _read(self, index: int) -> tuple[Tensor, int, str]:
        items, transform = self._part.items, self._part.transform
        problem = ""
        for offset in range(len(items)):
            image, label = items[(index + offset) % len(items)]
            if problem and not self._part.training:
                label = NO_LABEL
            if isinstance(image, Tensor):
                return transform(image), label, problem
            try:
                return transform(_open_rgb(Path(image))), label, problem
            except Exception as error:  # decoders raise what they like: the file is named
                problem = problem or f"{image}: {_reason(error)}"
        raise ValueError(f"--root must hold readable images, got none; {problem}")


class Batches(Sampler[list[tuple[int, int]]]):
    """One epoch's batches of (epoch, index): this process's part of each, from batch `first` on.

    In training the order is drawn from (seed, epoch), and what is left over after the last full
    batch waits for another epoch's order: every batch is whole, and every process has as many
    images. For testing every image comes exactly once over all processes; where the last batch has
    none left for a process, it repeats one that `counted` says is not to be counted, for a forward
    of sharded parameters needs every process.
    """

    def __init__(
        self,
        count: int,
        batch: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        first: int = 0,
        rank: int = 0,
        processes: int = 1,
        training: bool = True,
    ) -> None:
        self._count, self._batch, self._seed, self._epoch = count, batch, seed, epoch
        self._first, self._rank, self._processes = first, rank, processes
        self._training = training

    def __len__(self) -> int:
        whole = self._count // self._batch if self._training else -(-self._count // self._batch)
        return max(0, whole - self._first)

    def counted(self, i: int) -> bool:
        """Whether this process has images of its own in batch i."""
        return self._rank < min(self._batch, self._count - (self._first + i) * self._batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.arange(self._count)
        if self._training:
            generator = torch.Generator().manual_seed(mix(self._seed, self._epoch))
            order = torch.randperm(self._count, generator=generator)
        for batch in order.split(self._batch)[self._first : self._first + len(self)]:
            own = batch[self._rank :: self._processes]
            own = own if len(own) else batch[:1]
            yield [(self._epoch, int(i)) for i in own]


def loader(part: Part, batches: Batches, seed: int, workers: int) -> DataLoader[Any]:
    """Batches of images (n, 3, size, size) float32, classes (n,) int64 and problems (n strings)."""
    return DataLoader(
        _Images(part, seed),
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),  # it takes none of the global one's numbers
    )
