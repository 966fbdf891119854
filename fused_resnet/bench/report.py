"""Presents results: rich tables for the terminal, bar charts for files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from fused_resnet.parity.report import ParityReport

# Display names, and colours that colour-blind readers can tell apart (Okabe and Ito's palette).
CONTENDERS = {
    "eager": ("PyTorch eager, NCHW", "#bdbdbd"),
    "eager-channels_last": ("PyTorch eager, channels_last", "#7f7f7f"),
    "compile": ("torch.compile", "#e69f00"),
    "onnxruntime": ("ONNX Runtime", "#009e73"),
    "openvino": ("OpenVINO", "#cc79a7"),
    "fused": ("fused_resnet", "#0072b2"),
    "fused-full": ("fused_resnet, full memory", "#003f66"),
    "fused-low": ("fused_resnet, low memory", "#56b4e9"),
    "fused-lower": ("fused_resnet, lower memory", "#88ccee"),
    "fused-released": ("fused_resnet, packed weights only", "#336688"),
    "fused-minimal": ("fused_resnet, minimal memory", "#bbddee"),
    "fused-graph": ("fused_resnet, CUDA graph", "#56b4e9"),
}
TIMES = "\N{MULTIPLICATION SIGN}"
INK, FAINT = "#222222", "#e3e3e3"
BUSY_CORES = 0.3  # cores used by other programs above which a remark is printed


# --- tables ---------------------------------------------------------------------------------------


def _table(title: str, columns: Sequence[str], *, left: int = 1) -> Table:
    """A table whose first `left` columns are left-aligned (names), the others right-aligned."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table


def parity_table(report: ParityReport, title: str) -> Table:
    """One row per layer; gradients and buffers of a layer are merged into one row each."""
    columns = ("layer", "what", "stock", "fused", "fused, max", "fused/stock", "allowed", "")
    table = _table(title, columns, left=2)
    kind = ""
    for row in report.grouped():
        if kind and row.kind != kind:
            table.add_section()
        kind = row.kind
        table.add_row(
            row.name,
            row.kind,
            f"{row.stock.rms:.2e}",
            f"{row.fused.rms:.2e}",
            f"{row.fused.max_abs:.1e}",
            f"{row.ratio:.2f}",
            f"{row.allowed:.2e}",
            "ok" if row.ok else "BROKEN",
            style=None if row.ok else "bold red",
        )
    return table


def verdict(report: ParityReport) -> str:
    """Two or three lines: agreement of the predicted classes, and whether the rule holds."""
    parts = [
        f"{name} {agreement.top1:.0%} / {agreement.top5:.0%}"
        for name, agreement in report.agreement.items()
    ]
    lines = [f"top-1 / top-5 agreement: {', '.join(parts)}"]
    if report.ok:
        lines.append(f"parity holds: all {len(report.rows)} tensors within the tolerance rule")
    else:
        worst = max(report.failures, key=lambda row: row.fused.rms / (row.allowed or 1e-300))
        lines.append(
            f"PARITY BROKEN: {len(report.failures)} of {len(report.rows)} tensors, the worst is "
            f"{worst.kind} {worst.name}: {worst.fused.rms:.3g}, allowed {worst.allowed:.3g}"
        )
        lines.append(f"reproduce: {report.reproducer}")
    return "\n".join(lines)


def bench_table(results: dict[str, Any]) -> Table:
    """One row per case and contender.

    ms: median, ± half the interquartile range; /eager: time divided by the better eager layout's,
    per round; of limit: share of the best matrix product's FLOP/s; first s: construction and first
    call; MiB: peak memory; saved, live: in training the MiB saved for backward and the peak of
    activations (`memory.activation_peak_bytes`).
    """
    title = f"{device_name(results)}, torch {results['torch']}"
    columns = ("case", "contender", "ms", "±", "images/s", "/eager", "of limit", "first s")
    sizes = {"peak_bytes": "MiB", "saved_bytes": "saved", "activation_peak_bytes": "live"}
    all_rows = [row for case in results["cases"] for row in case["contenders"].values()]
    shown = [key for key in sizes if any(row.get(key) for row in all_rows)]
    table = _table(title, (*columns, *(sizes[key] for key in shown)), left=2)
    for case in results["cases"]:
        label = f"{case['model']} b{case['batch']} {case['dtype']}"
        label += " train" if case["mode"] == "train" else ""
        for name, row in case["contenders"].items():
            cells = [
                f"{row['median_ms']:.2f}",
                f"{row['iqr_ms'] / 2:.2f}",
                f"{row['images_per_s']:.1f}",
                "" if row["ratio_to_eager"] is None else f"{row['ratio_to_eager']:.2f}",
                f"{row['share_of_limit']:.0%}",
                f"{row['construct_s'] + row['first_call_s']:.1f}",
            ]
            cells += [f"{row[key] / 2**20:.0f}" if row.get(key) else "" for key in shown]
            table.add_row(label, name, *cells, style="bold" if name == "fused" else None)
            label = ""
        table.add_section()
    return table


def remarks(results: dict[str, Any]) -> list[str]:
    """Lines below the table: skipped contenders with reasons and cases, and whether the machine was
    busy."""
    load = results.get("other_load_cores") or 0.0
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in results["cases"]:
        for name, reason in case["skipped"].items():
            label = f"{case['model']} b{case['batch']} {case['dtype']} {case['mode']}"
            reasons.setdefault((name, reason), []).append(label)
    lines = [
        f"{CONTENDERS[name][0]} left out: {reason.removeprefix(name + ': ')}"
        + ("" if len(cases) == len(results["cases"]) else f" ({', '.join(cases)})")
        for (name, reason), cases in reasons.items()
    ]
    if load > BUSY_CORES:
        lines.append(
            f"other programs kept {load:.1f} of {results['machine']['cores']} cores busy: absolute "
            f"figures are too low, and small differences are not significant"
        )
    return lines


def tuned_table(winners: dict[Any, Any], title: str) -> Table:
    """One row per convolution: its size as a matrix product, the fastest backend and configuration,
    their time, and the best time of each other backend relative to it."""
    table = _table(title, ("M", "K", "C", "taps", "groups", "fastest", "us", "others"), left=0)
    for p, by_backend in winners.items():
        ranked = sorted(by_backend.values(), key=lambda choice: choice.time_s)
        size = (p.M, p.K, p.C, f"{p.R}x{p.S}", p.groups)
        if not ranked:
            table.add_row(*map(str, size), "none available", "", "")
            continue
        best, *rest = ranked
        others = ", ".join(f"{c.backend} {c.time_s / best.time_s:.2f}" for c in rest)
        table.add_row(
            *map(str, size),
            f"{best.backend} {best.config.label()}",
            f"{best.time_s * 1e6:.1f}",
            others,
        )
    return table


def info_tables(info: dict[str, Any]) -> Iterator[Table]:
    """One table per section of `fused_resnet.info()`."""
    plain = {k: v for k, v in info.items() if not isinstance(v, (dict, list))}
    yield _section("fused_resnet", plain)
    for title, section in info.items():
        if isinstance(section, dict):
            yield _section(title, section)
        elif isinstance(section, list):
            table = _table(title, list(section[0]), left=len(section[0]))
            table.columns[-1].no_wrap = False
            for row in section:
                table.add_row(*("" if v is None else str(v) for v in row.values()))
            yield table


def _section(title: str, values: dict[str, Any]) -> Table:
    table = _table(title, ("", ""), left=2)
    table.show_header = False
    table.columns[1].no_wrap = False
    for key, value in values.items():
        table.add_row(str(key), _one_line(value))
    return table


def _one_line(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{k}: {_one_line(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_one_line(v) for v in value)
    return "-" if value is None else str(value)


# --- plot -----------------------------------------------------------------------------------------


def plot_bench(results: dict[str, Any], path: str | Path, title: str = "") -> Path:
    """Grouped bars of images/s: one panel per model and mode, one group per batch and dtype.

    Bars are labelled with their value, the fused one also with its speed-up over the better eager
    layout. Error bars are the interquartile range.
    """
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((case["model"], case["mode"]) for case in results["cases"]))
    present = {name for case in results["cases"] for name in case["contenders"]}
    names = [name for name in CONTENDERS if name in present]
    groups = max(
        sum((case["model"], case["mode"]) == panel for case in results["cases"]) for panel in panels
    )
    width = max(9.0, 1.2 + 0.52 * groups * (len(names) + 0.8))
    figure = Figure(figsize=(width, 1.3 + 2.7 * len(panels)), dpi=150, facecolor="white")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for ax, panel in zip(axes, panels, strict=True):
        cases = [c for c in results["cases"] if (c["model"], c["mode"]) == panel]
        _draw_panel(ax, panel, cases, names)
    handles, labels = axes[0].get_legend_handles_labels()
    title = title or f"{device_name(results)}: images per second, higher is better"
    height = figure.get_size_inches()[1]
    figure.suptitle(title, x=0.02, y=1 - 0.12 / height, ha="left", fontsize=13, color=INK)
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0.012, 1 - 0.42 / height),
        ncols=len(names) if len(names) <= 5 else 4,  # two rows
        frameon=False,
        fontsize=9.5,
        columnspacing=1.4,
        handlelength=1.0,
    )
    footnote = (
        f"torch {results['torch']}, 224 x 224 pixels. Medians of at least "
        f"{min(case['rounds'] for case in results['cases'])} interleaved rounds.\nError bars: "
        f"interquartile range. {TIMES}: speed-up over the better eager layout, per round. "
        f"{results['date'][:10]}"
    )
    figure.text(0.02, 0.1 / height, footnote, fontsize=8, color="#666666")
    figure.tight_layout(rect=(0, 0.4 / height, 1, 1 - 0.52 / height), h_pad=1.2)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    return path


def processor_name(machine: dict[str, Any]) -> str:
    """The GPU, or the CPU with its instruction set, which names of server CPUs do not show."""
    isa = str(machine.get("isa", "")).replace("AVX512", "AVX-512")
    return machine.get("gpu") or (f"{machine['cpu']} ({isa})" if isa else machine["cpu"])


def device_name(results: dict[str, Any]) -> str:
    """The GPU, or the CPU with the number of threads."""
    machine = results["machine"]
    threads = "" if "gpu" in machine else f", {results['threads']} threads"
    return processor_name(machine) + threads


def _draw_panel(
    ax: Any, panel: tuple[str, str], cases: list[dict[str, Any]], names: Sequence[str]
) -> None:
    bar = 0.84 / len(names)
    top = max(row["images_per_s"] for case in cases for row in case["contenders"].values())
    for index, name in enumerate(names):
        offset = (index - (len(names) - 1) / 2) * bar
        bars = [
            (i + offset, case["contenders"][name])
            for i, case in enumerate(cases)
            if name in case["contenders"]
        ]
        places = [place for place, _ in bars]
        heights = [row["images_per_s"] for _, row in bars]
        spread = [row["images_per_s"] * row["iqr_ms"] / row["median_ms"] / 2 for _, row in bars]
        label, colour = CONTENDERS[name]
        weight = "bold" if name == "fused" else "normal"
        style = {"ha": "center", "va": "bottom", "fontsize": 8, "color": INK, "weight": weight}
        ax.bar(places, heights, bar * 0.92, color=colour, label=label, zorder=2)
        ax.errorbar(places, heights, spread, fmt="none", ecolor=INK, elinewidth=0.8, zorder=3)
        for (place, row), height, error in zip(bars, heights, spread, strict=True):
            value = f"{height:.0f}" if height >= 99.5 else f"{height:.1f}"
            if name == "fused" and row["ratio_to_eager"]:
                value += f"\n{1 / row['ratio_to_eager']:.2f}{TIMES}"
            # Inside the axes, however noisy the machine was.
            end = max(height, min(height + error, top * 1.02))
            ax.text(place, end + top * 0.012, value, **style)
    title = panel[0].replace("resnet", "ResNet-")
    title += ", training step" if panel[1] == "train" else ""
    ax.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK)
    ax.set_xticks(range(len(cases)), [f"batch {c['batch']}, {c['dtype']}" for c in cases])
    ax.set_ylabel("images / s", color=INK)
    ax.set_ylim(0, top * 1.17)
    ax.set_xlim(-0.55, len(cases) - 0.45)
    ax.grid(axis="y", color=FAINT, linewidth=0.8, zorder=0)
    ax.tick_params(axis="both", length=0, labelcolor=INK, labelsize=9.5)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
