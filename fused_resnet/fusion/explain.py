"""Why a block is fused, or not."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fused_resnet.kernels import registry
from fused_resnet.layers.norms import uses_batch_statistics
from fused_resnet.layers.sync_batch_norm import group_of

from .call import call_reason
from .fit import serves
from .inference.plans import reason_against
from .members import FORWARDS
from .structure import STEM, Names, take_apart
from .training.prepare import trains_whole


class Explanation(NamedTuple):
    """What one block would do now: `path` is "inference", "training" or "stock"."""

    name: str
    fused: bool
    path: str
    reason: str


def explain(model: nn.Module) -> list[Explanation]:
    """For each stem and residual block of `model`: fused or not, and the reason.

    Asked for an input of the weights' own dtype, in the mode the model is in now, without
    gradients in eval. Runs nothing and changes nothing. Where FSDP shares the weights out, ask
    between its `unshard()` and `reshard()`, as a forward does.
    """
    found = []
    for name, m in model.named_modules():
        names = FORWARDS.get(type(m).forward)
        if names is None and {"conv1", "bn1", "relu", "layer1"} <= m._modules.keys():
            names, name = STEM, f"{name}.stem" if name else "stem"
        if names is not None:
            found.append(Explanation(name, *_explain_block(m, names)))
    return found


def _explain_block(block: nn.Module, names: Names) -> tuple[bool, str, str]:
    parts = take_apart(block, names)
    if isinstance(parts, str):
        return False, "stock", parts
    first = parts.pairs[0][0]
    weight = first.weight
    reason = call_reason(weight.detach())
    if reason is None and names is not STEM and "forward" in block.__dict__:
        reason = "the block has its forward replaced"
    if reason is not None:
        return False, "stock", reason
    if any(map(uses_batch_statistics, parts.norms)):
        why = None
        if not serves(True, weight):
            why = registry.missing("bn_add_relu", "native", weight.device.type)
            why = why or "another backend is forced"
        elif any(group_of(bn) is not None for bn in parts.norms):
            shape = (2, first.in_channels, 224, 224)
            if weight.device.type != "cpu":
                why = "on GPUs a synchronised norm is PyTorch's"
            elif not trains_whole(parts, names, shape, weight.dtype, weight.dtype):
                why = "with synchronised norms a block is fused as a whole: all of its norms by "
                why += "the same group's batches, no bias of a convolution"
        return (False, "stock", why) if why else (True, "training", "batch statistics")
    why = reason_against(parts, weight.dtype, weight.device)
    return (False, "stock", why) if why else (True, "inference", "")
