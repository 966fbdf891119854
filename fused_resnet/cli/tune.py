"""`fused-resnet tune`: measure the fastest GPU kernel of each convolution of a model."""

from __future__ import annotations

import itertools
from functools import partial

from rich.progress import Progress

from .app import Batches, Device, Dtypes, Models, app, batch_sizes, clear_errors, console_for, split


@app.command()
def tune(
    model: Models = ["resnet50"],  # noqa: B006
    batch: Batches = ["256"],  # noqa: B006
    dtype: Dtypes = ["bfloat16"],  # noqa: B006
    device: Device = "cuda",
) -> None:
    """Measure which GPU kernel is fastest for each convolution of a model; cache it for later runs.

    Measures CUDA, Triton and cuDNN with every candidate tile; in 16-bit dtypes also the
    convolutions of the gradients. The winners are cached in $XDG_CACHE_HOME/fused_resnet
    (~/.cache/fused_resnet) by GPU, driver, PyTorch and Triton version.
    """
    import torch

    from fused_resnet.bench.layers import layers_of
    from fused_resnet.bench.machine import check_device
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
        check_device(device)
        if torch.device(device).type != "cuda":
            raise ValueError("tune requires a GPU: --device cuda")
        names = [b for b in registry.candidates("conv_bn_relu", "cuda") if b != "reference"]
        if not names:
            raise ValueError(f"tune: {registry.missing('conv_bn_relu', 'triton', 'cuda')}")
    from fused_resnet.bench.report import tuned_table
    from fused_resnet.kernels.measure import measure_on, problems

    target = torch.device(device)
    providers = [registry.provider(name, "cuda") for name in names]
    for name, size, kind in itertools.product(models, batches, dtypes):
        layers = problems(layers_of(name, size, getattr(torch, kind)), target, providers)
        total = sum(len(tuning.configurations(layer, target, providers)) for layer in layers)
        with Progress(console=console) as progress:
            task = progress.add_task("tiles", total=total)
            advance = partial(progress.advance, task, 1)
            winners, not_cached = tuning.tune(
                layers,
                target,
                providers,
                measure_on(target),
                lambda *measured, advance=advance: advance(),
            )
        console.print(tuned_table(winners, f"{name}, batch {size}, {kind}"))
        if not_cached:
            console.print(f"cached for this process only: {not_cached}", soft_wrap=True)
