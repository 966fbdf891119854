"""The fused paths of the ResNet family, and when they apply.

Every forward asks here first. The answer is a tensor computed by fused ops, or None: then the
module runs exactly torchvision's path. Decided per call, from three things:

    the call     `call_reason`: tracing, transforms, forced backend, device, kind of tensor
    the modules  structure.py: exact types, no hooks, nothing patched
    the tensors  plans.py: a plan is used only while nothing it was made from has changed

Fused paths: inference (packed convolutions with BN, residual and ReLU inside), training (a block as
one node of autograd's graph, training.py), and, unit by unit, whatever is in between: frozen norms
(`conv_bn_relu`) beside others (`bn_add_relu`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fused_resnet import layout
from fused_resnet.kernels import backends, convolution
from fused_resnet.kernels.training import protocol as train_kernels
from fused_resnet.layers import sync_batch_norm
from fused_resnet.ops import library as ops
from fused_resnet.ops.reference import accumulate_dtype

from . import pooling
from .inference import plans
from .inference.plans import Flow
from .pooling import is_plain, pool_shape
from .structure import STEM, Names, Parts, is_fsdps, patched, take_apart, uses_batch_statistics
from .training import block as training
from .training import prepare as block_training
from .training.prepare import serves, track

# forward of a block's class -> where such a block keeps its parts; resnet.py fills it.
FORWARDS: dict[Callable[..., Tensor], Names] = {}

_GLOBAL_HOOKS = [
    getattr(nn_module, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]


def call_reason(x: Any, training: bool = False) -> str | None:
    """None when this call may take a fused path, else why it runs torchvision's. In training a
    batch may hold no image, since another process's may."""
    if torch.compiler.is_compiling():
        return "torch.compile or torch.export is tracing, and fuses by itself"
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"x is a {type(x).__name__}, not a plain Tensor"
    if x.device.type not in ("cpu", "cuda"):
        return f"no block of {x.device.type} tensors is fused"
    empty = x.dim() == 4 and 0 in x.shape[training:]
    if x.dim() != 4 or empty or x.layout != torch.strided:
        return f"x must be a dense, non-empty 4-D tensor, got shape {tuple(x.shape)}"
    if torch.jit.is_tracing():
        return "torch.jit.trace is tracing"
    if ops.in_transform():
        return "inside a torch.func transform or forward-mode AD"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a TorchDispatchMode is active"
    if any(_GLOBAL_HOOKS):
        return "global module hooks are registered"
    if x.device.type == "cpu" and not torch.backends.mkldnn.enabled:
        return "oneDNN is switched off (torch.backends.mkldnn)"
    if backends.forced() == "reference":
        return "the reference backend is forced"
    return None


def wants_grad(block: nn.Module, x: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(p.requires_grad for p in block.parameters())


# --- inference ------------------------------------------------------------------------------------


def enter(x: Tensor, plan: plans.Plan) -> Flow:
    """x (N, C, H, W) of any layout and dtype, as `plan` wants it; x itself stays unowned."""
    if plan.takes_any:
        return Flow(x, None, False)
    inner = x.to(plan.dtype).contiguous(memory_format=torch.channels_last)
    return Flow(inner, None, inner.data_ptr() != x.data_ptr())


def leave(y: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """A fused block's output as stock would have given it for an x of this dtype and layout."""
    outer = plans.output_dtype(dtype, y.device.type)
    return y.to(outer).contiguous(memory_format=memory_format)


def run_block(block: nn.Module, names: Names, x: Tensor) -> Tensor | None:
    """A residual block's output (N, K, P, Q) by a fused path, or None: run torchvision's."""
    if call_reason(x, block.training) is not None:
        return None
    if wants_grad(block, x):
        return _run_units(block, names, x)
    plan = plans.plan_for(block, names, x.dtype, x.device)
    if isinstance(plan, str):
        return _run_units(block, names, x)
    if not plan.shapes(x.shape):
        return None
    flow = plan.run(enter(x, plan))
    return None if flow is None else leave(flow.x, x.dtype, layout.memory_format(x))


# --- training, and running statistics with gradients ----------------------------------------------


def run_pooled_stem(model: Any, x: Tensor) -> Tensor | None:
    """maxpool(relu(bn1(conv1(x)))) of a network in training as one node of autograd's graph, or
    None: pool what `run_stem` or torchvision's path gives."""
    pool = model.maxpool
    if call_reason(x) is not None or not is_plain(pool):
        return None
    parts = take_apart(model, STEM)
    if isinstance(parts, str) or not _units_pay(parts, x):
        return None
    prepared = block_training.prepare(model, STEM, parts, x)
    if prepared is None or not prepared.spec.kernels.pools:
        return None
    (conv, _), geometry = parts.pairs[0], prepared.spec.geometries[0]
    between = convolution.output_shape(x.shape, conv.weight.shape, *geometry)
    window = [n for sizes in pooling.window(pool) for n in sizes]
    if between is None or pool_shape(pool, between) is None or window[0] * window[1] > 256:
        return None
    states: list[Any] = []
    y = training.StemFunction.apply(
        prepared.spec, window, states, prepared.enter(x), *prepared.tensors()
    )
    prepared.track(states)
    return y


def stem_and_pool(model: Any, x: Tensor) -> Tensor:
    """A network's stem, and pooling where it has some, by whichever path takes them."""
    pool = model._modules.get("maxpool")
    y = None if pool is None else run_pooled_stem(model, x)
    if y is None:
        y = run_stem(model, x)
        y = model.relu(model.bn1(model.conv1(x))) if y is None else y
        y = y if pool is None else pool(y)
    return y


def counts_once(parts: Parts, x: Tensor) -> bool:
    """Whether every norm that tracks statistics is one of which `track` keeps count."""
    dtype = plans.output_dtype(x.dtype, x.device.type)
    if not serves(True, x):
        return False
    groups = [sync_batch_norm.group_of(bn) for bn in parts.norms]
    # A synchronised norm is computed here in a block that trains whole, and else by PyTorch.
    whole = (
        all(map(uses_batch_statistics, parts.norms))
        and all(conv.bias is None for conv, _ in parts.pairs)
        and all(group is groups[0] for group in groups)
        and (groups[0] is None or x.device.type == "cpu")
    )
    return all(
        not uses_batch_statistics(bn)
        or (
            (whole or type(bn) is nn.BatchNorm2d)
            and bn.eps > 0
            and bn.num_features in (conv.in_channels, conv.out_channels)
            and plans.norm_fits(bn, dtype)
        )
        for conv, bn in parts.pairs
        if bn is not None
    )


def run_stem(model: nn.Module, x: Tensor) -> Tensor | None:
    """relu(bn1(conv1(x))) of a network by a fused path, or None: run torchvision's."""
    if call_reason(x, model.training) is not None:
        return None
    parts = take_apart(model, STEM)
    if isinstance(parts, str) or not _units_pay(parts, x):
        return None
    # A network goes on from its stem in the layout that its blocks compute in.
    prepared = block_training.prepare(model, STEM, parts, x)
    return _unit(*parts.pairs[0], x, None, True) if prepared is None else prepared.run(x)


def run_norm(bn: Any, relu: Any, x: Tensor) -> Tensor | None:
    """relu(bn(x)) of two modules by one op where the norm uses batch statistics, or None."""
    if call_reason(x) is not None or type(bn) is not nn.BatchNorm2d or type(relu) is not nn.ReLU:
        return None
    if patched(bn) is not None or patched(relu) is not None or not uses_batch_statistics(bn):
        return None
    return _train_bn(bn, x, None, True) if serves(True, x) and _bn_fits(bn, x, None) else None


def run_projection(block: nn.Module, names: Names, x: Tensor) -> Tensor | None:
    """relu of a projecting shortcut alone, where its norm comes last and statistics are counted
    here; None where PyTorch is to compute it."""
    if call_reason(x) is not None or not wants_grad(block, x):
        return None
    parts = take_apart(block, names)
    if isinstance(parts, str) or not _units_pay(parts, x):
        return None
    return _unit(*parts.pairs[-1], x, None, True)


def _run_units(block: nn.Module, names: Names, x: Tensor) -> Tensor | None:
    """The block whole or unit by unit, differentiably; or None: run torchvision's."""
    ready = block_training.kept(block, x)
    if ready is not None:
        return ready.run(x).contiguous(memory_format=layout.memory_format(x))
    parts = take_apart(block, names)
    if isinstance(parts, str) or not _units_pay(parts, x):
        return None
    prepared = block_training.prepare_block(block, names, parts, x)
    if prepared is not None:
        return prepared.run(x).contiguous(memory_format=layout.memory_format(x))
    if names.norm_first:
        return None
    y = x
    for conv, bn in parts.main[:-1]:
        y = _unit(conv, bn, y, None, True)
    residual: Tensor | None = x
    if parts.shortcut == "projection":
        residual = _unit(*parts.pairs[-1], x, None, False)
    elif parts.pad is not None:
        residual = parts.pad(x)
    elif parts.shortcut == "none":
        residual = None
    return _unit(*parts.main[-1], y, residual, True)


def _units_pay(parts: Parts, x: Tensor) -> bool:
    """Whether some unit of the block can be served by something faster than stock's operations."""
    if any(conv.weight.device != x.device for conv, _ in parts.pairs):
        return False
    return any(serves(uses_batch_statistics(bn), x) for bn in parts.norms)


def _unit(conv: Any, bn: Any, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """relu(bn(conv(x)) + residual), differentiably. x: (N, C, H, W), residual: (N, K, P, Q)."""
    if uses_batch_statistics(bn):
        y = conv(x)
        if serves(True, y) and _bn_fits(bn, y, residual):
            return _train_bn(bn, y, residual, relu)
        y = bn(y)
    elif serves(False, x) and _conv_fits(conv, bn, x, residual):
        scale, shift = _scale_and_shift(conv, bn, accumulate_dtype(x.dtype))
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        return ops.conv_bn_relu(x, conv.weight, scale, shift, residual, relu, *geometry)
    else:
        y = bn(conv(x))
    if residual is not None:
        y += residual
    return torch.relu_(y) if relu else y


def _bn_fits(bn: Any, y: Tensor, residual: Tensor | None) -> bool:
    """Whether `bn_add_relu` takes what stock would take; where not, stock answers or raises."""
    if type(bn) is not nn.BatchNorm2d or y.shape[1] != bn.num_features or not bn.eps > 0:
        return False
    if y.shape[0] * y.shape[2] * y.shape[3] < 2:
        return False
    if residual is not None and (residual.shape != y.shape or residual.dtype != y.dtype):
        return False
    return plans.norm_fits(bn, y.dtype)


def _train_bn(bn: Any, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """relu(bn(x) + residual) with batch statistics; the running ones as BatchNorm2d keeps them."""
    y, *state = ops.bn_add_relu(x, bn.weight, bn.bias, residual, bn.eps, relu)
    track(bn, train_kernels.PORTABLE, state, x.numel() // x.shape[1])
    return y


def _conv_fits(conv: Any, bn: Any, x: Tensor, residual: Tensor | None) -> bool:
    """Whether `conv_bn_relu` takes what stock would take; where not, stock answers or raises."""
    if bn.running_mean is None or bn.running_var is None:
        return False
    dtype = plans.output_dtype(x.dtype, x.device.type)
    if not plans.weights_fit(x.dtype, conv.weight) or not plans.norm_fits(bn, dtype):
        return False
    out = convolution.output_shape(
        x.shape, conv.weight.shape, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    return out is not None and (
        residual is None or (tuple(residual.shape) == out and residual.dtype == dtype)
    )


# bn -> eps, dtype and stamp that its scale and shift were made from, and the two. Kept so
# that a frozen convolution stays packed from call to call.
_folded: WeakKeyDictionary[nn.Module, tuple[Any, Any, Tensor, Tensor]] = WeakKeyDictionary()


def _scale_and_shift(conv: Any, bn: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tensors = [conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return plans.scale_and_shift(conv, bn, dtype)
    now = convolution.stamp(tensors)
    kept = _folded.get(bn)
    if kept is not None and kept[0] == (bn.eps, dtype) and convolution.same_stamp(kept[1], now):
        return kept[2], kept[3]
    with torch.no_grad():
        scale, shift = plans.scale_and_shift(conv, bn, dtype)
    if convolution.keepable(scale) and not is_fsdps(bn):
        _folded[bn] = ((bn.eps, dtype), now, scale, shift)
    return scale, shift


# --- why ------------------------------------------------------------------------------------------


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
            why = backends.missing("bn_add_relu", "native", weight.device.type)
            why = why or "another backend is forced"
        elif any(sync_batch_norm.group_of(bn) is not None for bn in parts.norms):
            shape = (2, first.in_channels, 224, 224)
            if weight.device.type != "cpu":
                why = "on GPUs a synchronised norm is PyTorch's"
            elif not block_training.trains_whole(parts, names, shape, weight.dtype, weight.dtype):
                why = "with synchronised norms a block is fused as a whole: all of its norms by "
                why += "the same group's batches, no bias of a convolution"
        return (False, "stock", why) if why else (True, "training", "batch statistics")
    why = plans.reason_against(parts, weight.dtype, weight.device)
    return (False, "stock", why) if why else (True, "inference", "")
