"""`fused-resnet explain`: what is fused in a model, and why the rest is not."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .app import Json, app, clear_errors, console_for, emit


@app.command()
def explain(
    model: Annotated[
        str, typer.Option(help="NAME of this package, torchvision:NAME or timm:NAME.")
    ] = "resnet50",
    size: Annotated[int, typer.Option(min=1, help="Height and width of the image.")] = 224,
    train: Annotated[bool, typer.Option(help="In training mode.")] = False,
    json_target: Json = None,
) -> None:
    """Each part of a model: fused or not, the reason, and its share of the multiplications."""
    import torch
    from rich.table import Table

    import fused_resnet as fr

    from .models import build

    console = console_for(json_target)
    with clear_errors():
        built = build(model)
    built.train(train)
    image = torch.rand(3, size, size)
    detects = type(built).__module__.startswith("torchvision.models.detection")
    x: Any = [image] if detects else image[None].expand(2, -1, -1, -1).contiguous()
    with torch.no_grad():
        found = fr.explain(built, None if detects and train else x)
    table = Table("part", "path", "share", "reason", title=f"{model}: {len(found)} parts")
    for part in found:
        share = "" if part.share is None else f"{part.share:.1%}"
        table.add_row(part.name or "(whole model)", part.path, share, part.reason)
    console.print(table)
    if any(part.share is not None for part in found):
        fused = sum(part.share or 0 for part in found if part.fused)
        console.print(f"fused: {fused:.1%} of the multiplications of all convolutions")
    emit([part._asdict() for part in found], json_target, console)
