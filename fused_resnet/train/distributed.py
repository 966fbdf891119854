"""Training on several processes: DistributedDataParallel, or parameters sharded by FSDP2.

With FSDP2 each process holds a slice along the first dimension of every parameter, its gradient and
its optimizer state. Hooks unshard a residual block before its forward and backward and reshard it
afterwards, so the activation memory level "minimal" saves the input of every block, not of every
segment. The running statistics of batch norm are per process in both cases. Checkpoints contain
full tensors, so a run can be resumed with any number of processes, sharded or not.

Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2304.11277).
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fused_resnet.kernels.target import current
from fused_resnet.layers.planned import Block

SHARDINGS = ("none", "fsdp")


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[tuple[int, int, torch.device]]:
    """Rank, number of processes and device, from torchrun's environment variables if set."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        with current(device):
            yield 0, 1, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    owns_group = not dist.is_initialized()
    if owns_group:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    failed = True
    try:
        yield dist.get_rank(), dist.get_world_size(), device
        failed = False
    finally:
        # After a failure the other processes may be inside a collective. NCCL would wait for them
        # while they wait for this process; only its exit notifies torchrun.
        if owns_group and not (failed and device.type == "cuda"):
            # A sharded model contains reference cycles. If it outlives the group, gloo's threads
            # hold Python objects at exit, which aborts in about half of the runs.
            gc.collect()
            dist.destroy_process_group()


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard the parameters of `model` over all processes: per block, then the remainder."""
    for p in model.parameters():
        p.data = p.data.contiguous()  # the only layout that FSDP2 supports
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for m in model.modules():
        if isinstance(m, Block):
            fully_shard(m, mesh=mesh)
    fully_shard(model, mesh=mesh)


def parallel(model: nn.Module, device: torch.device, accumulate: int) -> nn.Module:
    """`model` itself if sharded, else wrapped so that gradients are averaged over all processes."""
    if isinstance(model, FSDPModule):
        return model
    return DistributedDataParallel(
        # A static graph counts a backward without synchronization as one with it.
        model, static_graph=accumulate == 1, gradient_as_bucket_view=True,
        device_ids=[device.index] if device.type == "cuda" else None,
    )  # fmt: skip


@contextlib.contextmanager
def reducing(model: nn.Module, now: bool) -> Iterator[None]:
    """Backward passes in this context reduce gradients over all processes, if `now`; else a later
    one does."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        yield
    elif isinstance(model, DistributedDataParallel) and not now:
        with model.no_sync():
            yield
    else:
        yield


@contextlib.contextmanager
def ready_for_testing(model: nn.Module, single_process: bool) -> Iterator[None]:
    """`model` with the buffers of rank 0 on all processes, so that the tested model is the one that
    is saved, and unsharded, so that processes may test different numbers of batches."""
    if not single_process:
        for b in model.buffers():
            dist.broadcast(b, 0)
    states = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for m in states:
        m.unshard()
        m.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for i, m in enumerate(states):
            m.reshard()
            m.set_reshard_after_forward(i > 0, recurse=False)  # FSDP2's default; 0 is the root


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A second model: average = decay * average + (1 - decay) * weights, also of buffers."""
    update_local = get_ema_multi_avg_fn(decay)

    def update(average: Sequence[Tensor], current: Sequence[Tensor], steps: Any) -> None:
        # Both shards cover the same slices. The update cannot mix DTensors and plain buffers.
        update_local([_local(t) for t in average], [_local(t) for t in current], steps)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def whole(t: Tensor) -> Tensor:
    """`t` itself, or the full tensor if it is sharded."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def non_finite(tensors: list[Tensor | None], single_process: bool) -> list[bool]:
    """For each tensor, whether it contains a non-finite value on any process."""
    local = [t is not None and not bool(_local(t).isfinite().all()) for t in tensors]
    return local if single_process else [any(flags) for flags in zip(*gather(local), strict=True)]


def gather(value: Any) -> list[Any]:
    """The `value` of every process, in the order of ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# --- state_dicts of full tensors ------------------------------------------------------------------

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def model_state(model: nn.Module) -> dict[str, Any]:
    """The state_dict of full tensors. Every process must call it; for a sharded model the result is
    empty on all ranks except 0."""
    if not _is_sharded(model):
        return model.state_dict()
    return get_model_state_dict(model, options=_FULL)


def load_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Load the result of `model_state`; every process must call it with the full state."""
    if _is_sharded(model):
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(state)


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(m, FSDPModule) for m in model.modules())


def optimizer_state(optimizer: Optimizer, first: bool) -> dict[str, Any]:
    """The state_dict of full tensors. Every process must call it; only rank 0 keeps the values.

    torch.distributed.checkpoint's function is not used: it steps an optimizer that has not stepped
    yet, and AdamW counts that step.
    """

    def collect(value: Any) -> Any:
        if isinstance(value, DTensor):
            full = value.full_tensor()
            return full.cpu() if first else None
        return value

    state = optimizer.state_dict()
    return {**state, "state": _each(state["state"], lambda i, value: collect(value))}


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the result of `optimizer_state`; every process must call it with the full state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def shard_value(i: int, value: Any) -> Any:
        p = parameters[i]
        if not (isinstance(p, DTensor) and isinstance(value, Tensor) and value.shape == p.shape):
            return value
        # Every process has read the full value: no communication is needed.
        return distribute_tensor(
            value.to(p.device), p.device_mesh, p.placements, src_data_rank=None
        )

    optimizer.load_state_dict({**state, "state": _each(state["state"], shard_value)})


def _each(state: dict[int, dict[str, Any]], change: Callable[[int, Any], Any]) -> dict[int, Any]:
    return {i: {k: change(i, v) for k, v in values.items()} for i, values in state.items()}
