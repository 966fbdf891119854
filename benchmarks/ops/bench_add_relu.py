"""Benchmark of add_relu against `relu_(x + residual)`, as pytest-benchmark file and script.

    python benchmarks/ops/bench_add_relu.py --out DIR
    pytest benchmarks/ops/bench_add_relu.py

The fused kernel reads two tensors and writes one; the eager chain reads three and writes two. The
copy writes into an existing tensor, as the fused kernel does with `out=`. Without `out=`, outputs
up to 32 MiB reuse memory cached by the allocator; larger ones are mapped by every call, whose time
then includes zeroing the pages.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from common import Case, copy_of, main, under_pytest

import fused_resnet as fr

SHAPES = {
    "layer1 of ResNet-50, batch 8": (8, 256, 56, 56),
    "layer3 of ResNet-50, batch 32": (32, 1024, 14, 14),
    "layer1 of ResNet-50, batch 32": (32, 256, 56, 56),
}
DTYPES = (torch.float32, torch.bfloat16)


def make_case(title: str, dtype: torch.dtype, with_out: bool) -> Case:
    shape = SHAPES[title]
    x, residual = (
        torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )  # (N, C, H, W)
    copy, copied_bytes = copy_of(x)
    out = torch.zeros_like(x) if with_out else None

    def eager() -> None:
        torch.relu_(torch.add(x, residual, out=out))

    return Case(
        name=f"{title}, {str(dtype).removeprefix('torch.')}" + ", out=" * with_out,
        fused=lambda: fr.add_relu(x, residual, out=out),
        eager=eager,
        copy=copy,
        moved_bytes=3 * x.numel() * x.element_size(),
        copied_bytes=copied_bytes,
    )


def cases() -> Iterator[Case]:
    for title in SHAPES:
        for dtype in DTYPES:
            for with_out in (False, True):
                yield make_case(title, dtype, with_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("title", SHAPES)
@pytest.mark.parametrize("with_out", [False, True], ids=["new", "out"])
def test_add_relu(benchmark, title: str, dtype: torch.dtype, with_out: bool) -> None:
    under_pytest(benchmark, make_case(title, dtype, with_out))


if __name__ == "__main__":
    main("add_relu", cases)
