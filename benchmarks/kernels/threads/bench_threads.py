"""The CPU kernels' threads (csrc/cpu/threads.h) against oneTBB's, Taskflow's and OpenMP's.

    python benchmarks/kernels/threads/bench_threads.py --out benchmarks/results
        [--work cifar "resnet50, batch 1"] [--condition quiet spin] [--turns 9]

Needs a C++ compiler. A pool whose headers the compiler does not find is reported as not installed;
CPATH and LIBRARY_PATH name further folders, such as those of `pip install tbb-devel`.

    empty              53 regions of two empty pieces (regions.cpp): the cost of a region
    resnet50, cifar    53 regions of ResNet-50's products for an image of 224 x 224 or 32 x 32
    resnet18, batch 1  the network in float32, with pools.cpp linked in place of threads.cpp: needs
                       the objects of `python setup.py build_ext --inplace`

Processes of two threads take turns, the others sleep: a call that is not timed, then calls for
about 0.3 s. Conditions as in models/bench_busy.py; the process that spins stays on the last core.
With --out, cells measured before stay in the file, if they are of this commit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any, NamedTuple

from torch.utils import cpp_extension

from fused_resnet.bench.harness import pair_ratio, save
from fused_resnet.bench.machine import provenance

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CONDITIONS = ("quiet", "spin", "twins", "pinned")
REGIONS = ("empty", "cifar", "resnet50")
NETWORKS = tuple(f"{model}, batch {n}" for model in ("resnet18", "resnet50") for n in (1, 8))
TURN_S = 0.3
CPUS = sorted(os.sched_getaffinity(0))


class Pool(NamedTuple):
    """Its header, an expression of it that is the version, and the compiler's options."""

    header: str
    version: str
    options: tuple[str, ...]


OURS = "ours"
POOLS = {
    "oneTBB": Pool("oneapi/tbb/version.h", "TBB_VERSION_STRING", ("-DWITH_TBB", "-ltbb")),
    "Taskflow": Pool("taskflow/taskflow.hpp", "TF_VERSION", ("-DWITH_TASKFLOW", "-pthread")),
    "OpenMP": Pool("omp.h", "_OPENMP", ("-DWITH_OPENMP",)),
}


def compile_cpp(*arguments: object, text: str | None = None) -> str:
    command = [cpp_extension.get_cxx_compiler(), "-std=c++20", "-O3", "-fopenmp"]
    run_paths = [f"-Wl,-rpath,{p}" for p in os.environ.get("LIBRARY_PATH", "").split(":") if p]
    command += [*map(str, arguments), *run_paths]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def version_of(pool: Pool) -> str | None:
    text = f"#include <{pool.header}>\nversion {pool.version}\n"
    try:
        expanded = compile_cpp("-E", "-P", "-xc++", "-", text=text)
    except subprocess.CalledProcessError:
        return None
    return expanded.splitlines()[-1].removeprefix("version ").replace('"', "").replace(" ", "")


def build_regions(name: str, folder: Path) -> Path:
    """The program of regions.cpp on this pool."""
    program = folder / name
    includes = ["-march=native", f"-I{HERE / 'without_torch'}", f"-I{ROOT / 'csrc'}"]
    threads = ROOT / "csrc/cpu/threads.cpp" if name == OURS else HERE / "pools.cpp"
    options = () if name == OURS else POOLS[name].options
    compile_cpp(*includes, HERE / "regions.cpp", threads, "-o", program, *options)
    return program


def build_package(name: str, folder: Path) -> Path:
    """A folder with a copy of the package that runs on this pool."""
    if name == OURS:
        return ROOT
    objects = [p for p in ROOT.glob("build/temp.*/csrc/**/*.o") if p.name != "threads.o"]
    if not objects:
        sys.exit("bench_threads: first run python setup.py build_ext --inplace")
    made = folder / f"{name}-package"
    copytree(ROOT / "fused_resnet", made / "fused_resnet", ignore=ignore_patterns("*.so"))
    torch_flags = [f"-I{p}" for p in cpp_extension.include_paths()]
    torch_flags += [f"-L{p}" for p in cpp_extension.library_paths()]
    visible = ["-fvisibility=hidden", f"-Wl,--version-script={ROOT / 'csrc/exports.map'}"]
    output = ["-shared", "-fPIC", "-s", "-o", made / "fused_resnet/libfused_resnet.so"]
    compile_cpp(*torch_flags, f"-I{ROOT / 'csrc'}", *visible, *output, HERE / "pools.cpp", *objects,
                "-lstdc++", "-ltorch_cpu", "-lc10", *POOLS[name].options)  # fmt: skip
    return made


class Worker:
    """A process that answers each line, a number of calls, with their seconds; at first 0."""

    def __init__(self, work: str, name: str, folder: Path, cpus: set[int] | None) -> None:
        environment = {**os.environ}
        if work in NETWORKS:
            environment["PYTHONPATH"] = str(folder / f"{name}-package" if name != OURS else ROOT)
            model, batch = work.split(", batch ")
            script = ROOT / "benchmarks/models/bench_busy.py"
            command: list[str | Path] = [sys.executable, script, "--worker", "fused"]
            command += [model, batch, "float32"]
        else:
            command = [folder / name, work]
        self.process = subprocess.Popen(
            command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            preexec_fn=None if cpus is None else lambda: os.sched_setaffinity(0, cpus),
        )  # fmt: skip

    def ask(self, calls: int) -> None:
        assert self.process.stdin is not None
        print(calls, file=self.process.stdin, flush=True)

    def answer(self) -> float:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def spinning() -> Iterator[None]:
    other = subprocess.Popen(
        [sys.executable, "-c", "while True: pass"],
        preexec_fn=lambda: os.sched_setaffinity(0, CPUS[-1:]),
    )
    try:
        yield
    finally:
        other.kill()
        other.wait()


def measure(names: list[str], work: str, folder: Path, condition: str, turns: int) -> dict:
    cpus = set(CPUS[:1]) if condition == "pinned" else None
    copies = range(2 if condition == "twins" else 1)
    workers = {name: [Worker(work, name, folder, cpus) for _ in copies] for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    calls: dict[str, int] = {}
    try:
        for group in workers.values():
            for worker in group:
                worker.answer()
        with spinning() if condition == "spin" else contextlib.nullcontext():
            for turn in range(turns + 1):  # the first finds the number of calls
                for name in names if turn % 2 else names[::-1]:
                    time.sleep(0.03)
                    for worker in workers[name]:
                        worker.ask(calls.get(name, 1))
                    seconds = statistics.fmean([worker.answer() for worker in workers[name]])
                    if turn:
                        times[name].append(1e3 * seconds / calls[name])
                    else:
                        calls[name] = max(1, min(20000, round(TURN_S / seconds)))
    finally:
        for worker in (w for group in workers.values() for w in group):
            worker.close()
    return {"work": work, "condition": condition, "ms": times}


def shown(case: dict[str, Any]) -> str:
    parts = [f"{case['work']:18s} {case['condition']:7s}"]
    for name, times in case["ms"].items():
        ratio, spread = pair_ratio(times, case["ms"][OURS])
        parts.append(f"{name} {statistics.median(times):.4g} ms ({ratio:.3f} ± {spread / 2:.3f})")
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results file")
    parser.add_argument("--work", nargs="+", default=[*REGIONS, *NETWORKS], metavar="WORK",
                        choices=[*REGIONS, *NETWORKS])  # fmt: skip
    parser.add_argument("--condition", nargs="+", default=CONDITIONS, choices=CONDITIONS)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--build", type=Path, help="folder of programs that are built once")
    args = parser.parse_args()
    found = {name: version_of(pool) for name, pool in POOLS.items()}
    names = [OURS, *(name for name, version in found.items() if version)]
    print({name: version or "not installed" for name, version in found.items()})
    results = {"schema": 1, **provenance("threads", "cpu"), "threads": 2, "pools": found}
    results |= {"after a fork": {}, "regions": []}
    with contextlib.ExitStack() as stack:
        folder = args.build or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            if not (folder / name).exists():
                build_regions(name, folder)
            if set(args.work) & set(NETWORKS) and not (folder / f"{name}-package").exists():
                build_package(name, folder)
            asked = subprocess.run([folder / name, "fork"], capture_output=True, check=True)
            results["after a fork"][name] = json.loads(asked.stdout)
        print("computes in a forked process:", results["after a fork"], flush=True)
        for work in args.work:
            for condition in args.condition:
                results["regions"].append(measure(names, work, folder, condition, args.turns))
                print(shown(results["regions"][-1]), flush=True)
    if args.out:
        print(save(with_earlier(results, args.out), args.out))


def with_earlier(results: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`results`, and the cells of the file in the folder that are not in it and of its commit."""
    for path in folder.glob("threads-cpu-torch*.json"):
        earlier = json.loads(path.read_text())
        if all(earlier[key] == results[key] for key in ("commit", "machine", "torch", "pools")):
            measured = {(case["work"], case["condition"]) for case in results["regions"]}
            results["regions"] += [
                case
                for case in earlier["regions"]
                if (case["work"], case["condition"]) not in measured
            ]
    order = {work: i for i, work in enumerate([*REGIONS, *NETWORKS])}
    results["regions"].sort(key=lambda c: (order[c["work"]], CONDITIONS.index(c["condition"])))
    return results


if __name__ == "__main__":
    main()
