"""`fused-resnet parity`: errors of stock PyTorch and fused_resnet against float64."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import (
    Device,
    Images,
    Json,
    Models,
    Threads,
    app,
    clear_errors,
    console_for,
    emit,
    load_inputs,
    split,
)

if TYPE_CHECKING:
    from fused_resnet.parity.report import ParityReport


@app.command()
def parity(
    model: Models = ["resnet50"],  # noqa: B006 - typer does not modify the default
    dtype: Annotated[
        list[str],
        typer.Option("--dtype", help="float32, bfloat16, float16, float64.", metavar="DTYPE"),
    ] = ["float32"],  # noqa: B006
    mode: Annotated[str, typer.Option(help="infer, or train: also gradients and statistics.")] = (
        "infer"
    ),
    batch: Annotated[int, typer.Option(min=1, help="Number of images.")] = 8,
    device: Device = "cpu",
    images: Images = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="state_dict file (default: random weights, calibrated statistics)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    threads: Threads = None,
    json_target: Json = None,
) -> None:
    """Errors of stock PyTorch and of fused_resnet against float64, layer by layer.

    Exit status 1 if any error of fused_resnet exceeds twice stock's plus one rounding.
    """
    import torch

    from fused_resnet import testing
    from fused_resnet.bench.machine import provenance, use_device
    from fused_resnet.bench.report import parity_table, verdict
    from fused_resnet.checks import one_of
    from fused_resnet.models.resnet import list_models

    console = console_for(json_target)
    if threads:
        torch.set_num_threads(threads)
    reports: list[tuple[str, ParityReport]] = []
    with clear_errors():
        models, dtypes = split(model), split(dtype)
        for name in models:
            one_of("--model", name, list_models())
        for name in dtypes:
            one_of("--dtype", name, ["float32", "bfloat16", "float16", "float64"])
        one_of("--mode", mode, ["infer", "train"])
        use_device(device)
        inputs = load_inputs(images, batch, console)
        training = mode == "train"
        command = f" --mode {mode} --batch {len(inputs)} --device {device} --seed {seed}"
        command += f" --threads {torch.get_num_threads()}"
        command += f" --checkpoint {checkpoint}" if checkpoint else ""
        command += f" --images {images}" if images else ""
        for name in models:
            fused, reference = testing.matched_models(
                name, inputs, checkpoint=checkpoint, seed=seed, device=device
            )
            for kind in dtypes:
                again = f"fused-resnet parity --model {name}{command} --dtype {kind}"
                report = testing.parity(
                    fused, reference, inputs, getattr(torch, kind), training, reproducer=again
                )
                reports.append((name, report))
                title = f"{name}, {report.dtype}, {mode}, {len(inputs)} images, {report.device}"
                console.print(parity_table(report, f"{title}: relative rms error against float64"))
                style = None if report.ok else "bold red"
                console.print(verdict(report), style=style, soft_wrap=True)
                console.print()
    if json_target is not None:
        content = {
            **provenance("parity", device),
            "parity": [{"model": n, "mode": mode, **r.to_dict()} for n, r in reports],
        }
        emit(content, json_target, console)
    if not all(report.ok for _, report in reports):
        raise typer.Exit(1)
