"""`fused-resnet predict`: the classes of images."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import Device, app, clear_errors, console_for, with_bar

if TYPE_CHECKING:
    from torch import Tensor, nn

_READERS = 4  # threads that decode images while the model runs


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of them.")],
    model: Annotated[
        str, typer.Option(help="NAME of this package, torchvision:NAME or timm:NAME.")
    ] = "resnet50",
    weights: Annotated[
        str | None, typer.Option(help="torchvision's weights, such as DEFAULT (downloads them).")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="state_dict file.")] = None,
    labels: Annotated[Path | None, typer.Option(help="File with one class name per line.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of classes per image.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 16,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16 by autocast.")] = (
        "float32"
    ),
    device: Device = "cpu",
    json_target: Annotated[
        str | None,
        typer.Option("--json", help="Write JSON lines to this file; standard output if -."),
    ] = None,
) -> None:
    """The most probable classes of images and of all images in folders.

    An image that cannot be read is named, and the others go on; exit status 2 if none can be read.
    Under torchrun the images are shared out over the processes, and the first prints all results.
    """
    import torch

    from fused_resnet.bench.machine import check_device
    from fused_resnet.checks import one_of

    from .models import build, load

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    console = console_for(json_target)
    with clear_errors():
        one_of("--dtype", dtype, ["float32", "bfloat16", "float16"])
        check_device(device)
        if weights is None and checkpoint is None:
            raise ValueError("predict: pass --weights NAME or --checkpoint FILE")
        paths = _files(images)
        names = labels.read_text().splitlines() if labels else None
        network = build(model, weights)
        if checkpoint is not None:
            load(network, checkpoint, model)
        transform, categories = _of_weights(model, weights)
        names = names or categories
    network = network.to(device).to(memory_format=torch.channels_last)
    mine = paths[rank::world]
    found: list[Any] = []
    errors: list[str] = []
    autocast = dtype != "float32"
    with (
        with_bar(len(mine), "images", console, show=rank == 0) as advance,
        torch.inference_mode(),
        torch.autocast(device.partition(":")[0], getattr(torch, dtype), enabled=autocast),
    ):
        for count, part, tensors in _batches(mine, batch, transform, errors):
            advance(count)
            if tensors is None:
                continue
            found += _classes(network, tensors.to(device), part, top, names)
    found, errors = _gathered(found, errors, paths, world)
    for line in errors:
        typer.echo(f"skipped: {line}", err=True)
    if rank == 0:
        lines = "".join(json.dumps(row) + "\n" for row in found)
        if json_target is None:
            console.print(_table(found))
        elif json_target == "-":
            print(lines, end="")
        else:
            Path(json_target).write_text(lines)
    if rank == 0 and not found:
        typer.echo("fused-resnet: predict: no image could be read", err=True)
        raise typer.Exit(2)


def _files(images: list[Path]) -> list[Path]:
    from fused_resnet.parity.images import _paths

    found = [path for given in images for path in _paths(given)]
    if not found:
        raise ValueError(f"predict: no files in {', '.join(map(str, images))}")
    return list(dict.fromkeys(found))


def _of_weights(model: str, weights: str | None) -> tuple[Callable[[Any], Tensor], Any]:
    """The transform of the images, torchvision's for these weights, and the names of classes."""
    import importlib

    try:
        models = importlib.import_module("torchvision.models")
    except Exception:  # not installed, or built for another torch
        from fused_resnet.parity.images import preprocess

        return preprocess, None
    if weights is not None and not model.startswith("timm:"):
        member = models.get_model_weights(model.rpartition(":")[2])[weights]
        return member.transforms(), member.meta.get("categories")
    presets = importlib.import_module("torchvision.transforms._presets")
    return presets.ImageClassification(crop_size=224), None


def _batches(
    paths: list[Path], size: int, transform: Callable[[Any], Tensor], errors: list[str]
) -> Iterator[tuple[int, list[Path], Tensor | None]]:
    """The number of files of each batch, the paths of those that could be read, and their images
    (N, 3, H, W)."""
    import torch

    from fused_resnet.parity.images import open_rgb

    def read(path: Path) -> tuple[Path, Tensor | str]:
        try:
            return path, transform(open_rgb(path))
        except Exception as error:  # decoders may raise anything
            return path, str(error).strip().splitlines()[0] if str(error) else type(error).__name__

    with ThreadPoolExecutor(_READERS) as readers:
        pending: list[Any] = []
        remaining = iter(paths)

        def begin() -> bool:
            part = list(islice(remaining, size))
            if part:
                pending.append([readers.submit(read, path) for path in part])
            return bool(part)

        begin(), begin()
        while pending:
            results = [future.result() for future in pending.pop(0)]
            begin()
            errors += [f"{path}: {why}" for path, why in results if isinstance(why, str)]
            good = [(path, t) for path, t in results if not isinstance(t, str)]
            tensors = torch.stack([t for _, t in good]) if good else None
            yield len(results), [path for path, _ in good], tensors


def _classes(
    network: nn.Module, tensors: Tensor, paths: list[Path], top: int, names: list[str] | None
) -> list[dict[str, Any]]:
    import torch

    logits = network(tensors.contiguous(memory_format=torch.channels_last))
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise typer.BadParameter("--model must be a classifier")
    best = logits.float().softmax(1).topk(min(top, logits.shape[1]), 1)
    rows = []
    for path, chances, classes in zip(paths, *(t.tolist() for t in best), strict=True):
        entries = [
            {"class": k, "label": names[k] if names and k < len(names) else str(k),
             "probability": round(p, 6)}
            for k, p in zip(classes, chances, strict=True)
        ]  # fmt: skip
        rows.append({"image": str(path), "top": entries})
    return rows


def _gathered(
    found: list[Any], errors: list[str], paths: list[Path], world: int
) -> tuple[list[Any], list[str]]:
    """The results of all processes in the order of the paths, in the first process; none in the
    others."""
    if world > 1:
        from torch import distributed as dist

        dist.init_process_group("gloo")
        parts: list[Any] = [None] * world
        dist.gather_object((found, errors), parts if dist.get_rank() == 0 else None)
        first = dist.get_rank() == 0
        dist.destroy_process_group()
        if not first:
            return [], []
        found = [row for part in parts for row in part[0]]
        errors = [line for part in parts for line in part[1]]
    order = {str(path): i for i, path in enumerate(paths)}
    return sorted(found, key=lambda row: order[row["image"]]), errors


def _table(found: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("image", "class", "probability")
    for row in found:
        for i, entry in enumerate(row["top"]):
            image = row["image"] if i == 0 else ""
            table.add_row(image, entry["label"], f"{entry['probability']:.1%}")
    return table
