"""The typer application and what its commands share: options, output, errors, inputs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(
    help="Fused ResNet for PyTorch: build information, parity, benchmarks, training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

WIDTH = 118  # columns, if the output is not a terminal

Models = Annotated[list[str], typer.Option("--model", help="Model names.", metavar="NAME")]
Dtypes = Annotated[
    list[str], typer.Option("--dtype", help="float32, bfloat16, float16.", metavar="DTYPE")
]
Batches = Annotated[list[str], typer.Option("--batch", help="Batch sizes.", metavar="N")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Modes = Annotated[list[str], typer.Option("--mode", help="infer, train.", metavar="MODE")]
Images = Annotated[
    Path | None, typer.Option(help="Folder of images (default: the photographs in scikit-image).")
]
Json = Annotated[
    str | None,
    typer.Option("--json", help="Write JSON to this file; standard output if - or no file name."),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads (default: PyTorch's setting).")]


def console_for(json_target: str | None = None) -> Console:
    """Print to standard output, or to standard error if standard output carries the JSON."""
    stream = sys.stderr if json_target == "-" else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDTH, highlight=False)


def split(values: list[str]) -> list[str]:
    """--dtype a,b --dtype c -> a, b, c"""
    return [part for value in values for part in value.split(",") if part]


def emit(value: Any, target: str | None, console: Console) -> None:
    """Write `value` as JSON to the file `target`, or to standard output if it is "-"."""
    if target == "-":
        print(json.dumps(value, indent=1))
    elif target is not None:
        from fused_resnet.bench.harness import write_json

        console.print(f"JSON: {write_json(value, target)}")


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Report invalid arguments and unreadable files in one line with status 2, no traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        typer.echo(f"fused-resnet: {error}", err=True)
        raise typer.Exit(2) from None


def batch_sizes(values: list[str]) -> list[int]:
    for value in split(values):
        if not value.isdigit() or int(value) < 1:
            raise ValueError(f"--batch must be positive integers, got {value!r}")
    return [int(value) for value in split(values)]


def load_inputs(source: Path | None, count: int | None, console: Console) -> Tensor:
    """Images (N, 3, 224, 224) from a folder, else scikit-image's photographs, else noise."""
    import torch

    from fused_resnet.parity.images import load_images, photographs

    files = source or photographs()
    if not files:
        console.print("no photographs: pip install scikit-image, or --images DIR; using noise")
        torch.manual_seed(0)
        return torch.randn(count or 8, 3, 224, 224)
    batch = load_images(files, count)
    for line in batch.errors:
        console.print(f"skipped: {line}")
    if count is not None and len(batch.names) < count:
        console.print(f"requested {count} images, found {len(batch.names)}")
    return batch.images


@contextlib.contextmanager
def with_bar(total: int, what: str, console: Console, show: bool) -> Iterator[Any]:
    """A progress bar on a terminal; yields advance(number)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(bar_width=30), MofNCompleteColumn(), what, TimeRemainingColumn())
    disable = not (show and console.is_terminal)
    with Progress(*columns, console=console, disable=disable, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda number: progress.advance(task, number)


def with_progress(events: Any, console: Console) -> dict[str, Any]:
    """Run the benchmark with a progress bar and return its results."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from fused_resnet.bench import harness

    columns = (
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=1.0)

        def show(event: Any) -> None:
            progress.update(task, completed=event.fraction, description=event.text)
            if event.case is not None and not console.is_terminal:
                console.print(f"measured {event.text} ({event.fraction:.0%})")

        return harness.collect(events, show)
