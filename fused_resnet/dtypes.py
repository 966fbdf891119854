"""The dtype in which sums are accumulated."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulation dtype: float64 for float64, float32 for every narrower dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
