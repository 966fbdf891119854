"""`fused-resnet depth`: plain and residual networks of growing depth, as a report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from .app import Threads, app, clear_errors, console_for

if TYPE_CHECKING:
    from fused_resnet.depth.setting import Config

_OPTION = typer.Option


@app.command()
def depth(
    data: Annotated[str, _OPTION(help="digits (scikit-learn's) or cifar10.")] = "digits",
    root: Annotated[str | None, _OPTION(help="Folder of cifar10.")] = None,
    depths: Annotated[str, _OPTION(help="Numbers of layers, each 6n + 2.")] = "20,56,110",
    deep: Annotated[
        str, _OPTION(help="Layers of residual networks trained for --deep-steps.")
    ] = "1202",
    deep_steps: int = 60,
    seeds: int = 3,
    epochs: Annotated[int | None, _OPTION(help="Default: 30; cifar10: 164.")] = None,
    batch: Annotated[int | None, _OPTION(help="Default: 64; cifar10: 128.")] = None,
    lr: Annotated[float | None, _OPTION(help="Peak (default: 0.05; cifar10: 0.1).")] = None,
    block: Annotated[str, _OPTION(help="basic, preact or preact_bottleneck.")] = "basic",
    activation_memory: Annotated[
        str, _OPTION(help="For the deep networks: full, low, lower or minimal.")
    ] = "low",
    stochastic_depth: Annotated[
        float, _OPTION(help="Probability that a residual network's last block is dropped.")
    ] = 0.0,
    zero_init_residual: Annotated[
        bool, _OPTION(help="Initialize each residual block to its shortcut.")
    ] = True,
    out: Annotated[
        str, _OPTION(help="Folder; resumes a report that was started there.")
    ] = "runs/depth",
    threads: Threads = None,
) -> None:
    """Train plain and residual networks of growing depth; report errors and gradients."""
    options = dict(locals())
    console = console_for()
    with clear_errors():
        import torch

        from fused_resnet.depth.experiment import Experiment
        from fused_resnet.depth.setting import Config
        from fused_resnet.depth.ultra import TooDeep

        if threads is not None:
            torch.set_num_threads(threads)
        options["depths"], options["deep"] = _layers("--depths", depths), _layers("--deep", deep)
        fields = {f.name for f in dataclasses.fields(Config)}
        config = Config(**{k: v for k, v in options.items() if k in fields})
        with Progress(
            TextColumn("depth"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        ) as bar:  # fmt: skip
            task = bar.add_task("depth", total=None)
            experiment = Experiment(
                config,
                lambda line: console.print(line, soft_wrap=True),
                lambda done, parts: bar.update(task, completed=done, total=parts),
            )
            try:
                parts = experiment.run()
            except TooDeep as error:
                typer.echo(f"fused-resnet: {error}", err=True)
                raise typer.Exit(1) from None
        for line in write(experiment.config, parts, Path(out)):
            console.print(line, soft_wrap=True)


def _layers(option: str, text: str) -> tuple[int, ...]:
    """ "20,56" -> (20, 56)"""
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise ValueError(
            f"{option} must be numbers of layers, as 20,56,110, got {text!r}"
        ) from None


def write(config: Config, parts: dict[str, dict[str, object]], folder: Path) -> list[str]:
    """Write report.json, report.md and the plots to `folder`; return the lines to print."""
    from fused_resnet.bench.machine import provenance
    from fused_resnet.depth import report
    from fused_resnet.train.state import write_whole

    summary = {**provenance("depth", "cpu"), **report.summarise(config, parts)}
    write_whole(folder / "report.json", json.dumps(summary, allow_nan=False))
    write_whole(folder / "report.md", report.markdown(summary))
    plots = report.plot(summary, folder) or ["no plots (pip install matplotlib)"]
    lines = [
        f"{'shown' if c['shown'] else 'not shown'}: {c['claim']}. {c['words']}"
        for c in summary["claims"]
    ]
    return [*lines, f"{folder}: report.md, report.json, {', '.join(plots)}"]
