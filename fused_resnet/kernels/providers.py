"""Registers this package's providers when `fused_resnet.kernels` is imported.

Triton and cuDNN are imported and probed on first use: importing fused_resnet neither imports
Triton nor initialises CUDA.
"""

from __future__ import annotations

from typing import Any

import torch

from . import native
from .convolution import Kind
from .cpu import convolution as cpu_convolution
from .cpu import onednn
from .cuda import implicit_gemm
from .cuda.convolution import GpuConv
from .problem import Problem
from .registry import Provider, register
from .target import Target, target_of
from .training import cuda as cuda_training
from .training import native as native_training


def _has_native(op: str, key: str) -> str | None:
    """None if the library implements the op for the dispatch key, else the reason."""
    reason = native.load()
    if reason is None and not torch._C._dispatch_has_kernel_for_dispatch_key(
        f"fused_resnet_native::{op}", key
    ):
        reason = f"the native build has no {key} code: rebuild it where a CUDA toolkit is installed"
    return reason


class NativeCpu(Provider):
    """The C++ kernels, with convolutions for AVX2 and AVX-512."""

    def supports(self, problem: Problem, target: Target) -> str | None:
        reason = _has_native(problem.op, "CPU")
        if reason is None and problem.op == "conv_bn_relu":
            return cpu_convolution.supports(problem, target)
        return reason

    def kernels(self) -> Any:
        return torch.ops.fused_resnet_native

    def convolution(self) -> Kind:
        return cpu_convolution.NativeConv

    def passes(self) -> native_training.Native:
        return native_training.passes()


class OneDnn(Provider):
    ops = ("conv_bn_relu",)

    def supports(self, problem: Problem, target: Target) -> str | None:
        return onednn.supports(problem)

    def convolution(self) -> Kind:
        return onednn.PackedConv


class GpuProvider(Provider):
    """Convolutions on a GPU by tiles, chosen by `tuning`."""

    def convolution(self) -> Kind:
        return GpuConv

    def supports(self, problem: Problem, target: Target) -> str | None:
        if problem.op != "conv_bn_relu" or problem.dtype is None:
            return None
        return self.gpu_convolution().supports(problem, target)


class NativeCuda(GpuProvider):
    name = "native"

    def supports(self, problem: Problem, target: Target) -> str | None:
        op = "implicit_gemm" if problem.op == "conv_bn_relu" else problem.op
        reason = _has_native(op, "CUDA")
        there = target.architecture != "none"
        if reason is None and there:
            reason = native.cuda_reason(target.capability, target.architecture)
        return reason or super().supports(problem, target)

    def target(self, device: torch.device) -> Target:
        target = target_of(device)
        # In a build for sm_90 (without "a") Hopper's own kernels consist of a trap only.
        if target == ("nvidia", "sm_90") and native.built_for("9.0a"):
            return target._replace(architecture="sm_90a")
        return target

    def kernels(self) -> Any:
        return torch.ops.fused_resnet_native

    def gpu_convolution(self) -> Any:
        return implicit_gemm

    def passes(self) -> cuda_training.Cuda:
        return cuda_training.CUDA


class Triton(GpuProvider):
    name = "triton"

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type

    def supports(self, problem: Problem, target: Target) -> str | None:
        from .triton import support

        reason = support.unavailable(target, self.device_type)
        return reason or super().supports(problem, target)

    def kernels(self) -> Any:
        from .triton import launchers

        return launchers

    def gpu_convolution(self) -> Any:
        from .triton import convolution

        return convolution


class Cudnn(GpuProvider):
    name, ops = "vendor", ("conv_bn_relu",)

    def supports(self, problem: Problem, target: Target) -> str | None:
        if target.vendor == "amd":  # where PyTorch's "cudnn" is MIOpen
            return f"cuDNN needs an NVIDIA GPU, this is {target.architecture}"
        return self.gpu_convolution().unavailable() or super().supports(problem, target)

    def gpu_convolution(self) -> Any:
        from .cuda import cudnn

        return cudnn


register("native", "cpu", NativeCpu())
register("native", "cuda", NativeCuda())
register("triton", "cpu", Triton("cpu"))
register("triton", "cuda", Triton("cuda"))
register("vendor", "cpu", OneDnn())
register("vendor", "cuda", Cudnn())
