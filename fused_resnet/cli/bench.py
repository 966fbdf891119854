"""`fused-resnet bench`: throughput of fused_resnet and other contenders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import (
    Batches,
    Device,
    Dtypes,
    Json,
    Models,
    Modes,
    Threads,
    app,
    batch_sizes,
    clear_errors,
    console_for,
    emit,
    split,
    with_progress,
)


@app.command()
def bench(
    model: Models = ["resnet50"],  # noqa: B006
    batch: Batches = ["1", "8"],  # noqa: B006
    dtype: Dtypes = ["float32", "bfloat16"],  # noqa: B006
    mode: Modes = ["infer"],  # noqa: B006
    contender: Annotated[
        list[str],
        typer.Option(
            "--contender",
            help="eager, eager-channels_last, compile, onnxruntime, openvino, fused, fused-full, "
            "fused-low, fused-lower, fused-minimal, fused-released, fused-graph (default: all).",
            metavar="NAME",
        ),
    ] = [],  # noqa: B006
    device: Device = "cpu",
    threads: Threads = None,
    seconds: Annotated[
        float, typer.Option(help="Target duration of the rounds of one case.")
    ] = 15.0,
    rounds: Annotated[int, typer.Option(min=1, help="Minimum number of rounds.")] = 7,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory", help="Also measure peak memory; on the CPU in a fresh process each."
        ),
    ] = False,
    json_target: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG plot to this file.")] = None,
) -> None:
    """Images per second of fused_resnet and other contenders, interleaved in one run."""
    from fused_resnet.bench import harness
    from fused_resnet.bench.contenders import CONTENDERS
    from fused_resnet.bench.report import bench_table, plot_bench, remarks

    console = console_for(json_target)
    with clear_errors():
        events = harness.run(
            split(model),
            batch_sizes(batch),
            split(dtype),
            modes=split(mode),
            device=device,
            contenders=split(contender) or CONTENDERS,
            threads=threads,
            seconds=seconds,
            rounds=rounds,
            with_memory=memory,
        )
        results = with_progress(events, console)
    console.print(bench_table(results))
    for line in remarks(results):
        console.print(line, soft_wrap=True)
    if plot is not None:
        console.print(f"plot: {plot_bench(results, plot)}")
    emit(results, json_target, console)
