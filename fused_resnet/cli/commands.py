"""The subcommands of `fused-resnet`: info, parity, bench, tune, demo."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

if TYPE_CHECKING:
    from torch import Tensor

    from fused_resnet.parity.report import ParityReport

app = typer.Typer(
    help="Fused ResNet for PyTorch: what is built, how exact it is, how fast it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

WIDTH = 118  # columns where the output is not a terminal

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


def _console(json_target: str | None = None) -> Console:
    """Standard output, or standard error where standard output carries the JSON."""
    stream = sys.stderr if json_target == "-" else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDTH, highlight=False)


def _split(values: list[str]) -> list[str]:
    """--dtype a,b --dtype c -> a, b, c"""
    return [part for value in values for part in value.split(",") if part]


def _emit(value: Any, target: str | None, console: Console) -> None:
    if target == "-":
        print(json.dumps(value, indent=1))
    elif target is not None:
        from fused_resnet.bench.harness import write_json

        console.print(f"JSON: {write_json(value, target)}")


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """A wrong argument or an unreadable file is one line and status 2, not a traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        typer.echo(f"fused-resnet: {error}", err=True)
        raise typer.Exit(2) from None


def _check(option: str, value: str, allowed: list[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")


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


@app.command()
def info(json_target: Json = None) -> None:
    """Versions, device, what was built, which backend serves which op and why."""
    import fused_resnet
    from fused_resnet.bench.report import info_tables

    console = _console(json_target)
    found = fused_resnet.info()
    if json_target != "-":
        for table in info_tables(found):
            console.print(table)
    _emit(found, json_target, console)


@app.command()
def parity(
    model: Models = ["resnet50"],  # noqa: B006 - typer reads the default and never changes it
    dtype: Annotated[
        list[str],
        typer.Option("--dtype", help="float32, bfloat16, float16, float64.", metavar="DTYPE"),
    ] = ["float32"],  # noqa: B006
    mode: Annotated[str, typer.Option(help="infer, or train: gradients and statistics too.")] = (
        "infer"
    ),
    batch: Annotated[int, typer.Option(min=1, help="Number of images.")] = 8,
    device: Device = "cpu",
    images: Images = None,
    checkpoint: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="state_dict file; default: random weights, calibrated statistics."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    threads: Threads = None,
    json_target: Json = None,
) -> None:
    """Error of stock PyTorch and of fused_resnet against float64, layer by layer.

    Exit status 1 when fused_resnet's error is over twice stock's plus one rounding anywhere.
    """
    import torch

    from fused_resnet.bench.machine import check_device, provenance
    from fused_resnet.bench.report import parity_table, verdict
    from fused_resnet.models.resnet import list_models

    console = _console(json_target)
    if threads:
        torch.set_num_threads(threads)
    reports: list[tuple[str, ParityReport]] = []
    with _clear_errors():
        models, dtypes = _split(model), _split(dtype)
        for name in models:
            _check("--model", name, list_models())
        for name in dtypes:
            _check("--dtype", name, ["float32", "bfloat16", "float16", "float64"])
        _check("--mode", mode, ["infer", "train"])
        check_device(device)
        inputs = load_inputs(images, batch, console)
        for name in models:
            for report in _parity_of(name, dtypes, mode, inputs, device, checkpoint, seed, images):
                reports.append((name, report))
                title = f"{name}, {report.dtype}, {mode}, {len(inputs)} images, {report.device}"
                console.print(parity_table(report, f"{title}: relative rms error against float64"))
                style = None if report.ok else "bold red"
                console.print(verdict(report), style=style, soft_wrap=True)
                console.print()
    if json_target is not None:
        found = {
            **provenance("parity", device),
            "parity": [{"model": n, "mode": mode, **r.to_dict()} for n, r in reports],
        }
        _emit(found, json_target, console)
    if not all(report.ok for _, report in reports):
        raise typer.Exit(1)


def _parity_of(
    name: str,
    dtypes: list[str],
    mode: str,
    inputs: Tensor,
    device: str,
    checkpoint: Path | None,
    seed: int,
    images: Path | None,
) -> Iterator[ParityReport]:
    import torch

    from fused_resnet.parity import report as testing

    fused, reference = testing.matched_models(
        name, inputs, checkpoint=checkpoint, seed=seed, device=device
    )
    again = f"fused-resnet parity --model {name} --mode {mode} --batch {len(inputs)}"
    again += f" --device {device} --seed {seed} --threads {torch.get_num_threads()}"
    again += f" --checkpoint {checkpoint}" if checkpoint else ""
    again += f" --images {images}" if images else ""
    for dtype in dtypes:
        yield testing.parity(
            fused,
            reference,
            inputs,
            getattr(torch, dtype),
            training=mode == "train",
            reproducer=f"{again} --dtype {dtype}",
        )


@app.command()
def bench(
    model: Models = ["resnet50"],  # noqa: B006
    batch: Annotated[list[str], typer.Option("--batch", help="Batch sizes.", metavar="N")] = [  # noqa: B006
        "1",
        "8",
    ],
    dtype: Dtypes = ["float32", "bfloat16"],  # noqa: B006
    mode: Modes = ["infer"],  # noqa: B006
    contender: Annotated[
        list[str],
        typer.Option(
            "--contender",
            help="eager, eager-channels_last, compile, onnxruntime, openvino, fused, fused-full, "
            "fused-low, fused-lower, fused-minimal, fused-graph; default all.",
            metavar="NAME",
        ),
    ] = [],  # noqa: B006
    device: Device = "cpu",
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(help="Aimed at for the rounds of one case.")] = 15.0,
    rounds: Annotated[int, typer.Option(min=1, help="At least so many rounds.")] = 7,
    memory: Annotated[
        bool, typer.Option("--memory", help="Peak memory too: a fresh process each on the CPU.")
    ] = False,
    json_target: Json = None,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write a PNG plot to this file."),
    ] = None,
) -> None:
    """Images per second of fused_resnet and its peers, taking turns in one run."""
    from fused_resnet.bench import harness as benchmark
    from fused_resnet.bench.contenders import CONTENDERS
    from fused_resnet.bench.report import bench_table, plot_bench, remarks

    console = _console(json_target)
    with _clear_errors():
        batches = [_positive("--batch", value) for value in _split(batch)]
        events = benchmark.run(
            _split(model),
            batches,
            _split(dtype),
            modes=_split(mode),
            device=device,
            contenders=_split(contender) or CONTENDERS,
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
    _emit(results, json_target, console)


def _positive(option: str, value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"{option} must be positive integers, got {value!r}")
    return int(value)


@app.command()
def tune(
    model: Models = ["resnet50"],  # noqa: B006
    batch: Annotated[list[str], typer.Option("--batch", help="Batch sizes.", metavar="N")] = [  # noqa: B006
        "256"
    ],
    dtype: Annotated[
        list[str], typer.Option("--dtype", help="float32, bfloat16, float16.", metavar="DTYPE")
    ] = ["bfloat16"],  # noqa: B006
    device: Device = "cuda",
) -> None:
    """Measure who computes a model's convolutions fastest on a GPU; later runs use the winners.

    CUDA, Triton and cuDNN contend, each with every tile worth a try; in 16 bits for the gradients'
    convolutions too. Kept in $XDG_CACHE_HOME/fused_resnet (~/.cache/fused_resnet) by GPU, driver,
    PyTorch and Triton version.
    """
    import torch

    from fused_resnet.bench.machine import check_device
    from fused_resnet.kernels import backends
    from fused_resnet.kernels import problem as gemm
    from fused_resnet.models.resnet import list_models

    console = _console()
    with _clear_errors():
        models, dtypes = _split(model), _split(dtype)
        batches = [_positive("--batch", value) for value in _split(batch)]
        for name in models:
            _check("--model", name, list_models())
        for name in dtypes:
            _check("--dtype", name, ["float32", "bfloat16", "float16"])
        check_device(device)
        if torch.device(device).type != "cuda":
            raise ValueError("tune: tiles are measured on a GPU")
        contenders = backends.conv_contenders()
        if not contenders:
            raise ValueError(f"tune: {backends.missing('conv_bn_relu', 'triton', 'cuda')}")
    from fused_resnet.bench.report import tuned_table
    from fused_resnet.kernels import tuning

    where = torch.device(device)
    for name, size, kind in itertools.product(models, batches, dtypes):
        as_dtype = getattr(torch, kind)
        layers = tuning.problems(gemm.layers_of(name, size), where, contenders, as_dtype)
        found, not_kept = _tune(layers, where, contenders, as_dtype, console)
        console.print(tuned_table(found, f"{name}, batch {size}, {kind}"))
        if not_kept:
            console.print(f"kept for this process only: {not_kept}", soft_wrap=True)


def _tune(
    layers: Any, device: Any, contenders: tuple[str, ...], dtype: Any, console: Console
) -> tuple[Any, str | None]:
    from rich.progress import Progress

    from fused_resnet.kernels import tuning

    total = sum(len(tuning.candidates(problem, device, contenders)) for problem in layers)
    with Progress(console=console) as progress:
        task = progress.add_task("tiles", total=total)
        return tuning.tune(
            layers,
            device,
            contenders,
            tuning.measure_on(layers, device, dtype),
            lambda problem, backend, config, time_s: progress.advance(task),
        )


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


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the JSON file and the plot.")] = Path(
        "demo-results"
    ),
    images: Images = None,
    model: Models = ["resnet18", "resnet50"],  # noqa: B006
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="cpu or cuda; default: whatever there is."),
    ] = None,
    threads: Threads = None,
) -> None:
    """The main job: parity with torchvision on photographs, then images per second, in minutes."""
    from . import demo as show

    with _clear_errors():
        ok = show.run(_console(), out, images, _split(model), device, threads)
    if not ok:
        raise typer.Exit(1)
