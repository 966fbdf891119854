"""Benchmark of the ops on a GPU at a network's shapes, against contenders and machine limits.

    python benchmarks/kernels/cuda/bench_gpu_ops.py --out DIR [--batch 256] [--dtype bfloat16]
        [--tiles] [--op conv_bn_relu add_relu] [--contender fused native unfused] [--only TEXT]

Ops and contenders are those of gpu_cases.py. Before timing, the results of a contender are compared
with float64 by the tolerance rule; one that fails, is wrong or unavailable is noted in the table.
The contenders of a case are interleaved. Times are medians of CUDA events, with caches flushed
before each call.

The limits are measured in the same run: a large matrix product for operations, a large copy for
bytes. `share` is max(operations / product rate, bytes / copy rate) / time, `of copy` is the byte
rate / copy rate. Results are written after every case. --once calls each contender once without
timing, for a profiler. On a device without CUDA (`--device cpu --size 32 --batch 2`) it only shows
that the script works.

Exit status: 1 if a contender failed or was wrong, 3 if a kernel corrupted the CUDA context and the
remaining cases could not be measured.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_cases
import torch
from gpu_contenders import Absent, Case, Exact, Prepared
from torch import Tensor

from fused_resnet.bench.harness import pair_ratio, save
from fused_resnet.bench.machine import provenance, use_device
from fused_resnet.tolerance import TOLERANCE, assert_close, measure_error

FLUSH_BYTES = 256 * 2**20  # more than any last-level cache
SLEEP_CYCLES = 2_000_000  # about 1 ms, so that kernels are queued before the first one starts
OPS = (
    "conv_bn_relu", "conv_bn_train", "norm_conv_train", "bn_add_relu", "add_relu", "conv_backward",
    "conv_norm_backward",
)  # fmt: skip
CONTENDERS = ("fused", "native", "apart", "triton", "cudnn", "unfused", "compile")


class Clock:
    """Time calls on one device, with its caches flushed before each."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        size = FLUSH_BYTES if self.cuda else 1
        self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def seconds(self, call: Callable[[], Any]) -> float:
        self.flush.zero_()
        if not self.cuda:
            begin_s = time.perf_counter()
            call()
            return time.perf_counter() - begin_s
        torch.cuda._sleep(SLEEP_CYCLES)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


class Limits:
    """Best rates so far: operations/s of a large matrix product, bytes/s of a large copy."""

    def __init__(self, clock: Clock, like: Tensor) -> None:
        self.clock, self.like = clock, like
        self.flops = self.bytes_per_s = 0.0
        self.measure()

    def measure(self) -> None:
        cuda, like = self.clock.cuda, self.like
        n = 8192 if cuda else 256
        a, b = (torch.randn(n, n, dtype=like.dtype, device=like.device) for _ in range(2))
        big = torch.empty(2**29 if cuda else 2**20, dtype=torch.float16, device=like.device)
        other = torch.empty_like(big)
        product = min(self.clock.seconds(lambda: a @ b) for _ in range(10))
        copy = min(self.clock.seconds(lambda: other.copy_(big)) for _ in range(10))
        self.flops = max(self.flops, 2 * n**3 / product)
        self.bytes_per_s = max(self.bytes_per_s, 2 * big.numel() * big.element_size() / copy)


def first_line(error: BaseException) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {line}"[:300]


def fault(
    got: Sequence[Tensor], stock: Sequence[Tensor], exact: Sequence[Exact], images: Tensor | None
) -> str | None:
    """None if the results satisfy the tolerance rule, else which one does not and by how much."""
    for y, y_stock, want in zip(got, stock, exact, strict=True):
        dtype = stock[0].dtype
        if images is not None:
            if not y.isfinite().all():
                return f"{want.name} is non-finite"
            y, y_stock = y[images], y_stock[images]
        if want.terms:
            error, stock_error = (measure_error(t, want.value) for t in (y, y_stock))
            scaled = replace(stock_error, scale=max(stock_error.scale, want.terms))
            allowed = TOLERANCE.allowed_max(scaled, dtype)
            if not error.max_abs <= allowed:
                return f"{want.name}: error {error.max_abs:.3g}, allowed {allowed:.3g}"
            continue
        try:
            assert_close(y, y_stock, want.value, what=want.name, dtype=dtype)
        except AssertionError as error:
            return first_line(error).removeprefix("AssertionError: ")
    return None


class Broken(RuntimeError):
    """The CUDA context is corrupted: this process cannot use the GPU any more."""


def broken(clock: Clock) -> str:
    """The error of a corrupted CUDA context, or ""."""
    try:
        if clock.cuda:
            torch.cuda.synchronize()
    except RuntimeError as error:
        return first_line(error)
    return ""


def check_context(clock: Clock, what: str) -> None:
    reason = broken(clock)
    if reason:
        raise Broken(f"{what}: {reason}")


def enter(
    case: Case, chosen: Callable[[str], bool], clock: Clock
) -> tuple[dict[str, Prepared], dict[str, str]]:
    """The contenders with correct results, and the reasons why others are excluded."""
    entered: dict[str, Prepared] = {}
    notes: dict[str, str] = {}
    try:
        stock, exact = case.stock(), case.exact()
    except Exception as error:  # out of memory: results cannot be checked
        check_context(clock, f"{case.name}: reference")
        return entered, {"reference": f"failed: {first_line(error)}"}
    for name, prepare in case.contenders.items():
        if not chosen(name):
            continue
        try:
            prepared = prepare()
            wrong = fault(prepared.call(), stock, exact, case.images)
            for _ in range(3 if clock.cuda and wrong is None else 0):
                prepared.call()
        except Absent as error:
            notes[name] = f"absent: {error}"
        except Exception as error:
            notes[name] = f"failed: {first_line(error)}"
            check_context(clock, f"{case.name}: {name}")
        else:
            if wrong is not None:
                notes[name] = f"wrong: {wrong}"
            else:
                entered[name] = prepared
    return entered, notes


def measure(case: Case, chosen: Callable[[str], bool], clock: Clock, rounds: int) -> dict[str, Any]:
    """The case, with the seconds of each contender in every round."""
    entered, notes = enter(case, chosen, clock)
    times: dict[str, list[float]] = {name: [] for name in entered}
    names = list(entered)
    for number in range(rounds):
        start = number % max(1, len(names))
        for name in names[start:] + names[:start]:
            times[name].append(clock.seconds(entered[name].call))
    return {
        "name": case.name,
        "op": case.op,
        "times": case.times,
        "moved_bytes": case.moved_bytes,
        "operations": case.operations,
        "seconds": times,
        "how": {name: prepared.how for name, prepared in entered.items() if prepared.how},
        "notes": notes,
    }


# --- figures --------------------------------------------------------------------------------------


def floor_s(case: dict[str, Any], limits: Limits) -> float:
    return max(case["operations"] / limits.flops, case["moved_bytes"] / limits.bytes_per_s)


def iqr(values: Sequence[float]) -> float:
    lower, _, upper = statistics.quantiles(values, n=4) if len(values) > 1 else (0.0, 0.0, 0.0)
    return upper - lower


def entry(case: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """A case as an entry of the results file, in pytest-benchmark's format: `stats` are those of
    "fused", or of the first contender measured."""
    seconds = case["seconds"]
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = {}
    lead = next(iter(medians), None)
    for name, median in medians.items():
        ratio, spread = pair_ratio(seconds[lead], seconds[name])
        rows[name] = {
            "ms": median * 1e3,
            "iqr_ms": iqr(seconds[name]) * 1e3,
            "share": floor_s(case, limits) / median,
            "of copy": case["moved_bytes"] / median / limits.bytes_per_s,
            f"{lead} over it": ratio,
            "± of it": spread / 2,
        }
    figures: dict[str, Any] = {}
    if lead is not None:
        figures = {
            "GB/s": case["moved_bytes"] / medians[lead] / 1e9,
            "TFLOP/s": case["operations"] / medians[lead] / 1e12,
            "share of the limit": rows[lead]["share"],
        }
        figures |= {f"{name} ms": medians[name] * 1e3 for name in CONTENDERS if name in medians}
    copied = ("op", "times", "moved_bytes", "operations", "how", "notes")
    return {
        "name": case["name"],
        "stats": {
            "median": medians[lead] if lead else math.nan,
            "iqr": iqr(seconds[lead]) if lead else math.nan,
            "rounds": len(seconds[lead]) if lead else 0,
        },
        "extra_info": figures,
        "contenders": rows,
        **{key: case[key] for key in copied},
    }


def mean(shares: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, shares)))


def totals(entries: Sequence[dict[str, Any]], limits: Limits) -> list[dict[str, Any]]:
    """For each op and contender: geometric mean and minimum of its shares over the distinct layers;
    and over the network, with layers counted as often as they occur: its time, the limit of the
    same layers, the share of the copy rate, and the speedup over "unfused"."""
    rows = []
    keys = dict.fromkeys((e["op"], name) for e in entries for name in e["contenders"])
    for op, name in keys:
        measured = [e for e in entries if e["op"] == op and name in e["contenders"]]
        both = [e for e in measured if "unfused" in e["contenders"]]

        def total(which: str, of: Sequence[dict[str, Any]]) -> float:
            return sum(e["contenders"][which]["ms"] * e["times"] for e in of)

        shares = [e["contenders"][name]["share"] for e in measured]
        limit_ms = sum(floor_s(e, limits) * 1e3 * e["times"] for e in measured)
        moved = sum(e["moved_bytes"] * e["times"] for e in measured)
        ms = total(name, measured)
        rows.append(
            {
                "op": op,
                "contender": name,
                "layers": f"{len(measured)} of {sum(e['op'] == op for e in entries)}",
                "share, mean": mean(shares),
                "share, least": min(shares),
                "of copy, mean": mean([e["contenders"][name]["of copy"] for e in measured]),
                "network ms": ms,
                "its limit ms": limit_ms,
                "network share": limit_ms / ms,
                "network of copy": moved / (ms / 1e3) / limits.bytes_per_s,
                "over unfused": total("unfused", both) / total(name, both) if both else None,
            }
        )
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    cells = [list(rows[0])]
    cells += [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def say(e: dict[str, Any]) -> None:
    """Print a finished case."""
    print(f"{e['name']}  x{e['times']}")
    for name, row in e["contenders"].items():
        figures = " ".join(f"{key} {value:.3g}" for key, value in row.items())
        print(f"    {name:28s} {figures}  {e['how'].get(name, '')}")
    for name, note in e["notes"].items():
        print(f"    {name:28s} {note}", flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmark of the ops on a GPU.")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--op", nargs="+", default=list(OPS), choices=OPS)
    parser.add_argument("--contender", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--tiles", action="store_true", help="also time every CUDA tile")
    parser.add_argument("--once", action="store_true", help="call each once, for a profiler")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--name", default="gpu_ops", help="name of the benchmark in the file name")
    parser.add_argument("--out", type=Path, help="write a results file into this folder")
    return parser.parse_args(argv)


def call_once(args: argparse.Namespace) -> int:
    like = torch.empty(0, dtype=getattr(torch, args.dtype), device=args.device)
    settings = (args.model, args.batch, args.size, like, None, args.tiles)
    for make in gpu_cases.cases(*settings, args.op.__contains__):
        case = make()
        for name in args.contender if args.only in case.name else ():
            if name in case.contenders:
                try:
                    prepared = case.contenders[name]()
                except Absent as error:
                    print(f"{case.name}: {name} absent: {error}")
                    continue
                prepared.call()
                print(f"{case.name}: {name} {prepared.how}", flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    device = use_device(args.device)  # of events too, which are the current device's
    if args.once:
        return call_once(args)
    like = torch.empty(0, dtype=getattr(torch, args.dtype), device=device)
    clock = Clock(device)
    limits = Limits(clock, like)
    head = provenance(args.name, args.device)
    head |= {key: getattr(args, key) for key in ("model", "batch", "size", "dtype")}
    where = head["machine"].get("gpu") or head["machine"]["cpu"]
    head["machine_info"] = {"cpu": {"brand_raw": where}}
    rates = "{}: matrix product {:.1f} TFLOP/s, copy {:.0f} GB/s"
    print(rates.format(where, limits.flops / 1e12, limits.bytes_per_s / 1e9), flush=True)
    raw: list[dict[str, Any]] = []
    lost, skipped = "", list[str]()

    def finished() -> list[dict[str, Any]]:
        """Evaluate all measured cases against the limits so far; write the results file."""
        entries = [entry(case, limits) for case in raw]
        if args.out:
            rates = {"flops": limits.flops, "copy_bytes_per_s": limits.bytes_per_s}
            content = {"limits": rates, "lost": lost, "left out": skipped}
            content["totals"] = totals(entries, limits)
            save({**head, **content, "benchmarks": entries}, args.out)
        return entries

    def chosen(name: str) -> bool:
        return name in args.contender or (args.tiles and name.startswith("native "))

    settings = (args.model, args.batch, args.size, like, clock.seconds, args.tiles)

    def measured(make: Callable[[], Case]) -> bool:
        case = make()
        if args.only in case.name:
            raw.append(measure(case, chosen, clock, args.rounds))
        return args.only in case.name

    for make in gpu_cases.cases(*settings, args.op.__contains__):
        try:
            if measured(make):
                say(finished()[-1])
        except Broken as error:
            lost = str(error)
        except Exception as error:  # e.g. out of memory, or one value per channel in a batch norm
            skipped.append(first_line(error))
            print(f"case skipped: {skipped[-1]}", flush=True)
            lost = broken(clock)
        if lost:
            print(f"the CUDA context is corrupted, stopping: {lost}", flush=True)
            break
    if not lost:
        limits.measure()
    entries = finished()
    print_table(totals(entries, limits))
    notes = [(e["name"], *note) for e in entries for note in e["notes"].items()]
    bad = [note for note in notes if not note[2].startswith("absent")]
    for line in dict.fromkeys(f"{name}: {note}" for _, name, note in notes if "absent" in note):
        print(line)
    print(
        f"{len(skipped)} cases skipped, {len(bad)} failed or wrong"
        + "".join(f"\n  {c}: {n}: {why}" for c, n, why in bad)
    )
    return 3 if lost else int(bool(bad or skipped))


if __name__ == "__main__":
    raise SystemExit(main())
