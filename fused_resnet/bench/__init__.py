"""Benchmarks: interleaved timing of contenders, machine limits, memory, tables and plots."""

from typing import Any

__all__ = ["Event", "collect", "pair_ratio", "run", "save", "write_json"]


def __getattr__(name: str) -> Any:
    """Imports lazily, so that importing fused_resnet (which uses `info` from here) stays fast."""
    if name in __all__:
        from . import harness

        return getattr(harness, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
