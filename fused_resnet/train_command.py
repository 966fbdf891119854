"""`fused-resnet train`: the options of train.Config, a progress bar, exit statuses."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Annotated, Optional

import typer
from rich.console import Console

from .commands import _clear_errors, _console, app

# None stands for a default that depends on other options; typer reads these on Python 3.10.
Number = Optional[float]  # noqa: UP045
Text = Optional[str]  # noqa: UP045
Whole = Optional[int]  # noqa: UP045
Say = typer.Option


@app.command()
def train(
    model: Annotated[str, Say(help="resnet18, ...; for small images resnet20, 32, 44, 56, ...")] = (
        "resnet20"
    ),
    data: Annotated[str, Say(help="digits (scikit-learn's), cifar10, folder.")] = "digits",
    root: Annotated[Text, Say(help="Folder of CIFAR-10, or of images, a folder a class.")] = None,
    image_size: Annotated[Whole, Say(help="Pixels a side; default by model and data.")] = None,
    epochs: Annotated[Whole, Say(help="Default: 15 of digits, 100 of cifar10, else 90.")] = None,
    batch: Annotated[int, Say(help="Images per optimizer step, over all processes.")] = 64,
    accumulate: Annotated[int, Say(help="Backward passes per step, which share --batch.")] = 1,
    optimizer: Annotated[str, Say(help="sgd (Nesterov), adamw, lamb.")] = "sgd",
    lr: Annotated[Number, Say(help="Peak learning rate; default by optimizer and batch.")] = None,
    momentum: Annotated[float, Say(help="Of sgd.")] = 0.9,
    weight_decay: Annotated[Number, Say(help="Default: 1e-4 of sgd, 1e-2. Not of norms.")] = None,
    warmup: Annotated[float, Say(help="Epochs of growing learning rate, before a cosine.")] = 1.0,
    label_smoothing: Annotated[float, Say(help="Share of the target on all classes.")] = 0.0,
    amp: Annotated[str, Say(help="no, bfloat16, float16 (with loss scaling).")] = "no",
    ema: Annotated[Number, Say(help="Decay of an average of the weights, then tested.")] = None,
    clip: Annotated[Number, Say(help="Largest norm of the gradient.")] = None,
    channels_last: Annotated[bool, Say(help="Layout of activations and weights.")] = True,
    activation_memory: Annotated[str, Say(help="full, low, lower, minimal.")] = "full",
    parallel: Annotated[str, Say(help="Under torchrun: ddp, or fsdp.")] = "ddp",
    sync_bn: Annotated[bool, Say("--sync-bn", help="Batch norm over all processes.")] = False,
    bucket_mb: Annotated[float, Say(help="Size of DDP's gradient buckets, MiB.")] = 25.0,
    seed: Annotated[int, Say(help="Of weights, order and augmentation.")] = 0,
    workers: Annotated[int, Say(help="Processes that load images.")] = 0,
    checkpoint_every: Annotated[int, Say(help="Steps; one after each epoch besides.")] = 100,
    keep: Annotated[int, Say(help="Checkpoints that stay on disk.")] = 2,
    resume: Annotated[bool, Say("--resume", help="Go on with the run in --out.")] = False,
    out: Annotated[Text, Say(help="Folder of the run; default: runs/MODEL-DATA.")] = None,
    device: Annotated[Text, Say(help="cpu, cuda, ...; default: a GPU if there is one.")] = None,
    threads: Annotated[Whole, Say(help="CPU threads; default: PyTorch's.")] = None,
    deterministic: Annotated[bool, Say("--deterministic", help="Slower: same bits.")] = False,
) -> None:
    """Train a model; under torchrun, on many devices. Metrics, plot and checkpoints go to --out.

    Exit status 1 where the loss is no number any more or memory runs out, 2 for what was asked
    wrongly.
    """
    options = dict(locals())
    first = os.environ.get("RANK", "0") == "0"
    console = _console()
    with _clear_errors():
        try:
            from .train import Config, NonFinite, OutOfMemory, run
        except ImportError as error:  # torch.distributed, say, left out of this build
            raise ValueError(str(error)) from None
        names = {field.name for field in dataclasses.fields(Config)}
        config = Config(**{k: v for k, v in options.items() if k in names})
        try:
            with _bar(console, first) as (say, progress):
                result = run(config, say, resume=resume, warn=_warn, progress=progress)
        except ImportError as error:
            raise ValueError(str(error)) from None
        except (NonFinite, OutOfMemory) as error:
            typer.echo(f"fused-resnet: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo(f"fused-resnet: stopped; {config.folder} goes on with --resume", err=True)
            raise typer.Exit(130) from None
    if first:
        console.print(
            f"test accuracy {result.test_accuracy:.2%}, loss {result.test_loss:.4f}, after "
            f"{result.steps} steps: {result.folder}",
            soft_wrap=True,
        )


def _warn(line: str) -> None:
    typer.echo(f"fused-resnet: {line}", err=True)


@contextlib.contextmanager
def _bar(
    console: Console, first: bool
) -> Iterator[tuple[Callable[[str], None], Callable[[int, int, float], None]]]:
    """What takes lines, and what takes progress: a bar on a terminal, elsewhere lines alone."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    columns = (
        TextColumn("loss {task.fields[loss]:.4f}"),
        BarColumn(),
        MofNCompleteColumn(),
        Left(),
    )
    shown = first and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=None, loss=float("nan"))

        def progress(step: int, steps: int, loss: float) -> None:
            bar.update(task, completed=step, total=steps, loss=loss)

        yield lambda line: console.print(line, soft_wrap=True, markup=False), progress
