"""Benchmark of bn_add_relu, forward and backward, against the eager chain, for pytest or as script.

    python benchmarks/ops/bench_bn_add_relu.py --out DIR
    pytest benchmarks/ops/bench_bn_add_relu.py

The eager chain is that of torchvision's blocks: `F.batch_norm(training=True)`, in-place add,
in-place ReLU, and their backward. Memory traffic of the fused op, in tensors of the size of x:
  forward   statistics read x; the apply pass reads x and residual, writes y                  4
  backward  the reduction reads dy, x, y, writes dresidual; apply reads dresidual, x, writes dx 7
Without a residual: 3 and 7 (the apply pass then reads dy, x, y).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from common import Case, copy_of, main, under_pytest

import fused_resnet as fr

SHAPES = {
    "layer1, batch 8": (8, 256, 56, 56),
    "layer4, batch 32": (32, 2048, 7, 7),
    "layer1, batch 32": (32, 256, 56, 56),
}
# Whether there is a residual, dtype, memory format.
VARIANTS = {
    "with residual": (True, torch.float32, torch.channels_last),
    "no residual": (False, torch.float32, torch.channels_last),
    "with residual, bfloat16": (True, torch.bfloat16, torch.channels_last),
    "with residual, contiguous": (True, torch.float32, torch.contiguous_format),
}
EPS = 1e-5


def make_case(title: str, variant: str) -> Case:
    shape = SHAPES[title]
    with_residual, dtype, memory_format = VARIANTS[variant]
    x, residual, dy = (
        torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) for _ in range(3)
    )  # (N, C, H, W)
    weight, bias = torch.rand(2, shape[1]) + 0.5  # (C,)
    inputs = [x, weight, bias, residual] if with_residual else [x, weight, bias]
    for t in inputs:
        t.requires_grad_()

    def fused() -> None:
        y, _, _ = fr.bn_add_relu(x, weight, bias, residual if with_residual else None, EPS)
        torch.autograd.grad(y, inputs, dy)

    def eager() -> None:
        y = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
        if with_residual:
            y += residual
        torch.autograd.grad(torch.relu_(y), inputs, dy)

    copy, copied_bytes = copy_of(x.detach())
    return Case(
        name=f"{title}, {variant}",
        fused=fused,
        eager=eager,
        copy=copy,
        moved_bytes=(11 if with_residual else 10) * x.numel() * x.element_size(),
        copied_bytes=copied_bytes,
    )


def cases() -> Iterator[Case]:
    for title in SHAPES:
        for variant in VARIANTS:
            yield make_case(title, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("title", SHAPES)
def test_bn_add_relu(benchmark, title: str, variant: str) -> None:
    under_pytest(benchmark, make_case(title, variant))


if __name__ == "__main__":
    main("bn_add_relu", cases)
