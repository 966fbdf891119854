"""The picture of a run: loss by step, test accuracy by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checkpointing import write_whole

SMOOTH = 0.05  # of the steps so far: the window of the loss's moving mean


def plot_metrics(rows: Sequence[dict[str, Any]], path: Path, title: str) -> Path | None:
    """Writes a PNG from the rows of metrics.jsonl; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    ink, faint, blue = "#222222", "#c9c9c9", "#0072b2"
    steps = [row for row in rows if "loss" in row]
    tests = [row for row in rows if "test_accuracy" in row]
    figure = Figure(figsize=(8.0, 4.2), dpi=130, facecolor="white", layout="constrained")
    left = figure.subplots()
    x, losses = [r["step"] for r in steps], [r["loss"] for r in steps]
    left.plot(x, losses, color=faint, linewidth=0.8)
    left.plot(x, moving_mean(losses), color=ink, linewidth=1.4, label="training loss")
    left.set_xlabel("step", color=ink)
    left.set_ylabel("training loss", color=ink)
    left.set_ylim(bottom=0)
    right = left.twinx()
    right.plot(
        [r["step"] for r in tests],
        [100 * r["test_accuracy"] for r in tests],
        color=blue,
        marker="o",
        markersize=3.5,
        linewidth=1.2,
    )
    right.set_ylabel("test accuracy, %", color=blue)
    for axes in (left, right):
        axes.spines["top"].set_visible(False)
        axes.tick_params(length=0)
    if tests:
        title += f": {tests[-1]['test_accuracy']:.2%} of the test images after step {x[-1]}"
    left.set_title(title, loc="left", fontsize=10.5, color=ink)
    write_whole(path, lambda file: figure.savefig(file, format="png"))
    return path


def moving_mean(values: Sequence[float]) -> list[float]:
    """The mean of each value and those shortly before it."""
    width = max(1, round(SMOOTH * len(values)))
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        means.append(total / min(i + 1, width))
    return means
