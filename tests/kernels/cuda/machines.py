"""The device on which a test runs the raw CUDA kernels: CPU tensors in the emulator, or a GPU.

Tests with the fixture `kernels` run on each that is available; others run in the emulator. Operands
and results are on the CPU: `to_device` moves the arguments of `ops()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fused_resnet.kernels import registry, tuning
from fused_resnet.kernels.cuda import cudnn
from tests.emulator import emulation
from tests.kernels import registrations

_device = "cpu"


@contextmanager
def running_on(device: str) -> Iterator[None]:
    """Runs raw kernels on this device within the context; "cpu" is the emulator."""
    global _device
    before, _device = _device, device
    try:
        yield
    finally:
        _device = before


def emulated() -> bool:
    return _device == "cpu"


def ops() -> Any:
    """The kernels as ops: implicit_gemm, stem, ..."""
    if emulated():
        emulation.load()
        return torch.ops.fused_resnet_emulated
    return torch.ops.fused_resnet_native


def to_device(t: Tensor | None) -> Tensor | None:
    """t on the kernels' device, with its strides, its offset and the rest of its storage."""
    if t is None or t.device.type == _device:
        return t
    memory = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(_device)
    return memory.as_strided(t.shape, t.stride(), t.storage_offset())


def as_if_on_a_gpu(monkeypatch: Any, backends: tuple[str, ...]) -> None:
    """For CPU tensors, `backends` support every convolution, "native" by the emulator."""
    emulation.load()
    native = registry.provider("emulated", "cpu")
    vendor = registry.provider("vendor", "cuda")
    registrations.keep(monkeypatch)
    registry.register("native", "cpu", native)
    registry.register("vendor", "cpu", vendor)
    monkeypatch.setattr(registry, "target", native.target)
    monkeypatch.setattr(tuning, "candidates", lambda *_: backends)
    monkeypatch.setattr(cudnn, "choose", lambda *_: None)


def seed(number: int) -> None:
    """Sets the order of threads in the emulator; no effect on a GPU."""
    if emulated():
        emulation.seed(number)


def stock(run: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """run(*arguments) by PyTorch on the kernels' device, so that both round as its multipliers do;
    returned on the CPU."""
    moved = [to_device(a) if isinstance(a, Tensor) else a for a in arguments]
    return run(*moved).cpu()


def skip_reason(architecture: int) -> str | None:
    """The reason why tiles for this architecture do not run on the device, or None."""
    if emulated():
        return None
    major, minor = capability = torch.cuda.get_device_capability()
    if architecture == 90 and capability != (9, 0):
        return f"the tile requires Hopper, this GPU is sm_{major}{minor}"
    return None if capability >= (8, 0) else f"requires sm_80, this GPU is sm_{major}{minor}"


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether the tensors are bitwise equal; NaN equals NaN of the same bits."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    as_bits = [[t.view(bits[t.element_size()]) for t in group] for group in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*as_bits, strict=True))
