"""Public API of the parity checks: `assert_parity` for tests, `parity` for a report."""

from .parity.report import (
    Agreement,
    ParityReport,
    ParityRow,
    assert_parity,
    calibrate,
    matched_models,
    parity,
)
from .parity.runs import stock_path
from .tolerance import TOLERANCE, Error, Tolerance, assert_close, measure_error

__all__ = [
    "TOLERANCE",
    "Agreement",
    "Error",
    "ParityReport",
    "ParityRow",
    "Tolerance",
    "assert_close",
    "assert_parity",
    "calibrate",
    "matched_models",
    "measure_error",
    "parity",
    "stock_path",
]
