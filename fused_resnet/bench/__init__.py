"""Benchmarks: contenders that take turns, the machine's limits, memory, tables and plots."""

from typing import Any

__all__ = ["Event", "collect", "pair_ratio", "run", "save", "write_json"]


def __getattr__(name: str) -> Any:
    """Imported when used: importing fused_resnet, which takes `info` from here, stays quick."""
    if name in __all__:
        from . import harness

        return getattr(harness, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
