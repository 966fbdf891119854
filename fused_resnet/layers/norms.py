"""Batch norms: which statistics they use, and the update of running statistics after a step."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import checkpoint

from fused_resnet.kernels.training.protocol import Passes

from .originals import ALL

# The functions of torch.utils.checkpoint that run a forward again in backward: with use_reentrant
# True and False.
_hook = checkpoint._checkpoint_hook.__init__.__code__
_RECOMPUTE = {checkpoint.CheckpointFunction.backward.__code__} | {
    code for code in _hook.co_consts if getattr(code, "co_name", "") == "unpack_hook"
}


def recomputing() -> bool:
    """Whether backward is running a forward again, for torch.utils.checkpoint or activation memory
    "minimal": running statistics are then not updated a second time."""
    if torch._C._current_graph_task_id() == -1:  # no backward is running
        return False
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code not in _RECOMPUTE:
        frame = frame.f_back
    return frame is not None


# Classes called FrozenBatchNorm2d, by module: of torchvision, detectron2, and DETR and its kin.
_FROZEN_MODULES = ("torchvision.ops.misc", "detectron2.layers.batch_norm", "models.backbone")
_frozen: set[type] = set()


def register_frozen_norm(cls: type[nn.Module]) -> type[nn.Module]:
    """Declares that modules of exactly this class compute, in training too,

    y = (x - running_mean) / sqrt(running_var + eps) * weight + bias,   x, y: (N, C, H, W)

    from buffers or parameters (C,) of these names, with `eps` an attribute, 1e-5 if there is none.
    They are then fused as torchvision's FrozenBatchNorm2d is. Returns cls, so it can be used as a
    decorator. Raises TypeError if cls is no subclass of nn.Module."""
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_frozen_norm: cls must be a subclass of nn.Module, got {cls!r}")
    _add_frozen(cls)
    return cls


def _add_frozen(cls: Any) -> None:
    if cls not in _frozen:
        _frozen.add(cls)
        ALL.remember(cls, "forward", "__call__")


def is_frozen_bn(m: nn.Module) -> bool:
    """Whether m is exactly of a known or registered class of frozen norms."""
    cls: Any = type(m)
    if cls not in _frozen:
        known = cls.__name__ == "FrozenBatchNorm2d" and cls.__module__ in _FROZEN_MODULES
        if not known or cls.forward.__qualname__ != "FrozenBatchNorm2d.forward":
            return False
        _add_frozen(cls)
    return True


def has_activation(m: nn.Module) -> bool:
    """Whether m is timm's BatchNormAct2d, a BatchNorm2d with an activation behind it as `m.act`."""
    cls = type(m)
    return cls.__name__ == "BatchNormAct2d" and cls.__module__ == "timm.layers.norm_act"


def is_batch_norm(m: nn.Module) -> bool:
    """Whether m normalises exactly as BatchNorm2d does, with the statistics of this process."""
    return type(m) is nn.BatchNorm2d or has_activation(m)


DEFAULT_EPS = 1e-5  # of frozen norms without the attribute: DETR's has it in its forward


def uses_batch_statistics(bn: Any) -> bool:
    """Whether bn would use batch statistics now, by the rule of BatchNorm2d.forward."""
    if type(bn) is not nn.BatchNorm2d and is_frozen_bn(bn):
        return False
    return bn.training or (bn.running_mean is None and bn.running_var is None)


class Update(NamedTuple):
    """An update of running statistics that was postponed: the arguments of `track`."""

    norm: Any
    state: Any
    values: int
    update: Callable[..., None]


class Unfused(Exception):
    """A norm would be computed by PyTorch's operations, which update statistics at once."""


_postponed: ContextVar[list[Update] | None] = ContextVar("fused_resnet_postponed", default=None)


@contextlib.contextmanager
def postponing() -> Iterator[list[Update]]:
    """Within it `track` changes nothing, and appends its arguments to the list instead. Raises
    `Unfused` where a norm would not be `track`ed."""
    updates: list[Update] = []
    token = _postponed.set(updates)
    try:
        yield updates
    finally:
        _postponed.reset(token)


def postpones() -> bool:
    return _postponed.get() is not None


def falls_back() -> None:
    """Called where PyTorch's operations take over. Raises `Unfused` where updates are postponed."""
    if _postponed.get() is not None:
        raise Unfused


def track(
    bn: Any, state: Any, count: int, update: Callable[..., None] = Passes.update_running
) -> None:
    """Updates a norm's running statistics after a step, as BatchNorm2d does.

    state: the batch's mean and biased variance over `count` values per channel, in the form that
    `update` requires."""
    if not (bn.training and bn.track_running_stats) or recomputing():
        return
    waiting = _postponed.get()
    if waiting is not None:
        waiting.append(Update(bn, state, count, update))
        return
    momentum = bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    with torch.no_grad():
        update(bn.running_mean, bn.running_var, state, momentum or 0.0, count)
