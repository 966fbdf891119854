"""Residual blocks in training mode and one training step, for the tests of training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.kernels import native
from fused_resnet.layers.conv import conv1x1
from fused_resnet.layers.shortcut import PadShortcut
from fused_resnet.models.cifar import CifarBlock, PlainBlock
from fused_resnet.models.preact import PlainPreactBottleneck, PreactBlock, PreactBottleneck
from tests.ops.op_cases import randn

LAST = torch.channels_last
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
needs_native = pytest.mark.skipif(native.load() is not None, reason="needs the native kernels")

# name -> the block, and x's (N, C, H, W)
BLOCKS = {
    "basic": (lambda: fr.BasicBlock(16, 16), (3, 16, 9, 7)),
    "basic, projection": (
        lambda: fr.BasicBlock(16, 32, 2, _branch(16, 32, 2)),
        (2, 16, 9, 10),
    ),
    "bottleneck": (lambda: fr.Bottleneck(64, 16), (2, 64, 7, 7)),
    # Enough pixels to be split over threads and to recompute weight gradients' inputs by blocks.
    "basic, many pixels": (lambda: fr.BasicBlock(32, 32), (3, 32, 21, 23)),
    "bottleneck, many pixels": (lambda: fr.Bottleneck(128, 32), (3, 128, 21, 23)),
    "bottleneck, many pixels, stride 2": (
        lambda: fr.Bottleneck(32, 16, 2, _branch(32, 64, 2)),
        (3, 32, 41, 38),
    ),
    "bottleneck, many pixels, dilated": (
        lambda: fr.Bottleneck(128, 32, dilation=2),
        (3, 128, 21, 23),
    ),
    "bottleneck, projection": (
        lambda: fr.Bottleneck(32, 16, 2, _branch(32, 64, 2)),
        (2, 32, 10, 9),
    ),
    "bottleneck, groups": (
        lambda: fr.Bottleneck(64, 16, groups=4, base_width=64),
        (2, 64, 6, 5),
    ),
    "bottleneck, 32 groups of 4, many pixels": (
        lambda: fr.Bottleneck(256, 64, groups=32, base_width=4),
        (2, 256, 21, 23),
    ),
    "bottleneck, 16 groups of 8, stride 2": (
        lambda: fr.Bottleneck(32, 64, 2, _branch(32, 256, 2), groups=16, base_width=8),
        (2, 32, 14, 13),
    ),
    "bottleneck, depthwise": (
        lambda: fr.Bottleneck(64, 16, groups=16, base_width=4),
        (2, 64, 6, 5),
    ),
    "odd channels": (lambda: fr.BasicBlock(7, 7), (3, 7, 5, 6)),
    "basic, padding": (lambda: CifarBlock(16, 32, 2, PadShortcut(16, 32, 2)), (2, 16, 9, 10)),
    "plain": (lambda: PlainBlock(16, 32, 2), (2, 16, 9, 10)),
    "preact": (lambda: PreactBlock(16, 16), (3, 16, 9, 7)),
    "preact, shared": (lambda: PreactBlock(16, 16, activation_shared=True), (3, 16, 9, 7)),
    "preact, padding": (
        lambda: PreactBlock(16, 32, 2, PadShortcut(16, 32, 2)),
        (2, 16, 9, 10),
    ),
    "preact bottleneck, projection": (
        lambda: PreactBottleneck(16, 16, 2, conv1x1(16, 64, 2), activation_shared=True),
        (2, 16, 9, 10),
    ),
    "preact bottleneck, padding": (
        lambda: PreactBottleneck(16, 16, 1, PadShortcut(16, 64, 1), activation_shared=True),
        (2, 16, 8, 7),
    ),
    "preact, unshared projection": (
        lambda: PreactBlock(16, 32, 2, conv1x1(16, 32, 2)),
        (2, 16, 9, 10),
    ),
    "preact, plain": (lambda: PlainPreactBottleneck(16, 16, 2), (2, 16, 9, 10)),
    "preact, odd channels": (lambda: PreactBlock(7, 7), (3, 7, 5, 6)),
}

# Blocks whose every pass has a native kernel: one op for forward and one for backward.
ONE_OP = {name for name in BLOCKS if "odd channels" not in name and "depthwise" not in name}


def _branch(C: int, K: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(C, K, 1, stride, bias=False), nn.BatchNorm2d(K))


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """The block in training mode, with affine parameters and statistics like a trained one's, and
    an x that requires grad."""
    torch.manual_seed(0)
    build, shape = BLOCKS[name]
    block = build()
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            with torch.no_grad():
                m.weight.copy_(torch.rand_like(m.weight) + 0.5)
                m.bias.copy_(torch.randn_like(m.bias) * 0.3)
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
    x = randn(shape, dtype).contiguous(memory_format=LAST).requires_grad_()
    return block.to(dtype).to(memory_format=LAST).train(), x


def stock_step(block: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    with fr.use_backend("reference"):
        return step(block, x, dy)


def step(block: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers after one forward and backward."""
    block.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    y = block(x)
    y.backward(dy)
    outcome = {"y": y.detach()}
    if x.grad is not None:
        outcome["dx"] = x.grad
    outcome |= {f"d{n}": p.grad for n, p in block.named_parameters() if p.grad is not None}
    outcome |= {n: b.detach().clone() for n, b in block.named_buffers() if b.is_floating_point()}
    return outcome


def is_whole(y: Tensor) -> bool:
    """Whether y, or the tensor that y is a copy of, is the output of a single autograd node."""
    node = y.grad_fn
    while type(node).__name__ == "CloneBackward0":
        node = node.next_functions[0][0]
    return type(node).__name__ in ("StepFunctionBackward", "NativeBlockFunctionBackward")


class Passes:
    """Counts the convolutions run by native kernels inside the `with`, by kind."""

    def __enter__(self) -> Passes:
        self._before = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.convolutions, self.input_gradients, self.weight_gradients = (
            after - before for before, after in zip(self._before, self._now(), strict=True)
        )

    @staticmethod
    def _now() -> list[int]:
        return list(native._ask("conv_passes", [0, 0, 0]))
