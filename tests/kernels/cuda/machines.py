"""Where a test runs the raw CUDA kernels: on CPU tensors in the emulator, or on a GPU.

Tests that take the fixture `kernels` run on both where both are there; without it, in the emulator.
Operands and results stay on the CPU: `ops()` is called on what `here` moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.emulator import emulation

_device = "cpu"


@contextmanager
def running_on(device: str) -> Iterator[None]:
    """Within it, raw kernels run on such tensors: "cpu" is the emulator."""
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


def here(t: Tensor | None) -> Tensor | None:
    """t on the device of the kernels; strides, offset and what surrounds it as they were."""
    if t is None or t.device.type == _device:
        return t
    memory = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(_device)
    return memory.as_strided(t.shape, t.stride(), t.storage_offset())


def seed(number: int) -> None:
    """The order of threads from here on, which a GPU chooses by itself."""
    if emulated():
        emulation.seed(number)


def stock(run: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """run(*arguments), by PyTorch, where the kernels run, so that both round as such a machine's
    multipliers do; on the CPU."""
    moved = [here(a) if isinstance(a, Tensor) else a for a in arguments]
    return run(*moved).cpu()


def skip_reason(architecture: int) -> str | None:
    """Why a tile for this architecture does not run here, or None."""
    if emulated():
        return None
    found = torch.cuda.get_device_capability()
    if architecture == 90 and found != (9, 0):
        return f"a tile for Hopper, this GPU is sm_{found[0]}{found[1]}"
    return None if found >= (8, 0) else f"needs sm_80, this GPU is sm_{found[0]}{found[1]}"


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Bit by bit: NaN equals NaN."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    as_bits = [[t.view(bits[t.element_size()]) for t in group] for group in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*as_bits, strict=True))
