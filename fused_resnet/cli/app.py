"""The application, and what its commands share: options, output, errors, inputs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(
    help="Fused ResNet for PyTorch: what is built, how exact it is, how fast it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

WIDTH = (
    118  # columns where the output is not a terminal  # columns where the output is not a terminal
)

Models = Annotated[list[str], typer.Option("--model", help="Model names.", metavar="NAME")]
Dtypes = Annotated[
    list[str], typer.Option("--dtype", help="float32, bfloat16, float16.", metavar="DTYPE")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Modes = Annotated[list[str], typer.Option("--mode", help="infer, train.", metavar="MODE")]
Images = Annotated[
    Optional[Path],  # noqa: UP045 - typer evaluates it on Python 3.10
    typer.Option(help="Folder of images; default: photographs that scikit-image ships."),
]
Json = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--json", help="Write JSON to this file; - or nothing: to standard output."),
]
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="CPU threads; default: PyTorch's."),
]


def console_for(json_target: str | None = None) -> Console:
    """Standard output, or standard error where standard output carries the JSON."""
    stream = sys.stderr if json_target == "-" else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDTH, highlight=False)


def split(values: list[str]) -> list[str]:
    """--dtype a,b --dtype c -> a, b, c"""
    return [part for value in values for part in value.split(",") if part]


def emit(value: Any, target: str | None, console: Console) -> None:
    if target == "-":
        print(json.dumps(value, indent=1))
    elif target is not None:
        from fused_resnet.bench.harness import write_json

        console.print(f"JSON: {write_json(value, target)}")


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """A wrong argument or an unreadable file is one line and status 2, not a traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        typer.echo(f"fused-resnet: {error}", err=True)
        raise typer.Exit(2) from None


def check(option: str, value: str, allowed: list[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")


def positive(option: str, value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"{option} must be positive integers, got {value!r}")
    return int(value)


def load_inputs(source: Path | None, count: int | None, console: Console) -> Tensor:
    """Images (N, 3, 224, 224) from a folder, or scikit-image's photographs, or random ones."""
    import torch

    from fused_resnet.parity.images import load_images, photographs

    found = source or photographs()
    if not found:
        console.print("no photographs: pip install scikit-image, or --images DIR; using noise")
        torch.manual_seed(0)
        return torch.randn(count or 8, 3, 224, 224)
    batch = load_images(found, count)
    for line in batch.errors:
        console.print(f"left out: {line}")
    if count is not None and len(batch.names) < count:
        console.print(f"{count} images asked for, {len(batch.names)} found")
    return batch.images


def with_progress(events: Any, console: Console) -> dict[str, Any]:
    """Run the benchmark under a progress bar; returns its results."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from fused_resnet.bench import harness as benchmark

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

        return benchmark.collect(events, show)
