"""The max pooling between stem and blocks: the parameters and shapes that the kernels support."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn import MaxPool2d

from fused_resnet.kernels.problem import pair
from fused_resnet.layers.hooks import patched


def window(pool: Any) -> list[list[int]]:
    """Kernel, stride and padding, each (height, width)."""
    return [[*pair(v)] for v in (pool.kernel_size, pool.stride, pool.padding)]


def pool_shape(pool: Any, shape: Sequence[int]) -> tuple[int, ...] | None:
    """(N, C, H, W) -> (N, C, P, Q) of a plain `pool`; None where x does not fit."""
    sizes = window(pool)
    if not all(n + 2 * p >= k >= 2 * p for n, k, _, p in zip(shape[2:], *sizes, strict=True)):
        return None
    out = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape[2:], *sizes, strict=True))
    return (*shape[:2], *out)


def is_plain(pool: Any) -> bool:
    """Whether `pool` is exactly an nn.MaxPool2d, without hooks or a patched forward, whose settings
    the kernels support."""
    if type(pool) is not MaxPool2d or patched(pool) is not None:
        return False
    return not (pool.ceil_mode or pool.return_indices) and pair(pool.dilation) == (1, 1)
