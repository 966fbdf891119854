"""Compiled models: time of a call over the uncompiled model of this package.

    python benchmarks/models/bench_compile.py --out benchmarks/results [--model resnet18 resnet50]

Contenders take turns, in this process, on images of 224 x 224, after a pause each:

    fused      fr.resnet50(), uncompiled
    compile    torch.compile(fr.resnet50())
    backend    torch.compile(torchvision.models.resnet50(), backend="fused_resnet")
    inductor   torch.compile(torchvision.models.resnet50()) with freezing, channels_last
    package    fr.export(...) by AOTInductor, called from Python
    c++        the same package by examples/cpp, after the others, in turns with the package alone:
               what runs after another process is slower for some calls

The first call's time of `backend` includes Dynamo's tracing and the packing of the weights.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
from torch import Tensor

import fused_resnet as fr
from fused_resnet.bench import machine
from fused_resnet.bench.harness import pair_ratio, write_json
from fused_resnet.kernels import library

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"


def program_of(folder: Path) -> Path | None:
    """The C++ example, built in `folder`; None without cmake."""
    packages = Path(torch.__file__).parent
    try:
        for command in (
            ["cmake", "-S", EXAMPLE, "-B", folder, f"-DTORCH={packages}",
             "-DCMAKE_BUILD_TYPE=Release"],
            ["cmake", "--build", folder],
        ):  # fmt: skip
            subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"c++ is not measured: {error}")
        return None
    return folder / "run"


def contenders(
    name: str, x: Tensor, folder: Path, program: Path | None
) -> tuple[dict[str, Callable[[], Any]], float]:
    """What is timed, and the seconds of the backend's first call."""
    models = importlib.import_module("torchvision.models")
    stock = getattr(models, name)(weights=None).eval().to(x.dtype)
    for m in stock.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_var.uniform_(0.5, 2)
    ours = getattr(fr, name)(weights=None).eval().to(x.dtype)
    ours.load_state_dict(stock.state_dict())
    last = getattr(models, name)(weights=None).eval().to(x.dtype)
    last.load_state_dict(stock.state_dict())
    last.to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(ours, fullgraph=True)
    backend = torch.compile(stock, backend="fused_resnet", fullgraph=True)
    frozen = torch.compile(last, dynamic=False)
    with inductor.patch(freezing=True):
        frozen(x_last)
    compiled(x)
    begin = time.perf_counter()
    backend(x)
    first = time.perf_counter() - begin
    package = str(folder / f"{name}-{len(x)}-{str(x.dtype)[6:]}.pt2")
    torch._inductor.aoti_compile_and_package(fr.export(stock, (x,)), package_path=package)
    loaded = torch._inductor.aoti_load_package(package)
    found: dict[str, Callable[[], Any]] = {
        "fused": lambda: ours(x), "compile": lambda: compiled(x), "backend": lambda: backend(x),
        "inductor": lambda: frozen(x_last), "package": lambda: loaded(x),
    }  # fmt: skip
    if program is not None and x.dtype == torch.float32:
        (folder / "x").write_bytes(x.numpy().tobytes())
        command = [program, package, library.FILE, folder / "x", *map(str, x.shape), "7"]

        def call() -> float:
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            return float(run.stderr.split()[0])

        found["c++"] = call
    want = found["fused"]()
    for key in found:
        if key != "c++":
            torch.testing.assert_close(found[key](), want, rtol=0.1, atol=0.1)
    return found, first


def _median_of_calls(call: Callable[[], Any], count: int = 7) -> float:
    """Of `count` calls one after the other, in ms, as the C++ example measures its own."""
    times = []
    for i in range(count + 1):
        begin = time.perf_counter()
        call()
        if i:
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def measure(
    name: str, dtype: torch.dtype, batch: int, rounds: int, folder: Path, example: Path | None
) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.compiler.reset()
    x = torch.randn(batch, 3, 224, 224).to(dtype)
    with torch.no_grad():
        calls, first = contenders(name, x, folder, example)
        program = calls.pop("c++", None)
        times: dict[str, list[float]] = {key: [] for key in calls}
        for turn in range(rounds + 1):  # the first warms up
            for key, call in calls.items():
                time.sleep(0.02)  # for threads that spin after a call
                call()  # the weights of the contender before are in the cache
                begin = time.perf_counter()
                call()
                if turn:
                    times[key].append(1e3 * (time.perf_counter() - begin))
        if program is not None:
            times["c++"], times["package, beside c++"] = [], []
            for _ in range(rounds):
                times["c++"].append(program())
                times["package, beside c++"].append(_median_of_calls(calls["package"]))
    return {"name": name, "dtype": str(dtype)[6:], "batch": batch, "first_call_s": first,
            "times_ms": times}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results file")
    parser.add_argument("--model", nargs="*", default=["resnet18", "resnet50"])
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {**machine.provenance("compile", "cpu"), "compiled": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        program = program_of(folder / "cpp")
        for name in args.model:
            for dtype in args.dtype:
                for batch in args.batch:
                    case = measure(name, getattr(torch, dtype), batch, args.rounds, folder, program)
                    results["compiled"].append(case)
                    times = case["times_ms"]
                    print(
                        f"{name} b{batch} {dtype}: first call {case['first_call_s']:.1f} s", end=""
                    )
                    for key in times:
                        beside = "package, beside c++" if "c++" in key else "fused"
                        ratio, spread = pair_ratio(times[key], times[beside])
                        median = statistics.median(times[key])
                        print(f", {key} {median:.1f} ms ({ratio:.2f} ± {spread / 2:.2f})", end="")
                    print(flush=True)
    file = args.out / f"compile-cpu-torch{torch.__version__.split('+')[0]}.json"
    print(write_json(results, str(file)))


if __name__ == "__main__":
    main()
