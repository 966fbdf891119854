"""The version of the package, of its library and of its distributions, here alone; and which torch
it needs. Imported before anything that imports torch."""

from __future__ import annotations

import re
import warnings

__version__ = "0.1.0"

MINIMUM_TORCH = (2, 11)
NEEDED = f"torch >= {'.'.join(map(str, MINIMUM_TORCH))} is needed"


def too_old(version: str) -> str | None:
    """None for a torch that the compiled kernels run with, else what is needed."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) >= MINIMUM_TORCH:
        return None
    return f"{NEEDED}, this is torch {version}"


def check_torch() -> None:
    """Raises where torch is missing. An older one may do without the kernels: one warning."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"fused_resnet: {NEEDED}, and importing torch failed: {error}") from None
    reason = too_old(torch.__version__)
    if reason is not None:
        warnings.warn(f"fused_resnet: {reason}", RuntimeWarning, stacklevel=3)


check_torch()
