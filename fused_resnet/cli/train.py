"""`fused-resnet train`: options of train.Config, progress bar, plot of the metrics."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .app import Device, Threads, app, clear_errors, console_for

_OPTION = typer.Option


@app.command()
def train(
    model: Annotated[
        str, _OPTION(help="A ResNet of this package, or cifar_resnet20 (any depth 6n + 2).")
    ] = "resnet18",
    data: Annotated[str, _OPTION(help="digits (scikit-learn's), cifar10 or folder.")] = "digits",
    root: Annotated[str | None, _OPTION(help="Folder of cifar10 or of the images.")] = None,
    image_size: Annotated[
        int | None, _OPTION(help="Pixels (default: 32; folder: 224).", min=8)
    ] = None,
    epochs: int = 10,
    batch: Annotated[int, _OPTION(help="Images per optimizer step, over all processes.")] = 64,
    accumulate: Annotated[int, _OPTION(help="Backward passes per optimizer step.")] = 1,
    optimizer: Annotated[str, _OPTION(help="sgd, adamw or lamb.")] = "sgd",
    lr: Annotated[
        float | None, _OPTION(help="Peak (default: sgd 0.1 x batch / 256; else 0.001).")
    ] = None,
    momentum: float = 0.9,
    weight_decay: Annotated[float, _OPTION(help="Not applied to biases and norms.")] = 1e-4,
    warmup: Annotated[float, _OPTION(help="Epochs of linear warm-up before the cosine.")] = 1.0,
    label_smoothing: float = 0.0,
    amp: Annotated[str, _OPTION(help="no, bfloat16 or float16.")] = "no",
    ema: Annotated[
        float | None,
        _OPTION(help="Decay of an exponential moving average of the weights; it is tested."),
    ] = None,
    clip: Annotated[float | None, _OPTION(help="Maximum gradient norm.")] = None,
    channels_last: bool = True,
    activation_memory: Annotated[str, _OPTION(help="auto, full, low, lower or minimal.")] = "auto",
    cuda_graph: Annotated[
        bool, _OPTION("--cuda-graph", help="GPU: capture the step as one CUDA graph (sgd, adamw).")
    ] = False,
    sync_bn: Annotated[
        bool, _OPTION("--sync-bn", help="Synchronize batch norm over all processes.")
    ] = False,
    sharding: Annotated[
        str, _OPTION(help="none, or fsdp: shard the weights over torchrun's processes.")
    ] = "none",
    seed: int = 0,
    workers: Annotated[int, _OPTION(help="Data loading processes.")] = 0,
    checkpoint_every: Annotated[int, _OPTION(help="Steps; also after every epoch.")] = 100,
    resume: Annotated[bool, _OPTION("--resume", help="Continue the run in --out.")] = False,
    out: Annotated[str | None, _OPTION(help="Folder (default: runs/MODEL-DATA).")] = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Train a model, under torchrun on several devices; write metrics, plot, checkpoints."""
    options = dict(locals())
    console = console_for()
    with clear_errors():
        from fused_resnet.train import Config, NonFinite, OutOfMemory, run
        from fused_resnet.train.state import read_metrics

        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        fields = {f.name for f in dataclasses.fields(Config)}
        config = Config(**{k: v for k, v in options.items() if k in fields})
        with Progress(
            TextColumn("loss {task.fields[loss]:.4f}"), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(), console=console, transient=True,
            disable=not console.is_terminal,
        ) as bar:  # fmt: skip
            task = bar.add_task("train", total=None, loss=float("nan"))

            try:
                result = run(
                    config,
                    lambda line: console.print(line, soft_wrap=True),
                    resume=resume,
                    progress=lambda step, steps, loss: bar.update(
                        task, completed=step, total=steps, loss=loss
                    ),
                )
            except (NonFinite, OutOfMemory) as error:
                typer.echo(f"fused-resnet: {error}", err=True)
                raise typer.Exit(1) from None
    if os.environ.get("RANK", "0") != "0":
        return
    rows = read_metrics(result.folder / "metrics.jsonl")
    plot = plot_metrics(rows, result.folder / "metrics.png")
    console.print(f"test accuracy {result.test_accuracy:.2%} after {result.steps} steps")
    console.print(f"{result.folder}: metrics.jsonl, {plot}, checkpoint.pt", soft_wrap=True)


def plot_metrics(rows: list[dict[str, Any]], file: Path) -> str:
    """Plot loss by step and test accuracy by epoch; return the name of the file."""
    try:
        import matplotlib  # noqa: F401
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot (pip install matplotlib)"
    steps = [row for row in rows if "loss" in row]
    tests = [row for row in rows if "test_accuracy" in row]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    left.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="#7f7f7f", lw=1)
    left.set_xlabel("step")
    left.set_ylabel("training loss", color="#555555")
    left.set_ylim(bottom=0)
    right = left.twinx()
    right.plot(
        [r["step"] for r in tests], [100 * r["test_accuracy"] for r in tests],
        color="#0072b2", marker="o",
    )  # fmt: skip
    right.set_ylabel("test accuracy, %", color="#0072b2")
    for axes in (left, right):
        axes.spines["top"].set_visible(False)
    figure.savefig(file, dpi=120)
    return file.name
