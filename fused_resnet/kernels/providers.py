"""Registers this package's providers when `fused_resnet.kernels` is imported.

Triton and cuDNN are imported and probed on first use: importing fused_resnet neither imports
Triton nor initialises CUDA.
"""

from __future__ import annotations

from typing import Any

import torch

from . import native
from .cpu import convolution as cpu_convolution
from .cpu import onednn
from .registry import Provider, register


def _native_ops() -> Any:
    return torch.ops.fused_resnet_native


def _has_native(op: str, key: str) -> str | None:
    """None if the extension implements the op for the dispatch key, else the reason."""
    reason = native.load()
    if reason is None and not torch._C._dispatch_has_kernel_for_dispatch_key(
        f"fused_resnet_native::{op}", key
    ):
        reason = f"the native build has no {key} code: rebuild it where a CUDA toolkit is installed"
    return reason


def _native_on_cpu(op: str) -> str | None:
    reason = _has_native(op, "CPU")
    if reason is None and op == "conv_bn_relu" and not cpu_convolution.supports(torch.float32):
        reason = "the native convolution needs a processor with AVX2"
    return reason


def _native_on_cuda(op: str) -> str | None:
    reason = _has_native("implicit_gemm" if op == "conv_bn_relu" else op, "CUDA")
    if reason is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if not native.runs_on(capability):
            archs = native.build_info()["cuda_archs"]
            return f"the native build ({archs}) has no code for sm_{capability[0]}{capability[1]}"
    return reason


def _implicit_gemm() -> Any:
    from .cuda import implicit_gemm

    return implicit_gemm


def _triton_on(device_type: str) -> str | None:
    from .triton import support

    return support.unavailable(device_type)


def _triton_kernels() -> Any:
    from .triton import launchers

    return launchers


def _triton_convolution() -> Any:
    from .triton import convolution

    return convolution


def _cudnn() -> Any:
    from .cuda import cudnn

    return cudnn


register("native", "cpu", Provider(_native_on_cpu, _native_ops))
register(
    "native",
    "cuda",
    Provider(
        _native_on_cuda,
        _native_ops,
        _implicit_gemm,
        for_gpus=True,
        built_for=lambda architecture: native.built_for(architecture),
    ),
)
for _device in ("cpu", "cuda"):
    register(
        "triton",
        _device,
        Provider(
            lambda op, device=_device: _triton_on(device),  # type: ignore[misc]
            _triton_kernels,
            _triton_convolution,
            for_gpus=True,
        ),
    )
register("vendor", "cpu", Provider(lambda op: onednn.unavailable()))
register("vendor", "cuda", Provider(lambda op: _cudnn().unavailable(), convolution=_cudnn))
