"""`explain`: lists which blocks of a model are fused, and why the others are not."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fused_resnet.kernels import registry
from fused_resnet.layers.norms import uses_batch_statistics
from fused_resnet.layers.sync_batch_norm import group_of

from .call import call_reason
from .dtype_rules import serves
from .inference.plan_cache import reason_against
from .members import FORWARDS
from .structure import STEM, Names, parse_block
from .training.prepare import trains_whole


class Explanation(NamedTuple):
    """The path a block would take now: `path` is "inference", "training" or "stock"."""

    name: str
    fused: bool
    path: str
    reason: str


def explain(model: nn.Module) -> list[Explanation]:
    """For each stem and residual block of `model`: fused or not, and the reason.

    Assumes an input of the weights' dtype, the model's current mode, and no gradients in eval. Runs
    nothing and changes nothing. With FSDP, call it between `unshard()` and `reshard()`, while the
    parameters are whole.
    """
    explanations = []
    for name, m in model.named_modules():
        names = FORWARDS.get(type(m).forward)
        if names is None and {"conv1", "bn1", "relu", "layer1"} <= m._modules.keys():
            names, name = STEM, f"{name}.stem" if name else "stem"
        if names is not None:
            explanations.append(Explanation(name, *_explain_block(m, names)))
    return explanations


def _explain_block(block: nn.Module, names: Names) -> tuple[bool, str, str]:
    parts = parse_block(block, names)
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
                why = "synchronised norms are not fused on GPUs"
            elif not trains_whole(parts, names, shape, weight.dtype, weight.dtype):
                why = "with synchronised norms a block is fused as a whole: all of its norms must "
                why += "use the same process group, and its convolutions must have no bias"
        return (False, "stock", why) if why else (True, "training", "batch statistics")
    why = reason_against(parts, weight.dtype, weight.device)
    return (False, "stock", why) if why else (True, "inference", "")
