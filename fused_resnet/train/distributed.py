"""Training on many processes: DistributedDataParallel, or parameters sharded by FSDP2.

Sharded, each process keeps a slice of every parameter, of its gradient and of the optimizer's
state, along the first dimension. Hooks put a residual block together before its forward and its
backward, and take it apart after; so "minimal" of activation memory keeps the input of every block,
not of segments. Batch norm's running statistics are each process's own either way. What is written
is always whole, so that a run goes on with any number of processes and either way.

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

from fused_resnet.layers.planned import Block

SHARDINGS = ("none", "fsdp")


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[tuple[int, int, torch.device]]:
    """Rank, number of processes and device; torchrun's where its environment is there."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield 0, 1, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    failed = True
    try:
        yield dist.get_rank(), dist.get_world_size(), device
        failed = False
    finally:
        # After a failure the others are in the middle of something, and NCCL would wait for them,
        # who wait for this process: only its end tells torchrun.
        if own and not (failed and device.type == "cuda"):
            # A sharded model is full of cycles. One that outlives the group leaves gloo's threads
            # with Python objects at exit, which aborts every second time.
            gc.collect()
            dist.destroy_process_group()


def shard(model: nn.Module, device: torch.device) -> None:
    """`model` with its parameters shared out over all processes, block by block, then the rest."""
    for p in model.parameters():
        p.data = p.data.contiguous()  # the only layout that FSDP2 takes
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for m in model.modules():
        if isinstance(m, Block):
            fully_shard(m, mesh=mesh)
    fully_shard(model, mesh=mesh)


def parallel(model: nn.Module, device: torch.device, accumulate: int) -> nn.Module:
    """`model`, sharded or not, as what adds up its gradients over all processes."""
    if isinstance(model, FSDPModule):
        return model
    return DistributedDataParallel(
        # A static graph counts a backward without a synchronisation as one with it.
        model, static_graph=accumulate == 1, gradient_as_bucket_view=True,
        device_ids=[device.index] if device.type == "cuda" else None,
    )  # fmt: skip


@contextlib.contextmanager
def reducing(model: nn.Module, now: bool) -> Iterator[None]:
    """Backwards within it add up gradients over all processes now, or leave that to a later one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        yield
    elif isinstance(model, DistributedDataParallel) and not now:
        with model.no_sync():
            yield
    else:
        yield


@contextlib.contextmanager
def ready_for_testing(model: nn.Module, alone: bool) -> Iterator[None]:
    """`model` as the first process has it, on all, so that what is tested is what is written; and
    whole, so that each may test another number of batches. alone: there is one process only."""
    if not alone:
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
            m.set_reshard_after_forward(i > 0, recurse=False)  # FSDP2's own choice; 0 is the root


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A second model: average = decay * average + (1 - decay) * weights, buffers too."""
    plain = get_ema_multi_avg_fn(decay)

    def update(average: Sequence[Tensor], current: Sequence[Tensor], steps: Any) -> None:
        # Slices of the same places; among the buffers, which are no DTensors, they cannot be.
        plain([_own(t) for t in average], [_own(t) for t in current], steps)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def whole(t: Tensor) -> Tensor:
    """`t` itself, or all of it where each process has a part."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def _own(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def non_finite(tensors: list[Tensor | None], alone: bool) -> list[bool]:
    """For each tensor, whether some process has a part of it that is no finite number."""
    found = [t is not None and not bool(_own(t).isfinite().all()) for t in tensors]
    return found if alone else [any(flags) for flags in zip(*gather(found), strict=True)]


def gather(thing: Any) -> list[Any]:
    """Every process's `thing`, in the order of ranks."""
    things: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


# --- what is written, and read --------------------------------------------------------------------

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def model_state(model: nn.Module) -> dict[str, Any]:
    """The state_dict, of whole tensors; of a sharded model on the first process alone, and empty
    elsewhere, where it must be called as well."""
    if not _is_sharded(model):
        return model.state_dict()
    return get_model_state_dict(model, options=_WHOLE)


def load_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """What `model_state` gave, on every process."""
    if _is_sharded(model):
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(state)


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(m, FSDPModule) for m in model.modules())


def optimizer_state(optimizer: Optimizer, first: bool) -> dict[str, Any]:
    """The state_dict, of whole tensors; every process must call it, and the first alone keeps what
    it gets.

    torch.distributed.checkpoint's takes a step with an optimizer that has taken none, of which
    AdamW keeps count.
    """

    def collect(value: Any) -> Any:
        if isinstance(value, DTensor):
            full = value.full_tensor()
            return full.cpu() if first else None
        return value

    state = optimizer.state_dict()
    return {**state, "state": _each(state["state"], lambda i, value: collect(value))}


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """What `optimizer_state` gave, on every process."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def share(i: int, value: Any) -> Any:
        p = parameters[i]
        if not (isinstance(p, DTensor) and isinstance(value, Tensor) and value.shape == p.shape):
            return value
        # Every process has read all of it: nothing is sent.
        return distribute_tensor(
            value.to(p.device), p.device_mesh, p.placements, src_data_rank=None
        )

    optimizer.load_state_dict({**state, "state": _each(state["state"], share)})


def _each(state: dict[int, dict[str, Any]], change: Callable[[int, Any], Any]) -> dict[int, Any]:
    return {i: {k: change(i, v) for k, v in values.items()} for i, values in state.items()}
