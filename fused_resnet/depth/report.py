"""The report of a depth experiment: JSON summary, claims in words, tables, plots."""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .setting import KINDS, Config

VANISHED, EXPLODED = 1e-3, 1e3  # first layers' gradient / that of the shallowest network
_WORSE = 0.01  # smallest error difference that counts


def summarise(config: Config, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of the report; `claims` are its statements."""
    runs = [part for name, part in parts.items() if name.startswith("train-")]
    paths = ("root", "out")  # specific to this machine, not reported
    summary: dict[str, Any] = {
        "settings": {k: v for k, v in dataclasses.asdict(config).items() if k not in paths},
        "errors": [_errors(runs, kind, depth) for depth in config.depths for kind in KINDS],
        "curves": [
            {k: run[k] for k in ("kind", "depth", "seed", "train_error", "test_error", "diverged")}
            for run in runs
        ],
        "looks": [
            {k: run[k] for k in ("kind", "depth", "gradients", "responses", "around")}
            for run in runs
            if "gradients" in run
        ],
        "start": [part for name, part in parts.items() if name.startswith("start-")],
        "deep": [part for name, part in parts.items() if name.startswith("deep-")],
        "seconds": sum(part["seconds"] for part in parts.values()),
    }
    summary["flow"] = _flows(summary)
    summary["claims"] = claims(summary)
    return summary


def _errors(runs: list[dict[str, Any]], kind: str, depth: int) -> dict[str, Any]:
    """Final errors over all seeds: mean, min, max; None if every seed diverged."""
    selected = [r for r in runs if r["kind"] == kind and r["depth"] == depth]
    row: dict[str, Any] = {
        "kind": kind, "depth": depth, "seeds": len(selected),
        "diverged": {str(r["seed"]): r["diverged"] for r in selected if r["diverged"] is not None},
    }  # fmt: skip
    for key in ("train_error", "test_error"):
        values = [r[key][-1] for r in selected if r["diverged"] is None]
        row[key] = None
        if values:
            row[key] = {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}
    return row


def flow(gradients: Sequence[float | None]) -> dict[str, Any]:
    """Gradient norms of the first and the last layers.

    gradients: norms by layer, from the first layer to the classifier. early, late: geometric means
    over the first and the last three convolutions, None if one of them is zero or non-finite.
    """
    convolutions = gradients[:-1]
    few = min(3, len(convolutions) // 2)
    return {
        "early": _geometric_mean(convolutions[:few]),
        "late": _geometric_mean(convolutions[-few:]),
        "finite": all(g is not None for g in gradients),
        "zero_layers": sum(g == 0 for g in gradients),
    }


def _geometric_mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None and v > 0]
    return statistics.geometric_mean(known) if len(known) == len(values) else None


def _flows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for part in summary["start"]:
        for case in part["cases"]:
            rows.append({
                "kind": part["kind"], "depth": part["depth"], "when": "start", "bn": case["bn"],
                "init": case["init"], **flow(case["gradients"]),
            })  # fmt: skip
    rows += [
        {"kind": look["kind"], "depth": look["depth"], "when": "trained", "bn": True, "init": "he",
         **flow(look["gradients"])}
        for look in summary["looks"]
    ]  # fmt: skip
    return rows


# --- in words -------------------------------------------------------------------------------------


def claims(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The claims of residual learning and what was measured: {claim, shown, words}."""
    return [*_degradation(summary), *_gradient_claims(summary), *_deep_claims(summary)]


def _degradation(summary: dict[str, Any]) -> list[dict[str, Any]]:
    rows = {(r["kind"], r["depth"]): r for r in summary["errors"]}
    depths = sorted({depth for _, depth in rows})
    entries = []
    for kind in KINDS:
        by_depth = [rows[kind, d] for d in depths]
        known = [r for r in by_depth if r["train_error"] is not None]
        if len(known) < 2:
            continue
        first, *rest = known
        worse = [r for r in rest if _mean(r) > _mean(first) + _WORSE]
        listed = ", ".join(f"{_percent(_mean(r))} at {r['depth']}" for r in known)
        if kind == "plain":
            claim, shown = "plain networks degrade with depth", len(worse) == len(rest)
        else:
            # The test error must not exceed that of the worst seed of the shallowest network.
            limit = first["test_error"]["max"]
            held = all(r["test_error"]["mean"] <= limit for r in rest)
            claim, shown = "residual networks do not degrade with depth", not worse and held
        words = f"Training error of {kind} networks: {listed}."
        if kind == "residual":
            tests = ", ".join(f"{_percent(r['test_error']['mean'])} at {r['depth']}" for r in known)
            words += f" Test error: {tests}."
        if any(r["diverged"] for r in by_depth):
            words += " Diverged: " + ", ".join(
                f"{r['depth']} layers in step {step}"
                for r in by_depth
                for step in r["diverged"].values()
            )
        entries.append({"claim": claim, "shown": shown, "words": words})
    return entries


def _gradient_claims(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """For each condition: whether gradients vanish or explode towards the first layers."""
    entries = []
    conditions = [(True, "he"), (True, "default"), (False, "he"), (False, "default")]
    for bn, init in conditions:
        with_norms = "with" if bn else "without"
        init_name = "He" if init == "he" else "PyTorch's default"
        words = []
        states: dict[str, str] = {}
        for kind in KINDS:
            rows = [
                r for r in summary["flow"]
                if (r["kind"], r["when"], r["bn"], r["init"]) == (kind, "start", bn, init)
            ]  # fmt: skip
            if not rows:
                continue
            rows.sort(key=lambda r: r["depth"])
            states[kind] = _state(rows[-1], rows[0])
            listed = ", ".join(f"{_size(r)} at {r['depth']}" for r in rows)
            words.append(f"{kind}: {states[kind]} (first layers' gradient {listed})")
        if len(states) == len(KINDS):
            entries.append({
                "claim": f"before training, {with_norms} batch norm, {init_name} initialisation: "
                         "shortcuts keep gradients from vanishing or exploding",
                "shown": states["plain"] != "kept" and states["residual"] == "kept",
                "words": "; ".join(words) + ".",
            })  # fmt: skip
    return entries


def _state(row: dict[str, Any], shallowest: dict[str, Any]) -> str:
    """How the first layers' gradient compares with that of the shallowest network."""
    if not row["finite"]:
        return "exploding beyond float32"
    if row["early"] is None or shallowest["early"] is None:
        return "vanished to zero"
    factor = row["early"] / shallowest["early"]
    return "vanishing" if factor < VANISHED else "exploding" if factor > EXPLODED else "kept"


def _deep_claims(summary: dict[str, Any]) -> list[dict[str, Any]]:
    entries = []
    for part in summary["deep"]:
        after = part["gradients_after"]
        finite = after is not None and all(g is not None and g > 0 for g in after)
        losses = part["losses"]
        falls = None not in losses[-5:] and losses[-1] < losses[0]
        falls = falls and statistics.median(losses[-5:]) < statistics.median(losses[:5])
        words = f"{part['steps']} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}" if falls else (
            f"diverged in step {part['diverged']}" if part["diverged"] else "the loss did not fall"
        )  # fmt: skip
        words += "; every layer's gradient is finite and not zero." if finite else "."
        entries.append({
            "claim": f"a residual network of {part['depth']} layers trains",
            "shown": falls and finite, "words": words,
        })  # fmt: skip
    return entries


def _mean(row: dict[str, Any]) -> float:
    return float(row["train_error"]["mean"])


def _percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def _size(row: dict[str, Any]) -> str:
    return "0 or non-finite" if row["early"] is None else f"{row['early']:.2g}"


# --- as a page ------------------------------------------------------------------------------------


def markdown(summary: dict[str, Any]) -> str:
    """The report as Markdown: table, claims, costs, plots."""
    sections = ["# Depth: plain and residual networks", settings(summary), error_table(summary)]
    sections += ["## What it shows", claim_list(summary)]
    if summary["deep"]:
        sections += ["## What a step costs", cost_table(summary)]
    sections += [f"![{name}]({name}.png)" for name in plot_names(summary)]
    return "\n\n".join(sections) + "\n"


def settings(summary: dict[str, Any]) -> str:
    c = summary["settings"]
    init = "initialized to their shortcuts" if c["zero_init_residual"] else "not zero-initialized"
    return (
        f"{c['data']}, {c['block']} blocks, {c['epochs']} epochs, batch {c['batch']}, "
        f"{c['seeds']} seeds: mean (smallest to largest). Residual blocks are {init}."
    )


def error_table(summary: dict[str, Any]) -> str:
    """Final errors of every kind and depth."""
    lines = ["| layers | | training error | test error |", "|--:|:--|--:|--:|"]
    for r in summary["errors"]:
        cells = [_cell(r[key], r["diverged"]) for key in ("train_error", "test_error")]
        lines.append(f"| {r['depth']} | {r['kind']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claim_list(summary: dict[str, Any]) -> str:
    return "\n".join(
        f"- **{'Shown' if c['shown'] else 'Not shown'}**: {c['claim']}. {c['words']}"
        for c in summary["claims"]
    )


def cost_table(summary: dict[str, Any]) -> str:
    """Costs of one step of the deep networks by activation memory level."""
    lines = [
        "| layers | | step, ms | ms per layer | over 20 layers | saved, MiB | peak, MiB |",
        "|--:|:--|--:|--:|--:|--:|--:|",
    ]
    for part in summary["deep"]:
        for row in part["costs"]:
            if "needed_bytes" in row:
                needed = f"not measured: would need {row['needed_bytes'] / 2**30:.1f} GiB"
                lines.append(f"| {part['depth']} | {row['level']} | {needed} | | | | |")
                continue
            share = row["layer_ms"] / row["shallow_layer_ms"]
            lines.append(
                f"| {part['depth']} | {row['level']} | {row['step_ms']:.0f} "
                f"| {row['layer_ms']:.3f} | {share:.2f} | {row['saved_bytes'] / 2**20:.1f} "
                f"| {row['peak_bytes'] / 2**20:.1f} |"
            )
    return "\n".join(lines)


def _cell(value: dict[str, float] | None, diverged: dict[str, int]) -> str:
    steps = ", ".join(f"seed {seed} in step {step}" for seed, step in diverged.items())
    suffix = f" (diverged: {steps})" if steps else ""
    if value is None:
        return f"diverged{suffix}"
    spread = f"({_percent(value['min'])} to {_percent(value['max'])})"
    return f"{_percent(value['mean'])} {spread}{suffix}"


def plot_names(summary: dict[str, Any]) -> list[str]:
    """The names of the plots that `plot_one` can draw for this summary."""
    deep = ["deep"] if summary["deep"] else []
    return ["curves", "degradation", "gradients", "responses", "around", *deep]


def plot(summary: dict[str, Any], folder: Path) -> list[str]:
    """Write the plots as PNG files to `folder`; return their names, [] without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    return [plot_one(summary, name, folder).name for name in plot_names(summary)]


def plot_one(summary: dict[str, Any], name: str, prefix: Path) -> Path:
    """Write one of `plot_names` to PREFIX/NAME.png if prefix is a folder, else PREFIX-NAME.png."""
    from . import plots

    figure = getattr(plots, name)(summary)
    file = prefix / f"{name}.png" if prefix.is_dir() else Path(f"{prefix}-{name}.png")
    figure.savefig(file, dpi=120)
    return file
