"""Many devices, by PyTorch's own engine: `fused-resnet train` under torchrun.

Every process has a device, its part of each batch, and the whole model (DDP) or a shard of every
parameter (FSDP2). gloo carries the CPU's tensors, NCCL the GPUs'.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from ..resnet import BasicBlock, Bottleneck
from ..sync_batch_norm import convert_sync_batchnorm
from .config import Config

TIMEOUT = datetime.timedelta(minutes=10)  # of a collective: longer than the slowest checkpoint


class Place(NamedTuple):
    """One of `processes` processes, and the device it computes on."""

    rank: int
    processes: int
    device: torch.device

    @property
    def first(self) -> bool:
        """The process that alone writes and speaks."""
        return self.rank == 0


@contextlib.contextmanager
def processes(config: Config) -> Iterator[Place]:
    """This process's place, by torchrun's environment; alone where there is none. The process group
    is left again at the end, if it was made here."""
    device = config.where
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        if config.parallel == "fsdp":
            raise ValueError("--parallel fsdp must be run by torchrun, got a single process")
        yield Place(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    own = not dist.is_initialized()
    if own:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if own:
            dist.destroy_process_group()


def prepare_distributed(model: nn.Module, config: Config, place: Place) -> nn.Module:
    """`model`, on its device, as the module to call in a training step; the one place that says how
    a model is laid out over processes.

    --sync-bn: batch norms over the images of all processes. ddp: DistributedDataParallel with a
    static graph and gradients that live in their buckets; running statistics stay each process's
    own (`share_buffers`), for training does not read them. fsdp: fully_shard of every block and of
    what is left; in place. One process: the model itself.
    """
    if config.sync_bn:
        model = convert_sync_batchnorm(model)
    if config.parallel == "fsdp":
        return shard(model, place)
    if place.processes == 1:
        return model
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[place.device.index] if place.device.type == "cuda" else None,
        # A static graph and no_sync() do not go together in PyTorch.
        static_graph=config.accumulate == 1,
        gradient_as_bucket_view=True,
        bucket_cap_mb=config.bucket_mb,
        **_own_buffers(),
    )


def _own_buffers() -> dict[str, Any]:
    """DDP's argument against a broadcast of buffers in every forward, whose name has changed."""
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    names = ("forward_sync_buffers", "broadcast_buffers")
    return {next(name for name in names if name in known): False}


def shard(model: nn.Module, place: Place) -> nn.Module:
    """`model` under FSDP2, in place: each block's parameters are gathered when it runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other parameters
    mesh = init_device_mesh(place.device.type, (place.processes,))
    for module in list(model.modules()):
        if isinstance(module, (BasicBlock, Bottleneck)):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextlib.contextmanager
def without_reduction(module: nn.Module) -> Iterator[None]:
    """Gradients are added up in this process alone meanwhile: all but the last pass of a step."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        with module.no_sync():
            yield
    elif is_sharded(module):
        sharded: Any = module
        sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            sharded.set_requires_gradient_sync(True)
    else:
        yield


def is_sharded(module: nn.Module) -> bool:
    return hasattr(module, "set_requires_gradient_sync")  # FSDPModule, without importing it


@torch.no_grad()
def share_buffers(model: nn.Module, place: Place) -> None:
    """Every process gets the first one's buffers (running statistics), which are what a checkpoint
    holds: so all test the same network. One broadcast per dtype."""
    if place.processes == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in model.buffers():
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        flat = torch.cat([b.flatten() for b in buffers])
        dist.broadcast(flat, 0)
        for b, values in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            b.copy_(values.view_as(b))


def mean(value: Tensor, place: Place) -> Tensor:
    """The mean over all processes."""
    if place.processes > 1:
        dist.all_reduce(value)
        value /= place.processes
    return value


def gather(value: Any, place: Place) -> list[Any]:
    """One plain value of every process, by rank; every process calls this."""
    if place.processes == 1:
        return [value]
    values: list[Any] = [None] * place.processes
    dist.all_gather_object(values, value)
    return values


def tell(value: Any, place: Place) -> Any:
    """The first process's plain value, in every process."""
    if place.processes == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


# --- state, whole, whatever it is spread over -----------------------------------------------------


def model_state(model: nn.Module) -> dict[str, Any]:
    """The whole state_dict; every process calls this."""
    if not is_sharded(model):
        return model.state_dict()
    from torch.distributed.checkpoint import state_dict as spread

    options = spread.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return spread.get_model_state_dict(model, options=options)


def load_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    if not is_sharded(model):
        model.load_state_dict(state)
        return
    from torch.distributed.checkpoint import state_dict as spread

    options = spread.StateDictOptions(full_state_dict=True)
    spread.set_model_state_dict(model, state, options=options)


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The whole state of the optimizer; every process calls this."""
    if not is_sharded(model):
        return optimizer.state_dict()
    from torch.distributed.checkpoint import state_dict as spread

    options = spread.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return spread.get_optimizer_state_dict(model, optimizer, options=options)


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    if not is_sharded(model):
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint import state_dict as spread

    options = spread.StateDictOptions(full_state_dict=True)
    spread.set_optimizer_state_dict(model, optimizer, state, options=options)
