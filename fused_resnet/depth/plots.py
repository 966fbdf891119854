"""Plots of the depth report; each function takes the summary, returns a figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
KINDS = ("plain", "residual")


def _two_axes(title: str, y: str, x: str, names: tuple[str, str] = KINDS) -> tuple[Figure, Any]:
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, 2, sharey=True)
    for name, a in zip(names, axes, strict=True):
        a.set_title(name)
        a.set_xlabel(x)
        _style(a)
    axes[0].set_ylabel(y)
    return figure, axes


def _style(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:  # empty if every network diverged
        axes.legend(frameon=False)


def curves(summary: dict[str, Any]) -> Figure:
    """Errors by epoch: training dashed, test solid, with a band from the best to the worst seed."""
    figure, axes = _two_axes("Error against epoch", "error, %", "epoch")
    for kind, a in zip(KINDS, axes, strict=True):
        for color, depth in zip(COLORS, summary["settings"]["depths"], strict=False):
            runs = [
                r for r in summary["curves"]
                if r["kind"] == kind and r["depth"] == depth and r["diverged"] is None
            ]  # fmt: skip
            for key, style in (("train_error", "--"), ("test_error", "-")):
                series = [[100 * v for v in values] for values in zip(*(r[key] for r in runs))]  # noqa: B905
                epochs = range(1, len(series) + 1)
                label = f"{depth} layers" if style == "-" else None
                mean = [statistics.fmean(values) for values in series]
                a.plot(epochs, mean, style, color=color, label=label, lw=1.5)
                if style == "-" and series:
                    low, high = [min(v) for v in series], [max(v) for v in series]
                    a.fill_between(epochs, low, high, color=color, alpha=0.15, lw=0)
        a.set_ylim(0, 100)
    axes[0].plot([], [], "--", color="grey", label="training")
    axes[0].legend(frameon=False)
    return figure


def degradation(summary: dict[str, Any]) -> Figure:
    """Final errors by depth."""
    names = ("training", "test")
    figure, axes = _two_axes("Final error against depth", "error, %", "layers", names)
    for key, a in zip(("train_error", "test_error"), axes, strict=True):
        for kind, color in zip(KINDS, (COLORS[5], COLORS[0]), strict=True):
            rows = [r for r in summary["errors"] if r["kind"] == kind and r[key] is not None]
            means = [100 * r[key]["mean"] for r in rows]
            spread = [
                [m - 100 * r[key]["min"] for m, r in zip(means, rows, strict=True)],
                [100 * r[key]["max"] - m for m, r in zip(means, rows, strict=True)],
            ]
            a.errorbar(
                [r["depth"] for r in rows], means, spread, color=color, marker="o", capsize=3,
                label=kind,
            )  # fmt: skip
    axes[0].legend(frameon=False)
    return figure


def gradients(summary: dict[str, Any]) -> Figure:
    """Gradient norm by layer: before training with and without norms, and after training."""
    rows = [
        ("start, batch norm", _start(summary, True, "he")),
        ("start, no norm, He", _start(summary, False, "he")),
        ("start, no norm, default", _start(summary, False, "default")),
        ("trained", [(r["kind"], r["depth"], r["gradients"]) for r in summary["looks"]]),
    ]
    depths = sorted({d for _, lines in rows for _, d, _ in lines})
    figure = Figure(figsize=(14, 6), layout="constrained")
    axes = figure.subplots(2, len(rows), sharex=True, sharey="col")
    figure.suptitle("Norm of the gradient of each layer's weight, from the first to the last")
    for column, (title, lines) in enumerate(rows):
        for row, kind in enumerate(KINDS):
            a = axes[row][column]
            for line_kind, depth, values in sorted(lines, key=lambda line: line[1]):
                if line_kind != kind:
                    continue
                known = [(i, v) for i, v in enumerate(values[:-1]) if v]
                places = [i / max(1, len(values) - 2) for i, _ in known]
                color = COLORS[depths.index(depth) % len(COLORS)]
                a.plot(places, [v for _, v in known], color=color, lw=1, label=f"{depth}")
            a.set_yscale("log")
            a.set_title(f"{kind}: {title}", fontsize=10)
            _style(a)
            if row:
                a.set_xlabel("place in the network")
    axes[0][0].legend(frameon=False, title="layers", fontsize=8)
    return figure


def _start(summary: dict[str, Any], bn: bool, init: str) -> list[tuple[str, int, list[Any]]]:
    return [
        (part["kind"], part["depth"], case["gradients"])
        for part in summary["start"]
        for case in part["cases"]
        if case["bn"] == bn and case["init"] == init
    ]


def responses(summary: dict[str, Any]) -> Figure:
    """Standard deviation of the output of every norm after training: He et al. 2015, figure 7."""
    figure, axes = _two_axes(
        "Responses of the trained layers", "standard deviation after the norm",
        "place in the network",
    )  # fmt: skip
    for a, look, line in _trained(axes, summary):
        values = look["responses"]
        places = [i / max(1, len(values) - 1) for i in range(len(values))]
        a.plot(places, values, ".", ms=5, **line)
    _legend(axes[1])
    return figure


def around(summary: dict[str, Any]) -> Figure:
    """The loss along one random direction, normalised filter by filter: Li et al. 2018."""
    figure, axes = _two_axes(
        "The loss around the trained network", "training loss",
        "distance, in lengths of each filter",
    )  # fmt: skip
    for a, look, line in _trained(axes, summary):
        a.plot(look["around"]["distances"], look["around"]["losses"], **line)
    _legend(axes[1])
    return figure


def _trained(axes: Any, summary: dict[str, Any]) -> Iterator[tuple[Any, Any, dict[str, str]]]:
    """For each trained network, shallowest first: its axes, its profiles, and the color and label
    of its line."""
    for color, depth in zip(COLORS, summary["settings"]["depths"], strict=False):
        for look in summary["looks"]:
            if look["depth"] == depth:
                line = {"color": color, "label": f"{depth} layers"}
                yield axes[KINDS.index(look["kind"])], look, line


def deep(summary: dict[str, Any]) -> Figure:
    """Training loss of the deep networks by step."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    figure.suptitle("The first steps of very deep residual networks")
    for color, part in zip(COLORS, summary["deep"], strict=False):
        losses = [math.nan if v is None else v for v in part["losses"]]
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=color, label=f"{part['depth']} layers")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_ylim(bottom=0)
    _style(axes)
    _legend(axes)
    return figure
