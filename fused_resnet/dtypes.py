"""The dtype in which sums are accumulated, and PyTorch's switches of TF32."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulation dtype: float64 for float64, float32 for every narrower dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# PyTorch has an older and a newer set of switches of TF32. Reading an older one (`allow_tf32`,
# `get_float32_matmul_precision`) raises once a newer one was set; the newer ones follow both.


def convolves_in_tf32() -> bool:
    """Whether PyTorch allows convolutions of float32 tensors on a GPU to multiply in TF32."""
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return bool(precision == "tf32")


def multiplies_in_tf32() -> bool:
    """The same of matrix products, such as those of linear layers."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
