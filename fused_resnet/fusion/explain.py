"""`explain`: lists which blocks of a model are fused, and why the others are not."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet.kernels import registry
from fused_resnet.layers.hooks import overrides
from fused_resnet.layers.norms import uses_batch_statistics
from fused_resnet.layers.planned import FUSED, Block
from fused_resnet.layers.sync_batch_norm import group_of

from .call import asked, call_reason
from .description import Description, Names, describe, recipe_of
from .dtype_rules import serves
from .inference.make import kernels_for
from .inference.release import released
from .network import NetworkNames
from .regions.explain import compiled_parts, parts_of, seen
from .training.prepare import trains_whole


class Explanation(NamedTuple):
    """The path a block would take now: `path` is "inference", "training" or "stock". share: of a
    model that `fuse` changed, the part's share of the multiplications of all convolutions in
    model(x), if x is given."""

    name: str
    fused: bool
    path: str
    reason: str
    share: float | None = None


def explain(model: nn.Module, x: Any = None) -> list[Explanation]:
    """For each stem and residual block of `model`: fused or not, and the reason.

    x: (N, C, H, W): the answers are those of the call `model(x)` at this point: for its dtype and
    device, gradients, autocast, modes, and what is replaced. Without it they assume an input of the
    weights' dtype, and no gradients in eval. Either way in the model's current mode. Blocks of a
    subclass with its own forward are listed: they are fused where that calls the forward of this
    package. Runs nothing and changes nothing. With FSDP, call it between `unshard()`
    and `reshard()`, while the parameters are whole. The reason of a part that `inference` keeps
    packed only (release_weights) says so.

    Of a model that `fuse` changed, every fused part is listed and every other convolution; x may
    then be what its forward takes, and the model runs once, unfused, to see what reaches each part
    and to count multiplications; if it raises, shares are None. Of one that
    `torch.compile(model, backend="fused_resnet")` compiled, the parts of its graphs are listed as
    they ran last. Raises TypeError if model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: model must be an nn.Module, got {type(model).__name__}")
    explanations = []
    for name, m in model.named_modules():
        names, _ = recipe_of(m)
        if isinstance(names, NetworkNames):
            if isinstance(names.stem, str):
                continue
            names, name = names.stem, f"{name}.stem" if name else "stem"
        if names is not None:
            explanations.append(Explanation(name, *_explain(m, names, x)))
    if any(FUSED in m.__dict__ for m in model.modules()):
        work, calls = ({}, None) if x is None else seen(model, x)
        total = sum(work.values()) if calls is None or calls.error is None else 0
        for part in parts_of(model, calls):
            share = sum(work.get(conv, 0) for conv in part.convs) / total if total else None
            fused = part.path != "stock"
            explanations.append(Explanation(part.name, fused, part.path, part.reason, share))
    for part in compiled_parts(model):
        explanations.append(Explanation(part.name, part.path != "stock", part.path, part.reason))
    return explanations


def _explain(module: nn.Module, names: Names, x: Tensor | None) -> tuple[bool, str, str]:
    description = describe(module, names)
    if isinstance(description, str):
        return False, "stock", description
    weight, differentiable = description.units[0].conv.weight, False
    if x is None:
        x = torch.empty(1, 1, 1, 1, dtype=weight.dtype, device=weight.device)
        reason = call_reason(x)
    else:
        reason, differentiable = asked(module, x)
    if reason is None and isinstance(module, Block) and "forward" in overrides(module):
        reason = "the block has its forward replaced"
    if reason is not None:
        return False, "stock", reason
    if any(map(uses_batch_statistics, description.norms)):
        reason = _reason_against_training(description)
        return (False, "stock", reason) if reason else (True, "training", "batch statistics")
    kernels = kernels_for(description, x.dtype, x.device)
    if differentiable and not isinstance(kernels, str):
        return True, "training", "frozen norms with gradients"
    if isinstance(kernels, str):
        return False, "stock", kernels
    return True, "inference", released(unit.conv for unit in description.units)


def _reason_against_training(description: Description) -> str | None:
    conv = description.units[0].conv
    device, dtype = conv.weight.device.type, conv.weight.dtype
    if not serves(True, conv.weight):
        missing = registry.missing("bn_add_relu", "native", device)
        return missing or "another backend is forced"
    if all(group_of(norm) is None for norm in description.norms):
        return None
    if device != "cpu":
        return "synchronised norms are not fused on GPUs"
    if trains_whole(description, (2, conv.in_channels, 224, 224), dtype, dtype):
        return None
    return (
        "with synchronised norms a block is fused as a whole: all of its norms must use the same "
        "process group, and its convolutions must have no bias"
    )
