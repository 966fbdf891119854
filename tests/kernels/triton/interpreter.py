"""Runs the Triton kernels on CPU tensors in Triton's interpreter, as the backend "triton" there."""

from __future__ import annotations

import torch

from fused_resnet.kernels import providers, registry, target
from fused_resnet.kernels.target import Target


class Interpreted(providers.Triton):
    """The kernels believe that they run on Hopper."""

    no_blocks = "on the CPU Triton's interpreter runs its own kernels only"

    def target(self, device: torch.device) -> Target:
        return Target("nvidia", "sm_90")


def register() -> None:
    """TRITON_INTERPRET=1 must be set before Triton is imported."""
    registry.register("triton", "cpu", Interpreted("cpu"))
    target.MULTIPROCESSORS["cpu"] = 3  # more than one wave of tiles
