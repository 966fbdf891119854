"""Providers that a test registers for itself."""

from __future__ import annotations

import functools
from typing import Any

from fused_resnet.kernels import registry


def keep(monkeypatch: Any) -> None:
    """The registry, and what was chosen from it, are as they were when the test ends."""
    monkeypatch.setattr(registry, "_providers", dict(registry._providers))
    monkeypatch.setattr(registry, "_candidates", {})
    uncached = registry.gpu_provider.__wrapped__
    monkeypatch.setattr(registry, "gpu_provider", functools.cache(uncached))
