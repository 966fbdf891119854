"""The ops on a GPU at a network's shapes, each against its peers and against the machine's limits.

    python benchmarks/kernels/cuda/bench_gpu_ops.py --out DIR [--batch 256] [--dtype bfloat16]
        [--tiles] [--op conv_bn_relu add_relu] [--contender fused native unfused] [--only TEXT]

Ops and contenders are those of gpu_cases.py. Before it is timed a contender's results are compared
with float64 by the tolerance rule; one that fails, is wrong or is not there is a line in the table.
The contenders of a case take turns; times are of CUDA events, caches flushed before each; medians.

The limit is what this machine reaches in the same run: a large matrix product for operations, a
large copy for bytes. `share` is max(operations / product rate, bytes / copy rate) over the time
taken, `of copy` the rate of bytes alone over the copy's. Results are written after every case.
--once calls each contender a single time and measures nothing: for a profiler to watch.
On a device without CUDA (`--device cpu --size 32 --batch 2`) it shows only that the script works.

Exit status: 1 when a contender failed or was wrong, 3 when a kernel broke the GPU's context and the
rest could not be measured.
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
from gpu_contenders import Absent, Case, Exact, Ready
from torch import Tensor

from fused_resnet.bench.harness import pair_ratio, save
from fused_resnet.bench.machine import provenance
from fused_resnet.tolerance import TOLERANCE, assert_close, measure_error

FLUSH_BYTES = 256 * 2**20  # more than any last-level cache
SLEEP_CYCLES = 2_000_000  # about a millisecond: kernels are launched meanwhile, none waits
OPS = (
    "conv_bn_relu", "conv_bn_train", "norm_conv_train", "bn_add_relu", "add_relu", "conv_backward",
    "conv_norm_backward",
)  # fmt: skip
CONTENDERS = ("fused", "native", "apart", "triton", "cudnn", "unfused", "compile")


class Clock:
    """Times calls on one device, with its caches flushed before each."""

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
    """operations/s of a large matrix product, bytes/s of a large copy: the best so far."""

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
    said = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {said}"[:300]


def fault(
    got: Sequence[Tensor], stock: Sequence[Tensor], exact: Sequence[Exact], images: Tensor | None
) -> str | None:
    """None where results keep the tolerance rule, else which does not and by how much."""
    for y, theirs, want in zip(got, stock, exact, strict=True):
        dtype = stock[0].dtype
        if images is not None:
            if not y.isfinite().all():
                return f"{want.name} is not finite"
            y, theirs = y[images], theirs[images]
        if want.terms:
            error, their_error = (measure_error(t, want.value) for t in (y, theirs))
            scaled = replace(their_error, scale=max(their_error.scale, want.terms))
            allowed = TOLERANCE.allowed_max(scaled, dtype)
            if not error.max_abs <= allowed:
                return f"{want.name}: error {error.max_abs:.3g}, allowed {allowed:.3g}"
            continue
        try:
            assert_close(y, theirs, want.value, what=want.name, dtype=dtype)
        except AssertionError as error:
            return first_line(error).removeprefix("AssertionError: ")
    return None


class Broken(RuntimeError):
    """The GPU's context is lost: nothing runs in this process any more."""


def broken(clock: Clock) -> str:
    """Why the GPU runs nothing any more, or ""."""
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
) -> tuple[dict[str, Ready], dict[str, str]]:
    """The contenders that gave right results, and why the others do not take part."""
    ready: dict[str, Ready] = {}
    notes: dict[str, str] = {}
    try:
        stock, exact = case.stock(), case.exact()
    except Exception as error:  # out of memory: without it nobody's results can be trusted
        check_context(clock, f"{case.name}: reference")
        return ready, {"reference": f"failed: {first_line(error)}"}
    for name, make in case.makers.items():
        if not chosen(name):
            continue
        try:
            found = make()
            wrong = fault(found.call(), stock, exact, case.images)
            for _ in range(3 if clock.cuda and wrong is None else 0):
                found.call()
        except Absent as error:
            notes[name] = f"absent: {error}"
        except Exception as error:
            notes[name] = f"failed: {first_line(error)}"
            check_context(clock, f"{case.name}: {name}")
        else:
            if wrong is not None:
                notes[name] = f"wrong: {wrong}"
            else:
                ready[name] = found
    return ready, notes


def measure(case: Case, chosen: Callable[[str], bool], clock: Clock, rounds: int) -> dict[str, Any]:
    """The case with the seconds that each contender took in every round."""
    ready, notes = enter(case, chosen, clock)
    times: dict[str, list[float]] = {name: [] for name in ready}
    names = list(ready)
    for number in range(rounds):
        start = number % max(1, len(names))
        for name in names[start:] + names[:start]:
            times[name].append(clock.seconds(ready[name].call))
    return {
        "name": case.name,
        "op": case.op,
        "times": case.times,
        "moved_bytes": case.moved_bytes,
        "operations": case.operations,
        "seconds": times,
        "how": {name: found.how for name, found in ready.items() if found.how},
        "notes": notes,
    }


# --- figures --------------------------------------------------------------------------------------


def floor_s(case: dict[str, Any], limits: Limits) -> float:
    return max(case["operations"] / limits.flops, case["moved_bytes"] / limits.bytes_per_s)


def iqr(values: Sequence[float]) -> float:
    lower, _, upper = statistics.quantiles(values, n=4) if len(values) > 1 else (0.0, 0.0, 0.0)
    return upper - lower


def entry(case: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """A case as it stands in the results file, an entry as pytest-benchmark writes them: `stats`
    are those of "fused", or of the first that there is."""
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
    kept = ("op", "times", "moved_bytes", "operations", "how", "notes")
    return {
        "name": case["name"],
        "stats": {
            "median": medians[lead] if lead else math.nan,
            "iqr": iqr(seconds[lead]) if lead else math.nan,
            "rounds": len(seconds[lead]) if lead else 0,
        },
        "extra_info": figures,
        "contenders": rows,
        **{key: case[key] for key in kept},
    }


def mean(shares: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, shares)))


def totals(entries: Sequence[dict[str, Any]], limits: Limits) -> list[dict[str, Any]]:
    """For each op and contender over the distinct layers: the geometric mean of its shares and the
    least; and over the network, every layer as often as it comes: its time, and the same layers'
    limit, copy share and time of "unfused"."""
    found = []
    keys = dict.fromkeys((e["op"], name) for e in entries for name in e["contenders"])
    for op, name in keys:
        mine = [e for e in entries if e["op"] == op and name in e["contenders"]]
        both = [e for e in mine if "unfused" in e["contenders"]]

        def total(which: str, of: Sequence[dict[str, Any]]) -> float:
            return sum(e["contenders"][which]["ms"] * e["times"] for e in of)

        shares = [e["contenders"][name]["share"] for e in mine]
        limit_ms = sum(floor_s(e, limits) * 1e3 * e["times"] for e in mine)
        moved = sum(e["moved_bytes"] * e["times"] for e in mine)
        ms = total(name, mine)
        found.append(
            {
                "op": op,
                "contender": name,
                "layers": f"{len(mine)} of {sum(e['op'] == op for e in entries)}",
                "share, mean": mean(shares),
                "share, least": min(shares),
                "of copy, mean": mean([e["contenders"][name]["of copy"] for e in mine]),
                "network ms": ms,
                "its limit ms": limit_ms,
                "network share": limit_ms / ms,
                "network of copy": moved / (ms / 1e3) / limits.bytes_per_s,
                "over unfused": total("unfused", both) / total(name, both) if both else None,
            }
        )
    return found


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    cells = [list(rows[0])]
    cells += [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def say(e: dict[str, Any]) -> None:
    """A case as it is finished."""
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
    parser.add_argument("--tiles", action="store_true", help="every CUDA tile by itself too")
    parser.add_argument("--once", action="store_true", help="call each once, for a profiler")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--name", default="gpu_ops", help="the bench's name in the file name")
    parser.add_argument("--out", type=Path, help="write a results file into this folder")
    return parser.parse_args(argv)


def call_once(args: argparse.Namespace) -> int:
    like = torch.empty(0, dtype=getattr(torch, args.dtype), device=args.device)
    settings = (args.model, args.batch, args.size, like, None, args.tiles)
    for make in gpu_cases.cases(*settings, args.op.__contains__):
        case = make()
        for name in args.contender if args.only in case.name else ():
            if name in case.makers:
                try:
                    ready = case.makers[name]()
                except Absent as error:
                    print(f"{case.name}: {name} absent: {error}")
                    continue
                ready.call()
                print(f"{case.name}: {name} {ready.how}", flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    device = torch.device(args.device)
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
    lost, left_out = "", list[str]()

    def finished() -> list[dict[str, Any]]:
        """Every case so far against the limits so far; written to the results file."""
        entries = [entry(case, limits) for case in raw]
        if args.out:
            rates = {"flops": limits.flops, "copy_bytes_per_s": limits.bytes_per_s}
            content = {"limits": rates, "lost": lost, "left out": left_out}
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
        except Exception as error:  # too large for the GPU, too small for a batch norm
            left_out.append(first_line(error))
            print(f"a case is left out: {left_out[-1]}", flush=True)
            lost = broken(clock)
        if lost:
            print(f"the GPU's context is lost, nothing more can be measured: {lost}", flush=True)
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
        f"{len(left_out)} cases left out, {len(bad)} failed or wrong"
        + "".join(f"\n  {c}: {n}: {why}" for c, n, why in bad)
    )
    return 3 if lost else int(bool(bad or left_out))


if __name__ == "__main__":
    raise SystemExit(main())
