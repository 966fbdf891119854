"""Measured tile configurations: kept on disk by device, driver and Triton version.

`config_for` is asked at every launch and never measures anything: a measured winner where there is
one, else the heuristic of configs.py. `tune` measures, and is called by `fused-resnet tune` alone.

Two places hold winners: `tuned/` in this package (those of GPUs we have measured) and the user's
cache folder, which wins. A file there that cannot be read is ignored with one line, one that cannot
be written leaves the winners to this process alone; it is written beside and renamed, so that a
reader never sees half of it and nobody waits for anybody.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configs import Config, Problem, candidates, choose
from .support import multiprocessors

SHIPPED = Path(__file__).parent / "tuned"


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fused_resnet, by default ~/.cache/fused_resnet."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fused_resnet"


@functools.cache
def file_name(device: torch.device) -> str:
    """triton-<GPU>-driver<version>-triton<version>.json"""
    import triton

    name = torch.cuda.get_device_name(device)
    driver = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else 0
    plain = re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")
    return f"triton-{plain}-driver{driver}-triton{triton.__version__}.json"


def read(path: Path) -> dict[Problem, Config]:
    """The winners in a file; none, with one line of warning, where it is not what was written."""
    try:
        rows = json.loads(path.read_text())["winners"]
        return {Problem(**row["problem"]): Config(**row["config"]) for row in rows}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except Exception as error:  # unreadable, cut short, of another version: measured again some day
        warnings.warn(
            f"fused_resnet: {path} is ignored ({type(error).__name__}: {error}); "
            "`fused-resnet tune` writes it anew",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


def write(path: Path, winners: dict[Problem, Config]) -> str | None:
    """None when written, else why not, in one line."""
    rows = [{"problem": p._asdict(), "config": asdict(c)} for p, c in sorted(winners.items())]
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps({"winners": rows}, indent=1) + "\n")
        beside.replace(path)
    except OSError as error:
        return f"{path} cannot be written ({error.strerror or error})"
    return None


_winners: dict[str, dict[Problem, Config]] = {}


def winners(device: torch.device) -> dict[Problem, Config]:
    """Every measured winner for such devices, read once per process: "cuda" and "cuda:0" share
    them, as do two GPUs of one make."""
    name = file_name(device) if device.type == "cuda" else device.type
    if name not in _winners:
        found: dict[Problem, Config] = {}
        if device.type == "cuda":
            for folder in (SHIPPED, cache_folder()):
                found |= read(folder / name)
        _winners[name] = found
    return _winners[name]


def config_for(problem: Problem, device: torch.device) -> Config:
    """The configuration to run with: measured, or chosen by the heuristic."""
    found = winners(device).get(problem)
    return found or _chosen(problem, device)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@functools.lru_cache(maxsize=4096)
def _chosen(problem: Problem, device: torch.device) -> Config:
    return choose(problem, _capability(device), multiprocessors(device))


class Layer(NamedTuple):
    """A convolution of a model: x's, the weight's and y's shape, and how they meet."""

    x_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    geometry: Any
    groups: int


def layers_of(model: str, batch: int, size: int = 224) -> list[Layer]:
    """Every convolution of a model of the family, in order, for `batch` images of size x size."""
    from ..resnet import get_model
    from . import convolution

    found: list[Layer] = []

    def see(conv: Any, inputs: Any, output: Tensor) -> None:
        geometry = convolution.Geometry(conv.stride, conv.padding, conv.dilation)
        x_shape, y_shape = tuple(inputs[0].shape), tuple(output.shape)
        found.append(Layer(x_shape, tuple(conv.weight.shape), y_shape, geometry, conv.groups))

    with torch.device("meta"), torch.no_grad():
        net = get_model(model).eval()
        for m in net.modules():
            if isinstance(m, torch.nn.Conv2d):
                m.register_forward_hook(see)
        net(torch.empty(batch, 3, size, size))
    return found


def problem_of(layer: Layer, dtype: torch.dtype) -> Problem:
    """The matrix product that the kernel makes of a layer."""
    from . import convolution

    K, C, R, S = layer.weight_shape
    if convolution.takes_runs(C, S, layer.geometry.dilation[1], layer.groups):
        C, S = convolution.run_length(C, S), 1
    N, _, P, Q = layer.y_shape
    operands = convolution.operands_of(dtype)
    return Problem(N * P * Q, K, C, R, S, layer.groups, layer.geometry.stride[1], operands)


def measure_on(
    layers: dict[Problem, Layer], device: torch.device, dtype: torch.dtype
) -> Callable[[Problem, Config], float]:
    """A function that times one problem with one configuration on the device, in seconds."""
    import triton.testing

    from . import convolution

    def measure(problem: Problem, config: Config) -> float:
        layer = layers[problem]
        x = torch.randn(layer.x_shape, device=device, dtype=dtype)
        weight = torch.randn(layer.weight_shape, device=device, dtype=dtype)
        scale, shift = torch.rand(2, layer.weight_shape[0], device=device)
        call = convolution.prepared(x, weight, scale, shift, layer.geometry, layer.groups, config)
        return triton.testing.do_bench(call, return_mode="median") / 1e3

    return measure


def tune(
    problems: Iterable[Problem],
    device: torch.device,
    measure: Callable[[Problem, Config], float],
    on_progress: Callable[[Problem, Config, float], None] | None = None,
) -> tuple[dict[Problem, Config], str | None]:
    """The fastest configuration of every problem by `measure`, seconds; kept in the cache folder.

    Returns the winners found now, and why they could not be written, or None. A configuration that
    does not run on this device is passed over.
    """
    found: dict[Problem, Config] = {}
    for problem in problems:
        best = float("inf")
        for config in candidates(problem, _capability(device)):
            try:
                time_s = measure(problem, config)
            except Exception:  # too much shared memory, too many registers: not for this device
                time_s = float("inf")
            if time_s < best:
                best, found[problem] = time_s, config
            if on_progress is not None:
                on_progress(problem, config, time_s)
    winners(device).update(found)
    path = cache_folder() / file_name(device)
    return found, write(path, read(path) | found)
