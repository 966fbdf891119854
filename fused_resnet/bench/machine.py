"""Describes this machine: versions, hardware, and measured limits of compute and bandwidth."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PEERS = ("torchvision", "triton", "onnxruntime", "openvino", "numpy")
MEASURE_S = 0.25  # seconds spent on each shape of a limit


def check_device(name: str) -> None:
    """Raises ValueError unless `name` is a cpu or cuda device of this machine."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA GPUs")


def use_device(name: str) -> torch.device:
    """`check_device`, and makes a GPU the current device of the process: probes, events and other
    engines then use no other one."""
    check_device(name)
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def synchronize(device: torch.device) -> None:
    """Waits for everything that was launched on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe(device: str = "cpu") -> dict[str, Any]:
    """{cpu, cores, isa}, and for a CUDA device {gpu, gpu_memory_bytes}."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": cores,
        "isa": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    return machine


def other_load(seconds: float = 0.5) -> float | None:
    """Number of cores that other programs keep busy now (0: an idle machine); None without Linux's
    /proc/stat. This process sleeps meanwhile."""

    def busy_and_all() -> tuple[int, int]:
        ticks = [int(t) for t in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        idle = ticks[3] + ticks[4]  # idle and iowait
        return sum(ticks) - idle, sum(ticks)

    try:
        busy, total = busy_and_all()
        time.sleep(seconds)
        busy_after, total_after = busy_and_all()
    except (OSError, IndexError, ValueError):
        return None
    return (busy_after - busy) / max(1, total_after - total) * (os.cpu_count() or 1)


def _commit() -> str | None:
    """The git commit of this package's source tree, with + if files differ from it."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("fused-resnet", *PEERS):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def provenance(bench: str, device: str) -> dict[str, Any]:
    """The header of every results file: benchmark, machine, versions, commit and date."""
    return {
        "bench": bench,
        "device": torch.device(device).type,
        "torch": torch.__version__,
        "versions": _versions(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe(device),
        "threads": torch.get_num_threads(),
    }


def info(initialise_cuda: bool = False) -> dict[str, Any]:
    """Versions, machine, native build, and per device which backends support each op, or why not.

    GPU backends are asked only if this process has initialised CUDA, or if initialise_cuda: their
    answers depend on the GPU, and some run a kernel to find out. A process that has initialised
    CUDA cannot use it in forked children (DataLoader workers).
    """
    from fused_resnet.kernels import native, registry

    missing = native.load()
    cuda: Any = {"missing": "not asked: this process has not initialised CUDA"}
    if initialise_cuda or torch.cuda.is_initialized() or torch.cuda.device_count() == 0:
        cuda = registry.table("cuda")
    return {
        "versions": _versions(),
        "machine": describe("cpu") | {"threads": torch.get_num_threads()},
        "native build": {"missing": missing} if missing else native.build_info(),
        "forced backend": registry.forced(),
        "cpu": registry.table("cpu"),
        "cuda": cuda,
    }


# --- measured limits -----------------------------------------------------------------------------


def _best_time(call: Callable[[], Any], device: torch.device) -> float:
    """Shortest time in seconds of one call within MEASURE_S, without the first call."""

    def once() -> float:
        start = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - start

    first = once()
    if first > 8 * MEASURE_S:  # slow enough for its first call to be representative
        return first
    end = time.perf_counter() + MEASURE_S
    best = min(once(), once())
    while time.perf_counter() < end:
        best = min(best, once())
    return best


def _matmul_rate(n: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of an (n, n) x (n, n) product."""
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / _best_time(lambda: a @ b, device)


def _conv_rate(
    N: int, C: int, HW: int, kernel: int, dtype: torch.dtype, device: torch.device
) -> float:
    """FLOP/s of x (N, C, HW, HW) * weight (C, C, kernel, kernel), "same" padding, channels_last."""
    x = torch.randn(N, C, HW, HW, device=device).to(dtype)
    weight = torch.randn(C, C, kernel, kernel, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    seconds = _best_time(lambda: torch.conv2d(x, weight, padding=kernel // 2), device)
    return 2 * N * (C * kernel * HW) ** 2 / seconds


@torch.no_grad()
def product_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """The machine's rate in FLOP/s for `dtype`: the fastest of several large matrix products.

    These run as torch.matmul and, on the CPU, also as convolutions: on some CPUs matmul's library
    reaches half the rate of the convolutions' library.
    """
    where = torch.device(device)
    if where.type == "cuda":
        return max(_matmul_rate(n, dtype, where) for n in (4096, 8192))
    rates = [_matmul_rate(256, dtype, where)]
    # Without a fast matmul for the dtype (float16 on many CPUs) larger sizes would take minutes.
    if rates[0] > 20e9:
        rates += [_matmul_rate(n, dtype, where) for n in (1024, 2048)]
    rates += [_conv_rate(8, 1024, 28, 1, dtype, where), _conv_rate(8, 256, 28, 3, dtype, where)]
    return max(rates)


@torch.no_grad()
def copy_bandwidth(device: str = "cpu", size_bytes: int = 2**28) -> float:
    """Bytes/s, read plus written, of a copy of `size_bytes` (2**30 on GPUs)."""
    where = torch.device(device)
    size_bytes = 2**30 if where.type == "cuda" else size_bytes
    source = torch.ones(size_bytes // 4, device=where)
    target = torch.empty_like(source)
    return 2 * size_bytes / _best_time(lambda: target.copy_(source), where)


def measure_limits(dtypes: list[str], device: str = "cpu") -> dict[str, Any]:
    """{"flops": {dtype: FLOP/s}, "copy_bytes_per_s": bytes/s}, measured now."""
    return {
        "flops": {name: product_rate(getattr(torch, name), device) for name in dtypes},
        "copy_bytes_per_s": copy_bandwidth(device),
    }


def larger_limits(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The larger of two measurements of each limit, since other load only lowers them."""
    return {
        "flops": {name: max(rate, b["flops"][name]) for name, rate in a["flops"].items()},
        "copy_bytes_per_s": max(a["copy_bytes_per_s"], b["copy_bytes_per_s"]),
    }
