"""The tolerance rule of the project: the error that a result may have."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "Error", "Tolerance", "assert_close", "measure_error"]


@dataclass(frozen=True)
class Error:
    """The error of a result y against the exact result e, of the same shape.

    max_abs = max |y - e|
    rms     = sqrt(sum (y - e)^2) / sqrt(sum e^2), relative; absolute if e is all zero
    scale   = max |e|

    Equal infinities and two NaNs count as equal; any other non-finite value is an infinite error.
    """

    max_abs: float
    rms: float
    scale: float


@dataclass(frozen=True)
class Tolerance:
    """The tolerance rule: the error that a result may have.

    E(y) is the error of a result against float64 on the CPU. stock is PyTorch's result in the same
    dtype; for whole models, that of the less accurate of its two memory layouts, whose errors
    differ by a factor of up to 1.7 in float32 since they sum in different orders. u =
    eps(dtype) / 2 is the size of one rounding.

        allowed = factor * E(stock) + floor
        floor   = floor_max * u * max|exact|   for the largest error
        floor   = floor_rms * u                for the relative rms error

    The floor is one rounding: a correctly rounded result always passes, even if stock happens to be
    exact (values spread over a binade have a relative rms rounding error of 0.4 u, hence one half).
    For float64 the reference is no more exact than the result, so the floor is that of a sum of
    `float64_terms` terms.
    """

    factor: float = 2.0
    floor_max: float = 1.0
    floor_rms: float = 0.5
    float64_terms: float = 1024.0

    def _rounding(self, dtype: torch.dtype) -> float:
        unit = torch.finfo(dtype).eps / 2
        return unit * self.float64_terms if dtype == torch.float64 else unit

    def allowed_max(self, stock: Error, dtype: torch.dtype) -> float:
        """The largest |y - exact| allowed, in the units of y."""
        return self.factor * stock.max_abs + self.floor_max * self._rounding(dtype) * stock.scale

    def allowed_rms(self, stock: Error, dtype: torch.dtype) -> float:
        """The largest relative rms error allowed, dimensionless."""
        return self.factor * stock.rms + self.floor_rms * self._rounding(dtype)


TOLERANCE = Tolerance()


def measure_error(result: Tensor, exact: Tensor) -> Error:
    """The error of `result` (any shape, dtype, device) against `exact` (same shape, float64)."""
    if result.shape != exact.shape:
        raise AssertionError(f"shape {tuple(result.shape)}, expected {tuple(exact.shape)}")
    if exact.numel() == 0:
        return Error(0.0, 0.0, 0.0)
    y = result.detach().to(device=exact.device, dtype=torch.float64)
    e = exact.detach().to(torch.float64)
    diff = (y - e).abs_()
    if not torch.isfinite(diff).all():
        diff = diff.nan_to_num(nan=math.inf)
        diff[(y == e) | (y.isnan() & e.isnan())] = 0.0
    finite = e if torch.isfinite(e).all() else e.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    norm = finite.norm().item()
    rms = diff.norm().item() / (norm if norm > 0 else math.sqrt(e.numel()))
    return Error(diff.max().item(), rms, finite.abs().max().item())


def assert_close(
    result: Tensor,
    stock: Tensor,
    exact: Tensor,
    *,
    what: str = "result",
    dtype: torch.dtype | None = None,
    tolerance: Tolerance = TOLERANCE,
) -> None:
    """Raises AssertionError unless the largest and rms errors of `result` are within tolerance.

    result, stock, exact: of the same shape; `exact` is float64. `dtype` is the tested dtype and
    defaults to that of `result`; pass it if a 16-bit input has a float32 result.
    """
    dtype = dtype or result.dtype
    error, ref = measure_error(result, exact), measure_error(stock, exact)
    limits = (
        ("largest error", error.max_abs, ref.max_abs, tolerance.allowed_max(ref, dtype)),
        ("relative rms error", error.rms, ref.rms, tolerance.allowed_rms(ref, dtype)),
    )
    for kind, got, stock_error, allowed in limits:
        if not got <= allowed:
            raise AssertionError(
                f"{what}: {kind} {got:.3g} against float64, allowed {allowed:.3g} "
                f"({tolerance.factor:g} x stock's {stock_error:.3g} plus one rounding); "
                f"{dtype}, shape {tuple(result.shape)}, strides {result.stride()}"
            )
