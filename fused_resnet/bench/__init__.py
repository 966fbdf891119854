"""Benchmarks: contenders that take turns, the machine's limits, memory, tables and plots."""

from .harness import Event, collect, pair_ratio, run, save, write_json

__all__ = ["Event", "collect", "pair_ratio", "run", "save", "write_json"]
