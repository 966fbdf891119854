"""Helpers of the op tests: named shapes, dtypes, memory layouts, and comparisons with stock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet.kernels.problem import convolution
from fused_resnet.tolerance import TOLERANCE, assert_close, measure_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# (N, C, H, W)
SHAPES = {
    "smallest": (2, 1, 1, 1),
    "single pixel": (4, 5, 1, 1),
    "one channel": (2, 1, 9, 7),
    "three channels": (2, 3, 11, 13),
    "odd channels": (2, 65, 5, 3),
    "misaligned rows": (3, 33, 7, 7),
    "one image": (1, 64, 7, 7),
    "remainder of joined rows": (5, 48, 3, 3),
    "a tile and one channel": (2, 2049, 2, 1),
    "long planes": (1, 2, 71, 67),
    "several blocks of rows": (4, 256, 14, 14),
}


def _guarded(x: Tensor, shape: Sequence[int], window: Sequence[slice]) -> Tensor:
    """A copy of x as a window of a larger tensor that is NaN everywhere else."""
    large = torch.full(list(shape), float("nan"), dtype=x.dtype, device=x.device)
    large[tuple(window)] = x
    return large[tuple(window)]


def _sliced(x: Tensor) -> Tensor:
    N, C, H, W = x.shape
    window = (slice(0, N), slice(1, C + 1), slice(1, H + 1), slice(1, 2 * W + 1, 2))
    return _guarded(x, (N, C + 2, H + 2, 2 * W + 2), window)


def _sliced_channels_last(x: Tensor) -> Tensor:
    N, C, H, W = x.shape
    window = (slice(0, N), slice(0, H), slice(0, W), slice(1, C + 1))
    return _guarded(x.permute(0, 2, 3, 1), (N, H, W, C + 3), window).permute(0, 3, 1, 2)


def _at_odd_offset(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A dense copy one element past an aligned address, with NaN before and after."""
    dense = x.contiguous(memory_format=memory_format)
    memory = torch.full((x.numel() + 33,), float("nan"), dtype=x.dtype, device=x.device)
    return memory.as_strided(x.shape, dense.stride(), 1).copy_(x)


def _unusual_strides_of_size_one(x: Tensor) -> Tensor:
    """Unusual strides for dimensions of size one, where strides have no meaning."""
    x = x.contiguous()
    strides = [s if n > 1 else 7 for n, s in zip(x.shape, x.stride(), strict=True)]
    return x.as_strided(x.shape, strides)


# name -> function that returns x's values (N, C, H, W) in that layout; "expanded" repeats x[0].
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": _sliced,
    "sliced channels_last": _sliced_channels_last,
    "H and W transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "dimensions reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "expanded": lambda x: x[:1].expand(x.shape),
    "without the first image": lambda x: torch.cat([x[:1] * float("nan"), x])[1:],
    "odd offset": lambda x: _at_odd_offset(x, torch.contiguous_format),
    "odd offset, channels_last": lambda x: _at_odd_offset(x, torch.channels_last),
    "strides of one": _unusual_strides_of_size_one,
}
DENSE = ("contiguous", "channels_last")


def randn(shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype)


def integers(shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Integers in [-3, 3]: sums of a few of them are exact in every dtype."""
    return torch.randint(-3, 4, shape).to(device=device, dtype=dtype)


def lifted(t: Tensor | None) -> Tensor | None:
    """t in float64 on the CPU."""
    return None if t is None else t.detach().to("cpu", torch.float64)


def expected_strides(x: Tensor) -> tuple[int, ...]:
    """The documented strides of an output of x's shape: those of x if x is dense in either format,
    else those of the format that x is a view of (channels adjacent in memory: channels_last)."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x.stride()
    if x.shape[1] > 1 and x.stride(1) == 1 and x.stride(3) >= x.shape[1]:
        return torch.empty(x.shape, memory_format=torch.channels_last).stride()
    return torch.empty(x.shape).stride()


def same(a: Tensor, b: Tensor) -> None:
    """Asserts equal shapes, dtypes and values; NaN equals NaN."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def close(
    names: Sequence[str],
    mine: Sequence,
    stock: Sequence,
    exact: Sequence,
    dtype: torch.dtype,
    terms: dict[str, float] | None = None,
) -> None:
    """Asserts the tolerance rule for several results.

    `terms` gives, for sums that may cancel, the largest sum of their terms' magnitudes. The minimum
    tolerance is one rounding of that sum, because one rounding of the result cannot be expected.
    """
    assert len(names) == len(mine) == len(stock) == len(exact)
    for name, m, s, e in zip(names, mine, stock, exact, strict=True):
        if terms is None or name not in terms:
            assert_close(m, s.to(m.device), lifted(e), what=name, dtype=dtype)
            continue
        error, theirs = measure_error(m, lifted(e)), measure_error(s, lifted(e))
        scaled = replace(theirs, scale=max(theirs.scale, terms[name]))
        allowed = TOLERANCE.allowed_max(scaled, dtype)
        assert error.max_abs <= allowed, f"{name}: error {error.max_abs}, allowed {allowed}"


def unchanged(*tensors: Tensor | None) -> Callable[[], None]:
    """A function that asserts that the tensors' storages, guard bands included, are unchanged."""

    def memory(t: Tensor) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())

    saved = [(t, memory(t).clone()) for t in tensors if t is not None]

    def check() -> None:
        for t, before in saved:
            assert torch.equal(memory(t), before), "an input was modified"

    return check


def need_memory(gigabytes: float) -> None:
    """Skips the test if less memory is free; 1 GB is 1e9 bytes."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free memory, got {free:.1f} GB")


def interpreted(backend: str, device: str) -> bool:
    """Whether kernels run in Triton's interpreter or the GPU emulator: correct, and a million times
    slower."""
    return backend in ("triton", "emulated") and device == "cpu"


def skip_if_too_large(backend: str, device: str) -> None:
    """Skips tests with more than 2^31 elements where they cannot run."""
    if backend == "reference":
        pytest.skip("PyTorch's operations would convert this to 26 GB of float32")
    if interpreted(backend, device):
        pytest.skip("takes hours when interpreted; test_triton.py checks the index type")
    need_memory(12)


def fused_conv(
    kind: Any, weight: Tensor, scale: Tensor, shift: Tensor, dtype: Any, *geometry: Any
) -> Any:
    """A fused convolution of class `kind`. geometry: stride, padding and dilation, each (height,
    width), and the number of groups."""
    return kind(convolution(weight.shape, dtype, *geometry), weight, scale, shift)
