"""What is trained, on what, and how: one field per option of `fused-resnet train`."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..activation_memory import LEVELS
from ..cifar import cifar_resnet, depth_of
from ..machine import check_device
from ..resnet import get_model, list_models

DATA = ("digits", "cifar10", "folder")
OPTIMIZERS = ("sgd", "adamw", "lamb")
AMP = ("no", "bfloat16", "float16")
PARALLEL = ("ddp", "fsdp")

# Fields that change nothing about the numbers a run computes, or only their last bits: a run may be
# resumed with others.
FREE = frozenset(
    {"root", "out", "workers", "checkpoint_every", "keep", "device", "threads", "activation_memory"}
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults train ResNet-20 on scikit-learn's digits in under a minute on two cores.

    Raises ValueError that names the option, what was expected and what came.
    """

    model: str = "resnet20"  # resnet18, ... of torchvision's family; resnet20, ... for small images
    data: str = "digits"  # "digits", "cifar10" or "folder"
    root: str | None = None  # the folder that holds CIFAR-10 or the images
    image_size: int | None = None  # pixels a side; None: as `size` says
    epochs: int | None = None  # None: 15 of digits, 100 of CIFAR-10, 90 of a folder
    batch: int = 64  # images per optimizer step, over all processes
    accumulate: int = 1  # backward passes per optimizer step, which share the batch
    optimizer: str = "sgd"  # "sgd" (Nesterov), "adamw" or "lamb"
    lr: float | None = None  # at its peak; None: as `peak_lr` says
    momentum: float = 0.9  # of sgd
    weight_decay: float | None = None  # None: 1e-4 of sgd, 1e-2 of the others; not of biases, norms
    warmup: float = 1.0  # epochs in which the learning rate grows
    label_smoothing: float = 0.0  # share of the target spread over all classes
    amp: str = "no"  # "no", "bfloat16" or "float16" (with a GradScaler)
    ema: float | None = None  # decay per step of an average of the weights; it is what is tested
    clip: float | None = None  # largest norm of the gradient
    channels_last: bool = True
    activation_memory: str = "full"  # set_activation_memory's level
    parallel: str = "ddp"  # under torchrun: "ddp", or "fsdp" (parameters sharded, block by block)
    sync_bn: bool = False  # batch norm over the images of all processes
    bucket_mb: float = 25.0  # size of DDP's gradient buckets, MiB
    seed: int = 0  # of weights, order and augmentation
    workers: int = 0  # processes that load images
    checkpoint_every: int = 100  # steps between checkpoints; one after every epoch besides
    keep: int = 2  # checkpoints that stay on disk
    device: str | None = None  # "cpu", "cuda", ...; None: a GPU where there is one
    threads: int | None = None  # CPU threads; None: PyTorch's
    deterministic: bool = False  # torch.use_deterministic_algorithms
    out: str | None = None  # folder of the run; None: runs/MODEL-DATA

    def __post_init__(self) -> None:
        try:
            small = depth_of(self.model) is not None
        except ValueError as error:
            raise ValueError(f"--model: {error}, got {self.model!r}") from None
        if not small and self.model not in list_models():
            raise ValueError(
                f"--model must be one of {', '.join(list_models())}, or resnet20, resnet32, ... "
                f"for small images, got {self.model!r}"
            )
        for name, allowed in (
            ("data", DATA), ("optimizer", OPTIMIZERS), ("amp", AMP),
            ("activation_memory", LEVELS), ("parallel", PARALLEL),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{option(name)} must be one of {', '.join(allowed)}, "
                    f"got {getattr(self, name)!r}"
                )
        for name, least in (
            ("image_size", 4), ("epochs", 1), ("batch", 2), ("accumulate", 1), ("workers", 0),
            ("checkpoint_every", 1), ("keep", 1), ("threads", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{option(name)} must be at least {least}, got {value}")
        for name, low, high in (
            ("lr", 0.0, math.inf), ("momentum", 0.0, 1.0), ("weight_decay", 0.0, math.inf),
            ("warmup", 0.0, math.inf), ("label_smoothing", 0.0, 1.0), ("ema", 0.0, 1.0),
            ("clip", 0.0, math.inf), ("bucket_mb", 0.0, math.inf),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value < high:
                raise ValueError(
                    f"{option(name)} must be at least {low:g} and below {high:g}, got {value}"
                )
        if self.batch % self.accumulate:
            raise ValueError(
                f"--batch must be a multiple of --accumulate, {self.accumulate}, got {self.batch}"
            )
        if self.data != "digits" and (self.root is None or not Path(self.root).is_dir()):
            raise ValueError(
                f"--root must be a folder, with {self.data} in it, for --data {self.data}; "
                f"got {self.root!r}"
            )
        if self.device is not None:
            check_device(self.device)

    # What None stands for.

    @property
    def where(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.model}-{self.data}")

    @property
    def passes(self) -> int:
        """Epochs."""
        return self.epochs or {"digits": 15, "cifar10": 100, "folder": 90}[self.data]

    @property
    def size(self) -> int:
        """Pixels a side: networks for small images take the set's own 8 or 32, a folder's at 32;
        torchvision's, which make images 32 times smaller, 64, and a folder's at 224."""
        if self.image_size is not None:
            return self.image_size
        if depth_of(self.model) is not None:
            return 8 if self.data == "digits" else 32
        return 224 if self.data == "folder" else 64

    @property
    def peak_lr(self) -> float:
        """SGD: in proportion to the batch, 0.1 at 256 images (Goyal et al. 2017, 1706.02677), at
        128 for small images (He et al. 2015). Others: with its root (You et al. 2019, 1904.00962),
        2e-3 (AdamW) and 1e-2 (LAMB) at 256."""
        if self.lr is not None:
            return self.lr
        if self.optimizer == "sgd":
            return 0.1 * self.batch / (256 if depth_of(self.model) is None else 128)
        return (2e-3 if self.optimizer == "adamw" else 1e-2) * math.sqrt(self.batch / 256)

    @property
    def decay(self) -> float:
        """Weight decay."""
        if self.weight_decay is not None:
            return self.weight_decay
        return 1e-4 if self.optimizer == "sgd" else 1e-2

    def fixed(self) -> dict[str, Any]:
        """What must stay as it is for a run to be resumed: every value, None replaced."""
        return {
            **{k: v for k, v in dataclasses.asdict(self).items() if k not in FREE},
            "epochs": self.passes, "image_size": self.size, "lr": self.peak_lr,
            "weight_decay": self.decay,
        }  # fmt: skip


def option(name: str) -> str:
    """A field's name as the command line spells it."""
    return "--" + name.replace("_", "-")


def require_libraries(data: str) -> None:
    """ImportError that names the extra where a library that training needs is missing."""
    needed = {"torchvision": "torchvision", "torchmetrics": "torchmetrics"}
    if data == "digits":
        needed["sklearn"] = "scikit-learn"
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f"training needs {' and '.join(missing)}: pip install fused-resnet[train]"
        )


def make_model(config: Config, classes: int) -> nn.Module:
    """The network, initialised from the config's seed, with `classes` outputs."""
    torch.manual_seed(config.seed)
    depth = depth_of(config.model)
    if depth is not None:
        return cifar_resnet(depth, num_classes=classes)
    return get_model(config.model, num_classes=classes)
