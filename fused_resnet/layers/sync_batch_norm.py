"""Synchronised batch norm on any device.

PyTorch's SyncBatchNorm supports only GPUs: on the CPU its forward raises, and
DistributedDataParallel rejects a module that contains one. `SyncBatchNorm` here supports both. In
training it uses the statistics over all processes of its group;
fused_resnet/kernels/training/collectives.py describes the communication. As in PyTorch, gradients
of weight and bias are those of each process: DistributedDataParallel averages them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fused_resnet.kernels.training import collectives

from .norms import track


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d with statistics over all processes of a group in training.

    y = (x - mean) / sqrt(var + eps) * weight + bias, mean and biased var over (N, H, W) of every
    process; x, y: (N, C, H, W), N may differ between processes. The running variance is unbiased by
    the total count. Inside a block of `fused_resnet` it is part of the fused step. Elsewhere it
    runs PyTorch's SyncBatchNorm on GPUs, and PyTorch's operations on the CPU.
    process_group: as for torch.nn.SyncBatchNorm; None: all processes.
    """

    def __init__(self, *args: Any, process_group: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    def forward(self, x: Tensor) -> Tensor:
        group = group_of(self)
        if group is None:
            return super().forward(x)
        if x.device.type != "cpu":
            stock = nn.SyncBatchNorm.__new__(nn.SyncBatchNorm)
            stock.__dict__ = self.__dict__  # the same parameters, buffers and settings
            return nn.SyncBatchNorm.forward(stock, x)
        states: list[Any] = []
        y = _Synchronised.apply(x, self.weight, self.bias, self.eps, group, states)
        (state, total), *_ = states
        track(self, state, total)
        return y


class _Synchronised(torch.autograd.Function):
    """A norm over the processes of a group, computed in float64.

    apply(x, weight, bias, eps, group, states): appends ((mean, variance), count) to states."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any,
        states: list[Any],
    ) -> Tensor:  # fmt: skip
        values = x.double()
        local = torch.stack([values.mean((0, 2, 3)), values.var((0, 2, 3), correction=0)])
        # For an empty batch these are NaN; `merge` skips a count of 0.
        (mean, variance), total = collectives.merge(local, x.numel() // x.shape[1], group)
        states.append(((mean, variance), int(total)))
        invstd = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, bias, mean, invstd)
        ctx.group, ctx.total = group, float(total)
        scale = invstd if weight is None else invstd * weight.double()
        y = (values - _channels(mean)) * _channels(scale)
        return (y if bias is None else y + _channels(bias.double())).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, bias, mean, invstd = ctx.saved_tensors
        g, centred = dy.double(), x.double() - _channels(mean)
        local = torch.stack(
            [g.sum((0, 2, 3)), (g * centred).sum((0, 2, 3)), torch.zeros_like(mean)]
        )
        sum_g, sum_gx, _ = collectives.reduce(local, ctx.group) / ctx.total
        scale = invstd if weight is None else invstd * weight.double()
        slope = invstd.square() * sum_gx
        dx = (g - _channels(sum_g) - centred * _channels(slope)) * _channels(scale)
        dweight = None if weight is None else (local[1] * invstd).to(weight.dtype)
        dbias = None if bias is None else local[0].to(bias.dtype)
        return dx.to(x.dtype), dweight, dbias, None, None, None


def _channels(t: Tensor) -> Tensor:
    return t.view(1, -1, 1, 1)


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Replaces every BatchNorm2d of `module` by a `SyncBatchNorm` with the same parameters, buffers
    and settings, like torch.nn.SyncBatchNorm.convert_sync_batchnorm for GPUs. Already synchronised
    norms are moved to this group. Returns `module`, or its replacement if it is itself a norm.
    Convert before DistributedDataParallel.
    """
    if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm):
        norm = SyncBatchNorm.__new__(SyncBatchNorm)
        norm.__dict__ = module.__dict__.copy()
        norm.process_group = process_group
        return norm
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child, process_group))
    return module


def group_of(bn: Any) -> Any:
    """The process group of bn's statistics now, by the rule of torch.nn.SyncBatchNorm; None for
    this process only."""
    if type(bn) not in (nn.SyncBatchNorm, SyncBatchNorm) or not bn.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def agreed(draws: Tensor, norms: Iterable[Any], device: torch.device) -> Tensor:
    """Random draws, on the CPU, that select which blocks run. If one of the norms is synchronised,
    returns the draws of its group's first process: all processes must run the same norms. They are
    sent from `device`, the norms' own: NCCL takes no tensors on the CPU. On a GPU that waits for
    the stream."""
    if not (dist.is_available() and dist.is_initialized()):
        return draws  # avoids iterating over all modules at every step
    group = next((g for g in map(group_of, norms) if g is not None), None)
    if group is not None:
        draws = draws.to(device)
        dist.broadcast(draws, dist.get_global_rank(group, 0), group=group)
    return draws.cpu()
