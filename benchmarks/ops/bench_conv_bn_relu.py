"""Benchmark of conv_bn_relu at ResNet's layers against the eager chain, for pytest or as script.

    python benchmarks/ops/bench_conv_bn_relu.py --out DIR
    pytest benchmarks/ops/bench_conv_bn_relu.py

The fused convolution is the one that the package's models use on this machine, with weights packed
once. The eager chain is that of torchvision's blocks: convolution, inference batch norm, in-place
ReLU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from common import Case, copy_of, main, under_pytest

from fused_resnet.kernels import registry
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.problem import convolution

# (C, H = W, K, R = S, stride, groups) of ResNet-18, ResNet-50 and ResNeXt-50
LAYERS = {
    "stem": (3, 224, 64, 7, 2, 1),
    "layer1 1x1": (256, 56, 64, 1, 1, 1),
    "layer1 1x1 wider": (64, 56, 256, 1, 1, 1),
    "layer1 3x3": (64, 56, 64, 3, 1, 1),
    "layer2 3x3": (128, 28, 128, 3, 1, 1),
    "layer2 grouped": (256, 28, 256, 3, 1, 32),
    "layer3 1x1": (1024, 14, 256, 1, 1, 1),
    "layer3 3x3": (256, 14, 256, 3, 1, 1),
    "layer4 1x1 wider": (512, 7, 2048, 1, 1, 1),
    "layer4 3x3": (512, 7, 512, 3, 1, 1),
}
VARIANTS = {
    f"batch {batch}, {str(dtype)[6:]}": (batch, dtype)
    for batch in (1, 8)
    for dtype in (torch.float32, torch.bfloat16)
}


def make_case(title: str, variant: str) -> Case:
    C, H, K, R, stride, groups = LAYERS[title]
    batch, dtype = VARIANTS[variant]
    x = torch.randn(batch, C, H, H).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(K, C // groups, R, R) * 0.05).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    scale, shift, mean, var = torch.rand(4, K)  # (K,)
    geometry = ((stride, stride), (R // 2, R // 2), (1, 1), groups)
    problem = convolution(weight.shape, dtype, *geometry)
    kind = registry.convolution(problem, "cpu")
    assert kind is not None, "no fused convolution on this machine"
    conv = kind(problem, weight, scale, shift)

    def eager() -> None:
        y = F.conv2d(x, weight, None, *geometry)
        torch.relu_(F.batch_norm(y, mean, var, scale, shift))

    with torch.inference_mode():
        y = conv.run(x, None, Activation.RELU)
        copy, copied_bytes = copy_of(x)

    def fused() -> None:
        conv.run(x, None, Activation.RELU)

    return Case(
        name=f"{title}, {variant}",
        fused=torch.inference_mode()(fused),
        eager=torch.inference_mode()(eager),
        copy=torch.inference_mode()(copy),
        moved_bytes=(x.numel() + y.numel() + weight.numel()) * x.element_size(),
        copied_bytes=copied_bytes,
        operations=2 * y.numel() * weight.numel() // K,
    )


def cases() -> Iterator[Case]:
    for variant in VARIANTS:
        for title in LAYERS:
            yield make_case(title, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("title", LAYERS)
def test_conv_bn_relu(benchmark, title: str, variant: str) -> None:
    under_pytest(benchmark, make_case(title, variant))


if __name__ == "__main__":
    main("conv_bn_relu", cases)
