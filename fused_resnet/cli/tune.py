"""`fused-resnet tune`: measure the fastest GPU kernel of each convolution of a model."""

from __future__ import annotations

import itertools
import time
from functools import partial
from typing import Annotated

import typer
from rich.progress import Progress

from .app import Batches, Device, Dtypes, Models, app, batch_sizes, clear_errors, console_for, split


@app.command()
def tune(
    model: Models = ["resnet50"],  # noqa: B006
    batch: Batches = ["256"],  # noqa: B006
    dtype: Dtypes = ["bfloat16"],  # noqa: B006
    device: Device = "cuda",
    seconds: Annotated[
        float | None, typer.Option(help="Stop after this time; a later run continues.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Measure what an earlier run has measured, too.")
    ] = False,
) -> None:
    """Measure which GPU kernel is fastest for each convolution of a model; cache it for later runs.

    Measures CUDA, Triton and cuDNN with every candidate tile; in 16-bit dtypes also the
    convolutions of the gradients. Each output is compared with PyTorch's before it may win. The
    winners are cached in $XDG_CACHE_HOME/fused_resnet (~/.cache/fused_resnet) by GPU, driver,
    PyTorch and Triton version; an interrupted run continues there. Exit status 1 if an output was
    wrong, or if the GPU failed.
    """
    import torch

    from fused_resnet.bench.layers import layers_of
    from fused_resnet.bench.machine import use_device
    from fused_resnet.checks import one_of
    from fused_resnet.kernels import registry, tuning
    from fused_resnet.models.resnet import list_models

    console = console_for()
    with clear_errors():
        models, dtypes = split(model), split(dtype)
        batches = batch_sizes(batch)
        for name in models:
            one_of("--model", name, list_models())
        for name in dtypes:
            one_of("--dtype", name, ["float32", "bfloat16", "float16"])
        target = use_device(device)
        if target.type != "cuda":
            raise ValueError("tune requires a GPU: --device cuda")
        names = [b for b in registry.candidates("conv_bn_relu", "cuda") if b != "reference"]
        if not names:
            raise ValueError(f"tune: {registry.missing('conv_bn_relu', 'triton', 'cuda')}")
    from fused_resnet.bench.report import tuned_table
    from fused_resnet.kernels.measure import measure_on, problems

    providers = [registry.provider(name, "cuda") for name in names]
    measure, end = measure_on(target), None if seconds is None else time.monotonic() + seconds
    wrong: list[str] = []
    for name, size, kind in itertools.product(models, batches, dtypes):
        layers = problems(layers_of(name, size, getattr(torch, kind)), target, providers)
        total = sum(len(tuning.configurations(layer, target, providers)) for layer in layers)
        title = f"{name}, batch {size}, {kind}"
        with Progress(console=console) as progress:
            task = progress.add_task("tiles", total=total)
            advance = partial(progress.advance, task, 1)
            try:
                tuned = tuning.tune(
                    layers,
                    target,
                    providers,
                    measure,
                    lambda *measured, advance=advance: advance(),
                    seconds=None if end is None else end - time.monotonic(),
                    again=again,
                )
            except tuning.Broken as error:
                typer.echo(f"fused-resnet: {error}", err=True)
                raise typer.Exit(1) from None
        console.print(tuned_table(tuned.winners, title))
        wrong += tuned.wrong
        if tuned.write_error:
            console.print(f"cached for this process only: {tuned.write_error}", soft_wrap=True)
        if not tuned.complete:
            console.print(f"{title}: not complete; run it again to continue", soft_wrap=True)
    for line in wrong:
        console.print(line, soft_wrap=True)
    if wrong:
        raise typer.Exit(1)
