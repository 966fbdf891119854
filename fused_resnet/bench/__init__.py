"""Benchmarks: interleaved contenders, the machine's limits, memory, tables and plots."""

from typing import Any

__all__ = ["Event", "collect", "pair_ratio", "run", "save", "write_json"]

_LAZY = (*__all__, "CONTENDERS", "EAGER", "Case", "Step", "Unavailable")


def __getattr__(name: str) -> Any:
    """Imported on first use: `import fused_resnet`, which takes `info` from here, stays fast."""
    if name in _LAZY:
        from . import harness

        return getattr(harness, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
