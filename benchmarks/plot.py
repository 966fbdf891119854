"""Generate the tables of README.md and benchmarks/RESULTS.md, and a plot for every whole-model
results file, from benchmarks/results/*.json.

    python benchmarks/plot.py            write them
    python benchmarks/plot.py --check    exit 1 if a table is outdated

A table is between `<!-- table:NAME -->` and `<!-- /table -->`. NAME is the first part of the name
of a results file, <bench>-<device>; of several torch versions the latest date is shown.
Tables must not be edited by hand; a cell without a measurement reads "not yet measured".
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from models.bench_resnet import BATCHES, DTYPES, FAMILY_CONTENDERS, MODELS

from fused_resnet.bench.harness import pair_ratio
from fused_resnet.bench.report import device_name, plot_bench, processor_name
from fused_resnet.depth import report as depth_report
from fused_resnet.models.resnet import get_model

HERE = Path(__file__).resolve().parent
PAGES = [HERE.parent / "README.md", HERE / "RESULTS.md"]
MISSING = "not yet measured"
MARKED = re.compile(
    r"(<!-- table:(?P<name>[\w.-]+)(?P<what>:memory|:claims|:costs)? -->\n).*?(<!-- /table -->)",
    re.DOTALL,
)

# Models and contenders of each whole-model table, measured or not.
EXPECTED: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "demo": (("resnet18", "resnet50"), ("eager", "eager-channels_last", "compile", "fused")),
    "peers": (
        ("resnet18", "resnet50"),
        ("eager", "eager-channels_last", "compile", "onnxruntime", "openvino", "fused"),
    ),
    "resnet": (MODELS, FAMILY_CONTENDERS),
    "avx2": (("resnet18", "resnet50"), ("eager", "eager-channels_last", "compile", "fused")),
}


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """{NAME: content} of the latest file of each name; whole-model and pytest-benchmark files."""
    latest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        name = re.sub(r"-torch[^-]*$", "", path.stem)
        content = {"path": path, **json.loads(path.read_text())}
        if name not in latest or date(content) >= date(latest[name]):
            latest[name] = content
    return latest


def date(content: dict[str, Any]) -> str:
    return content.get("date") or content.get("datetime") or ""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first column is left-aligned, the others right-aligned."""
    lines = [" | ".join(header), " | ".join([":--", *["--:"] * (len(header) - 1)])]
    lines += [" | ".join(row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def make_table(name: str, content: dict[str, Any] | None) -> str:
    """The markdown of table NAME from its results; without results every cell is missing."""
    if content is not None and content.get("bench") == "depth":
        return depth_text(content, depth_report.error_table)
    if content is not None and "accuracy" in content:
        return accuracy_table(content)
    if content is not None and "memory" in content:
        return resident_table(content)
    if content is not None and "fuse" in content:
        return fuse_table(content)
    if content is not None and "busy" in content:
        return busy_table(content)
    if content is not None and "regions" in content:
        return threads_table(content)
    if content is not None and "compiled" in content:
        return compile_table(content)
    if content is not None and "steps" in content:
        return depth_steps_table(content)
    if content is not None and "benchmarks" in content:
        return op_table(content)
    if content is not None and "kernels" in content:
        cuda = "files" in content
        return cuda_resources_table(content) if cuda else resources_table(content)
    if content is not None and "layers" in content:
        return cost_table(content)
    if content is not None and "cases" not in content:
        return parity_table(content)
    bench = name.rsplit("-", 1)[0]
    if content is None and bench not in EXPECTED:
        return f"{MISSING}\n"
    return model_table(bench, content)


def depth_text(content: dict[str, Any] | None, section: Callable[[dict[str, Any]], str]) -> str:
    """A section of the report of `fused-resnet depth`."""
    if content is None:
        return f"{MISSING}\n"
    return (
        f"{section(content)}\n\n{depth_report.settings(content)} "
        f"{processor_name(content['machine'])}, torch {content['torch']}, {commit(content)}. "
        f"From `{content['path'].name}`.\n"
    )


def accuracy_table(content: dict[str, Any]) -> str:
    """accuracy.py: test accuracy by seed."""
    accuracy = content["accuracy"]
    seeds = [f"seed {i}" for i in range(len(accuracy["stock"]))]
    rows = [
        [kind, *(f"{a:.2%}" for a in accuracy[kind]), f"{statistics.fmean(accuracy[kind]):.2%}"]
        for kind in ("stock", "fused")
    ]
    text = (
        f"{accuracy['model']} on scikit-learn's digits, {accuracy['epochs']} epochs; torch "
        f"{content['torch']}, {commit(content)}. From `{content['path'].name}`."
    )
    return f"{markdown(['test accuracy', *seeds, 'mean'], rows)}\n\n{text}\n"


def resident_table(content: dict[str, Any]) -> str:
    """bench_memory.py: resident MiB of each contender, and the ratio to eager's."""
    found = content["memory"]
    rows = []
    for case in found["cases"]:
        contenders = case["contenders"]
        for key, what in (
            ("peak_bytes", "peak of the calls"),
            ("resting_bytes", "after them"),
            ("loading_bytes", "peak of loading"),
        ):
            sizes = {n: statistics.median(c[key]) / 2**20 for n, c in contenders.items()}
            ratio = sizes["fused-released"] / sizes["eager"]
            label = f"batch {case['batch']}, {case['dtype']}, {what}"
            rows.append([label, *(f"{size:.0f}" for size in sizes.values()), f"{ratio:.2f}"])
    repeats = len(next(iter(found["cases"][0]["contenders"].values()))["peak_bytes"])
    text = (
        f"{found['model']}, {found['calls']} calls, above what was resident before the model was "
        f"built: medians of {repeats} processes each. {processor_name(content['machine'])}, "
        f"{content['threads']} threads, torch {content['torch']}, {commit(content)}. "
        f"From `{content['path'].name}`."
    )
    header = ["MiB", *found["cases"][0]["contenders"], "fused-released over eager"]
    return f"{markdown(header, rows)}\n\n{text}\n"


def fuse_table(content: dict[str, Any]) -> str:
    """bench_fuse.py: a call or step of a fused model, against the better layout of stock."""
    rows = []
    for case in content["fuse"]:
        times = case["times_ms"]
        medians = {name: statistics.median(found) for name, found in times.items()}
        better = min(("contiguous", "channels_last"), key=medians.__getitem__)
        ratio, spread = pair_ratio(times["fused"], times[better])
        row = [case["name"], case["dtype"], "training step" if case["mode"] == "train" else "call"]
        row += [f"{medians[name]:.0f}" for name in ("contiguous", "channels_last", "fused")]
        row.append(f"{ratio:.2f} ± {spread / 2:.2f}")
        if "fused_resnet" in times:
            row[-1] += f" ({pair_ratio(times['fused'], times['fused_resnet'])[0]:.2f} of our own)"
        rows.append(row)
    header = ["batch 4 at 160 x 160 (detectors: one image of 320 x 320)", "dtype", "what",
              "stock, ms", "channels_last, ms", "fused, ms", "fused over the better"]  # fmt: skip
    text = (
        f"{processor_name(content['machine'])}, {content['threads']} threads, torch "
        f"{content['torch']}, {commit(content)}: medians of "
        f"{len(content['fuse'][0]['times_ms']['fused'])} turns. From `{content['path'].name}`."
    )
    return f"{markdown(header, rows)}\n\n{text}\n"


def busy_table(content: dict[str, Any]) -> str:
    """bench_busy.py: ms per image of each contender beside other work, and fused over it."""
    names = list(dict.fromkeys(n for case in content["busy"] for n in case["ms_per_image"]))
    names = [n for n in names if n != "fused"]
    rows = []
    for case in content["busy"]:
        times = case["ms_per_image"]
        row = [f"{case['model']}, batch {case['batch']}, {case['dtype']}, {case['condition']}"]
        row.append(f"{statistics.median(times['fused']):.1f}")
        for name in names:
            if name not in times:
                row.append("-")
                continue
            ratio, spread = pair_ratio(times["fused"], times[name])
            row.append(f"{statistics.median(times[name]):.1f} ({ratio:.2f} ± {spread / 2:.2f})")
        rows.append(row)
    turns = len(content["busy"][0]["ms_per_image"]["fused"])
    text = (
        f"{processor_name(content['machine'])}, {content['threads']} threads, torch "
        f"{content['torch']}, {commit(content)}: medians of {turns} turns. From "
        f"`{content['path'].name}`."
    )
    header = ["ms per image", "fused", *(f"{name} (fused over it)" for name in names)]
    return f"{markdown(header, rows)}\n\n{text}\n"


def threads_table(content: dict[str, Any]) -> str:
    """bench_threads.py: ms per call on each pool of threads, and the ratio to our own."""
    pools = content["pools"]
    rows = []
    for case in content["regions"]:
        ours = case["ms"]["ours"]
        row = [f"{case['work']}, {case['condition']}", f"{statistics.median(ours):.3g}"]
        for name in pools:
            times = case["ms"].get(name)
            if times is None:
                row.append("not installed")
                continue
            ratio, spread = pair_ratio(times, ours)
            row.append(f"{statistics.median(times):.3g} ({ratio:.2f} ± {spread / 2:.2f})")
        rows.append(row)
    forks = content["after a fork"]
    answers = {True: "computes", False: "hangs", None: "not installed"}
    rows.append(["in a forked process", *(answers[forks.get(name)] for name in ("ours", *pools))])
    header = ["ms per call", "ours", *(f"{name} {pools[name] or ''}" for name in pools)]
    turns = sorted({len(case["ms"]["ours"]) for case in content["regions"]})
    text = (
        f"{processor_name(content['machine'])}, {content['threads']} threads, torch "
        f"{content['torch']}, {commit(content)}: medians of {turns[0]} to {turns[-1]} turns, in "
        f"brackets the ratio to ours. From `{content['path'].name}`."
    )
    return f"{markdown(header, rows)}\n\n{text}\n"


def compile_table(content: dict[str, Any]) -> str:
    """bench_compile.py: compiled calls, against the uncompiled model of this package."""
    names = ("compile", "backend", "package", "inductor")
    rows = []
    for case in content["compiled"]:
        times = case["times_ms"]
        row = [f"{case['name']}, batch {case['batch']}, {case['dtype']}"]
        row.append(f"{statistics.median(times['fused']):.1f}")
        for name in names:
            ratio, spread = pair_ratio(times[name], times["fused"]) if name in times else (0, 0)
            row.append(f"{ratio:.2f} ± {spread / 2:.2f}" if ratio else MISSING)
        ratio, spread = pair_ratio(times["backend"], times["inductor"])
        row.append(f"{ratio:.2f} ± {spread / 2:.2f}")
        beside = "package, beside c++"
        ratio, spread = pair_ratio(times["c++"], times[beside]) if beside in times else (0, 0)
        row.append(f"{ratio:.2f} ± {spread / 2:.2f}" if ratio else MISSING)
        rows.append([*row, f"{case['first_call_s']:.1f}"])
    header = ["224 x 224", "fused, ms", "torch.compile(ours), over fused", "backend, over fused",
              "package, over fused", "Inductor, over fused", "backend over Inductor",
              "package in C++ over Python", "backend's first call, s"]  # fmt: skip
    text = (
        f"{processor_name(content['machine'])}, {content['threads']} threads, torch "
        f"{content['torch']}, {commit(content)}: medians of "
        f"{len(content['compiled'][0]['times_ms']['fused'])} turns. From `{content['path'].name}`."
    )
    return f"{markdown(header, rows)}\n\n{text}\n"


def depth_steps_table(content: dict[str, Any]) -> str:
    """bench_depth.py: a training step of each contender, against the faster eager layout."""
    names = list(content["steps"][0]["contenders"])
    rows = []
    for case in content["steps"]:
        contenders = case["contenders"]
        medians = {n: statistics.median(contenders[n]["times_ms"]) for n in names}
        eager = min((n for n in names if n.startswith("eager")), key=medians.__getitem__)
        ratio, spread = pair_ratio(contenders["fused"]["times_ms"], contenders[eager]["times_ms"])
        saved = contenders["fused-minimal"]["saved_bytes"] / contenders[eager]["saved_bytes"]
        rows.append([
            f"{case['depth']} layers, batch {case['batch']}, {case['size']} x {case['size']}",
            *(f"{medians[n]:.1f}" for n in names), f"{ratio:.2f} ± {spread / 2:.2f}",
            f"{medians['fused'] / case['depth']:.3f}", f"{saved:.3f}",
        ])  # fmt: skip
    header = ["training step, ms", *names, "fused over better eager", "fused, ms per layer",
              "bytes saved, minimal over eager"]  # fmt: skip
    rounds = len(content["steps"][0]["contenders"]["fused"]["times_ms"])
    text = (
        f"{device_name(content)}, torch {content['torch']}, {commit(content)}: "
        f"medians of {rounds} interleaved rounds, each contender in a separate "
        f"process. From `{content['path'].name}`."
    )
    return f"{markdown(header, rows)}\n\n{text}\n"


def model_table(bench: str, content: dict[str, Any] | None) -> str:
    """images/s of every contender, one row per model, batch and dtype."""
    cases = content["cases"] if content else []
    by_key = {(c["model"], c["batch"], c["dtype"], c["mode"]): c for c in cases}
    models, contenders = EXPECTED.get(bench, ((), ()))
    grid = [(m, batch, dtype, "infer") for m in models for batch in BATCHES for dtype in DTYPES]
    keys = list(dict.fromkeys([*grid, *by_key]))
    measured = {name for case in cases for name in case["contenders"]}
    names = list(dict.fromkeys([*contenders, *(n for c in cases for n in c["contenders"])]))
    names = [n for n in names if n != "fused"] + ["fused"]
    header = ["images/s", *names, "fused over better eager"]
    if "compile" in measured:
        header.append("fused over compile")
    rows = [model_row(key, by_key.get(key), names, "compile" in measured) for key in keys]
    return f"{markdown(header, rows)}\n\n{caption(content)}\n"


def memory_table(name: str, content: dict[str, Any] | None) -> str:
    """Peak memory of every contender in MiB, one row per model, batch and dtype."""
    if content is None:
        return f"{MISSING}\n"
    if content["cases"][0]["mode"] == "train":
        return train_memory_table(content)
    names = list(dict.fromkeys(n for case in content["cases"] for n in case["contenders"]))
    rows = []
    for case in content["cases"]:
        dtype = getattr(torch, case["dtype"])
        with torch.device("meta"):
            weights = sum(p.numel() for p in get_model(case["model"]).parameters())
        peaks = [case["contenders"].get(n, {}).get("peak_bytes") for n in names]
        rows.append(
            [
                f"{case['model']}, batch {case['batch']}, {case['dtype']}",
                f"{weights * dtype.itemsize / 2**20:.0f}",
                *(
                    missing(case, n) if p is None else f"{p / 2**20:.0f}"
                    for n, p in zip(names, peaks, strict=True)
                ),
            ]
        )
    return f"{markdown(['MiB', 'weights', *names], rows)}\n"


def train_memory_table(content: dict[str, Any]) -> str:
    """Per contender: bytes that a training step saves for backward, peak live bytes, and time."""
    header = [
        "MiB", "saved for backward", "over eager", "peak live", "over eager", "time over full",
    ]  # fmt: skip
    rows = []
    for case in content["cases"]:
        contenders = case["contenders"]
        eager, full = contenders[case["better_eager"]], contenders["fused-full"]
        for name in (case["better_eager"], *(n for n in contenders if n.startswith("fused"))):
            row = contenders[name]
            pairs = [t / f for t, f in zip(row["times_ms"], full["times_ms"], strict=True)]
            rows.append(
                [
                    f"{case['model']}, batch {case['batch']}, {case['dtype']}: {name}",
                    f"{row['saved_bytes'] / 2**20:.0f}",
                    f"{row['saved_bytes'] / eager['saved_bytes']:.3f}",
                    f"{row['activation_peak_bytes'] / 2**20:.0f}",
                    f"{row['activation_peak_bytes'] / eager['activation_peak_bytes']:.3f}",
                    f"{statistics.median(pairs):.2f}",
                ]
            )
    return f"{markdown(header, rows)}\n\nFrom `{content['path'].name}`.\n"


def parity_table(content: dict[str, Any]) -> str:
    """One row per report of `fused-resnet parity --json`: the output, and the worst tensor."""
    header = [
        "relative rms error against float64",
        "output, stock",
        "output, fused",
        "same top-1 as stock",
        "worst tensor, fused over stock",
        "within tolerance",
    ]
    rows = []
    for report in content["parity"]:
        output = next(row for row in report["rows"] if row["kind"] == "output")
        worst = max(report["rows"], key=lambda row: row["ratio"])
        passed = sum(row["ok"] for row in report["rows"])
        rows.append(
            [
                f"{report['model']}, {report['dtype']}"
                + (", training" if report["training"] else ""),
                f"{output['stock']['rms']:.2e}",
                f"{output['fused']['rms']:.2e}",
                f"{report['agreement']['fused with stock']['top1']:.0%}",
                f"{worst['ratio']:.2f} ({worst['name']})",
                f"{passed} of {len(report['rows'])}",
            ]
        )
    where = processor_name(content["machine"])
    images = content["parity"][0]["input_shape"][0]
    command = "fused-resnet parity --model resnet18,resnet50 --dtype float32,bfloat16,float16"
    return (
        f"{markdown(header, rows)}\n\n{where}, torch {content['torch']}, {images} photographs, "
        f"{commit(content)}. "
        f"From `{content['path'].name}`, generated by `{command} --json FILE`.\n"
    )


def resources_table(content: dict[str, Any]) -> str:
    """One row per Triton kernel and architecture: min and max over its tiles and dtypes."""
    header = [
        "kernel", "sm", "compiled", "registers", "spill instructions", "shared KiB, limit",
        "tensor core instructions, 16-bit", "16-byte loads", "16-byte stores",
    ]  # fmt: skip
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in content["kernels"]:
        groups.setdefault((row["kernel"].removesuffix("_kernel"), row["arch"]), []).append(row)
    rows = []
    for (kernel, arch), variants in sorted(groups.items()):
        found = [row["found"] for row in variants]
        narrow = [
            row["found"]
            for row in variants
            if row["dtype"] != "float32" and row["variant"] != "sizes of one"
        ]
        most = max(f["shared_bytes"] for f in found)
        cells = (
            str(arch),
            str(len(found)),
            span(found, "registers"),
            span(found, "spills"),
            f"{-(-most // 1024)}, {content['shared_bytes'][str(arch)] // 1024}",
            span(narrow, "tensor"),
            span(found, "loads16"),
            span(found, "stores16"),
        )
        rows.append([kernel, *cells])
    text = f"Triton {content['triton']}, {commit(content)}. From `{content['path'].name}`."
    return f"{markdown(header, rows)}\n\n{text}\n"


def cuda_resources_table(content: dict[str, Any]) -> str:
    """One row per CUDA kernel and architecture: min and max over its tiles and dtypes."""
    header = [
        "kernel", "sm", "instances", "registers", "stack bytes", "tensor core instructions",
        "ldmatrix", "asynchronous copies", "16-byte loads", "16-byte stores",
    ]  # fmt: skip
    keys = ("registers", "stack_bytes", "tensor", "ldmatrix", "async", "ld16", "st16")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in content["kernels"]:
        groups.setdefault((row["name"].split("<")[0], row["arch"]), []).append(row)
    rows = []
    for (kernel, arch), found in sorted(groups.items()):
        if max(row["instructions"] for row in found) > 32:  # else a stub that only traps
            cells = (span(found, key) for key in keys)
            rows.append([kernel.removesuffix("_kernel"), arch, str(len(found)), *cells])
    slowest = max(content["files"], key=lambda f: f["compile_s"])
    text = (
        f"nvcc {content['nvcc']}, {commit(content)}; {len(content['files'])} compilations by "
        f"{content['jobs']} jobs in {content['total_s']:.0f} s, the longest {slowest['file']} in "
        f"{slowest['compile_s']:.0f} s. From `{content['path'].name}`."
    )
    return f"{markdown(header, rows)}\n\n{text}\n"


def span(found: Sequence[dict[str, int]], key: str) -> str:
    values = [f[key] for f in found]
    if not values:
        return "-"
    return str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def commit(content: dict[str, Any]) -> str:
    return f"commit {content['commit'] or 'unknown'}, {content['date'][:10]}"


def cost_table(content: dict[str, Any]) -> str:
    """The predicted cost of each layer, not measured."""
    layers = content["layers"]
    rows = [[str(row["layer"]), *(number(v) for v in list(row.values())[1:])] for row in layers]
    gpu = content["gpu"]
    text = (
        f"Predicted, not measured: for {gpu['flops'] / 1e12:.0f} TFLOP/s, "
        f"{gpu['bytes_per_s'] / 1e12:.1f} TB/s and {gpu['multiprocessors']} multiprocessors, "
        f"{commit(content)}. From `{content['path'].name}`."
    )
    return f"{markdown(list(layers[0]), rows)}\n\n{text}\n"


def model_row(
    key: tuple[str, int, str, str],
    case: dict[str, Any] | None,
    names: Sequence[str],
    compiled: bool,
) -> list[str]:
    model, batch, dtype, mode = key
    label = f"{model}, batch {batch}, {dtype}" + (", training" if mode == "train" else "")
    contenders = case["contenders"] if case else {}
    cells = [
        f"{contenders[n]['images_per_s']:.1f}" if n in contenders else missing(case, n)
        for n in names
    ]
    eager = case["better_eager"] if case else None
    cells.append(speedup(contenders, "fused", eager))
    if compiled:
        cells.append(speedup(contenders, "fused", "compile"))
    return [label, *cells]


def missing(case: dict[str, Any] | None, name: str) -> str:
    """Text of an empty cell: the contender does not support the case, or it was not measured."""
    reason = case["skipped"].get(name, "") if case else ""
    return "-" if "has no " in reason or " only" in reason else MISSING


def speedup(contenders: dict[str, Any], name: str, other: str | None) -> str:
    """Median over the rounds of other's time / name's time, with half its interquartile range."""
    if name not in contenders or other not in contenders:
        return MISSING
    ratio, spread = pair_ratio(contenders[other]["times_ms"], contenders[name]["times_ms"])
    return f"{ratio:.2f} ± {spread / 2:.2f}"


def caption(content: dict[str, Any] | None) -> str:
    if content is None:
        return f"Whole-model benchmark: {MISSING}."
    limits = ", ".join(
        f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in content["limits"]["flops"].items()
    )
    rounds = [case["rounds"] for case in content["cases"]]
    return (
        f"{device_name(content)}, torch {content['torch']}, {commit(content)}: "
        f"medians of {min(rounds)} to {max(rounds)} interleaved rounds, speedups "
        f"per round with half their interquartile range. "
        f"Best matrix product in the same run: {limits}; "
        f"copy {content['limits']['copy_bytes_per_s'] / 1e9:.0f} GB/s. "
        f"From `{content['path'].name}`."
    )


def op_table(content: dict[str, Any]) -> str:
    """A pytest-benchmark file: median and spread of each benchmark, and its extra figures."""
    benchmarks = content["benchmarks"]
    extras = list(dict.fromkeys(k for b in benchmarks for k in b.get("extra_info", {})))
    rows = [
        [
            b["name"],
            f"{b['stats']['median'] * 1e3:.3f}",
            f"{b['stats']['iqr'] * 1e3 / 2:.3f}",
            *(number(b.get("extra_info", {}).get(key)) for key in extras),
        ]
        for b in benchmarks
    ]
    machine = content.get("machine_info", {}).get("cpu", {}).get("brand_raw", "")
    text = f"{machine or 'machine unknown'}, {date(content)[:10]}. From `{content['path'].name}`."
    return f"{markdown(['benchmark', 'median ms', '±', *extras], rows)}\n\n{text}\n"


def number(value: Any) -> str:
    if value is None:
        return MISSING
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def fill_page(text: str, results: dict[str, dict[str, Any]]) -> str:
    """`text` with every marked table regenerated."""

    def table(match: re.Match[str]) -> str:
        name, content = match["name"], results.get(match["name"])
        if match["what"] in (":claims", ":costs"):
            claims = match["what"] == ":claims"
            section = depth_report.claim_list if claims else depth_report.cost_table
            return f"{match[1]}{depth_text(content, section)}{match[4]}"
        make = memory_table if match["what"] else make_table
        return f"{match[1]}{make(name, content)}{match[4]}"

    return MARKED.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and plots from results files.")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if outdated")
    args = parser.parse_args()
    results = read_results(args.results)
    outdated = []
    for page in args.pages:
        before = page.read_text()
        after = fill_page(before, results)
        print(f"{page}: {len(MARKED.findall(after))} tables")
        if before != after:
            outdated.append(str(page))
            if not args.check:
                page.write_text(after)
    if args.check:
        sys.exit(f"not up to date: {', '.join(outdated)}; run make tables" if outdated else 0)
    for content in results.values():
        if any("contenders" in case for case in content.get("cases", ())):
            print(plot_bench(content, content["path"].with_suffix(".png")))
        elif content.get("bench") == "depth":
            for name in ("curves", "gradients"):
                print(depth_report.plot_one(content, name, content["path"].with_suffix("")))


if __name__ == "__main__":
    main()
