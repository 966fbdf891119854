"""Very deep residual networks: training steps, and their cost in time and memory."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LinearLR

from fused_resnet.bench.contenders import Step
from fused_resnet.bench.memory import activation_peak_bytes, saved_bytes
from fused_resnet.fusion.training.activation_memory import LEVELS, segments, set_activation_memory
from fused_resnet.kernels.registry import use_backend

from .setting import Config, make, number
from .steps import Steps

_SHALLOW = 20  # layers of the network that time per layer is compared with
_TIMED = 3  # steps
_WORKSPACE = 4 * 2**20  # measured bytes that the kernels of a step need in addition to activations


class TooDeep(RuntimeError):
    """The activations of a step do not fit in memory; the message names options that would."""


def run(experiment: Any, depth: int) -> dict[str, Any]:
    """Train a residual network of `depth` layers for deep_steps; measure the cost of a step."""
    c, data = experiment.config, experiment.data
    assert c.batch is not None
    estimates = {level: estimate_bytes(c, depth, c.batch, data.size, level) for level in LEVELS}
    refuse_what_does_not_fit(depth, c.activation_memory, estimates, available_bytes())
    model = make(c, "residual", depth, 0, data.classes)
    set_activation_memory(model, c.activation_memory)
    # Linear warm-up to the peak: a one-cycle schedule would hardly start in so few steps.
    warm_up = partial(LinearLR, start_factor=0.01, total_iters=max(1, c.deep_steps // 2))
    steps = Steps(experiment, model, depth, 0, warm_up)
    losses: list[float] = []
    while len(losses) < c.deep_steps and (not losses or math.isfinite(losses[-1])):
        for x, y in data.batches(c.batch, steps.generator):
            losses.append(steps.step(x, y)[0])
            if len(losses) == c.deep_steps or not math.isfinite(losses[-1]):
                break
    diverged = None if math.isfinite(losses[-1]) else len(losses)
    result: dict[str, Any] = {
        "depth": depth, "steps": len(losses), "losses": [number(v) for v in losses],
        "diverged": diverged,
        "gradients_after": None if diverged else experiment.gradients(model, c.batch),
        "estimated_bytes": estimates, "costs": costs(experiment, depth, estimates),
    }  # fmt: skip
    experiment.say(
        f"residual {depth}: {len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}"
    )
    return result


def costs(experiment: Any, depth: int, estimates: dict[str, int]) -> list[dict[str, Any]]:
    """Cost of one step for stock and for each level: time per layer compared with that of a shallow
    network, interleaved; bytes saved for backward; peak of live activations. Only the
    estimate if it exceeds the available memory."""
    c, data = experiment.config, experiment.data
    assert c.batch is not None
    x, y = data.x[: c.batch], data.y[: c.batch]
    rows: list[dict[str, Any]] = []

    def forward(model: Any) -> torch.Tensor:
        return cross_entropy(model(x), y)

    def step(model: Any) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = forward(model)
        loss.backward()
        return loss

    models = [make(c, "residual", d, 0, data.classes) for d in (_SHALLOW, depth)]

    @contextlib.contextmanager
    def at(level: str) -> Iterator[None]:
        stock = level == "eager"
        for model in models:
            set_activation_memory(model, "full" if stock else level)
        with use_backend("reference") if stock else contextlib.nullcontext():
            yield

    available = available_bytes()
    times: dict[str, list[list[float]]] = {}
    for level in ("eager", "full", "low", "minimal"):
        needed = estimates["full" if level == "eager" else level]
        if available is not None and needed > available:
            rows.append({"level": level, "needed_bytes": needed})
            continue
        times[level] = [[], []]
    for _ in range(_TIMED):  # interleaved: load on the machine affects all of them
        for level, both in times.items():
            with at(level):
                for model, measured in zip(models, both, strict=True):
                    step(model)  # bring the allocator to the state of this level
                    began = time.perf_counter()
                    step(model)
                    measured.append((time.perf_counter() - began) * 1e3)
    model = models[1]
    for level, both in times.items():
        shallow, deep = map(statistics.median, both)
        model.zero_grad(set_to_none=True)  # else the profiler records frees of unrecorded memory
        with at(level):
            rows.append({
                "level": level, "step_ms": deep,
                "layer_ms": deep / depth, "shallow_layer_ms": shallow / _SHALLOW,
                "saved_bytes": saved_bytes(Step(partial(forward, model), model)),
                "peak_bytes": activation_peak_bytes(Step(partial(step, model), model)),
            })  # fmt: skip
    return rows


def estimate_bytes(config: Config, depth: int, batch: int, size: int, level: str) -> int:
    """Estimate the peak bytes of live activations in a step of a residual network, from what two
    small networks save for two images; "minimal" grows with the square root of depth."""
    per_block = 9 if config.block == "preact_bottleneck" else 6
    stage_blocks = (2, 4)
    x = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    sizes = []
    for n in stage_blocks:
        model = make(config, "residual", per_block * n + 2, 0, 10)
        set_activation_memory(model, "low" if level == "minimal" else level)
        sizes.append(saved_bytes(Step(partial(model, x), model)))
    low, high = stage_blocks
    per_n = (sizes[1] - sizes[0]) / (high - low)
    n = (depth - 2) // per_block
    if level == "minimal":
        # One saved block output per segment, and the blocks of one recomputed segment.
        saved = segments(n)
        images = sizes[0] - low * per_n + per_n * (saved + math.ceil(n / saved) / 3)
    else:
        images = sizes[0] + per_n * (n - low)
    return int(images * batch / 2) + _WORKSPACE


def available_bytes() -> int | None:
    """Bytes of memory available to this process, None if unknown."""
    try:
        with open("/proc/meminfo") as file:
            rows = dict(line.split(":", 1) for line in file)
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def images_that_fit(config: Config, depth: int, images: int, size: int) -> int:
    """`images`, halved until a step at level "full" fits in memory."""
    available = available_bytes()
    while available is not None and images > 1:
        if estimate_bytes(config, depth, images, size, "full") <= available:
            break
        images //= 2
    return images


def refuse_what_does_not_fit(
    depth: int, level: str, estimates: dict[str, int], available: int | None
) -> None:
    """Raise TooDeep if `level` does not fit, with the estimate and the first level that fits."""
    if available is None or estimates[level] <= available:
        return
    fitting = [other for other in LEVELS if estimates[other] <= available]
    use = f"--activation-memory {fitting[0]}" if fitting else "a smaller --batch"
    need = estimates[fitting[0]] if fitting else estimates["minimal"]
    raise TooDeep(
        f"depth {depth}: activations need about {_gib(estimates[level])} with "
        f"--activation-memory {level}, and {_gib(available)} are free; {use} would fit, "
        f"with about {_gib(need)}" if fitting else
        f"depth {depth}: activations need about {_gib(estimates[level])} with "
        f"--activation-memory {level} and {_gib(need)} with minimal, and {_gib(available)} are "
        f"free; use {use}"
    )  # fmt: skip


def _gib(n: int) -> str:
    return f"{n / 2**30:.1f} GiB"
