"""`fused-resnet demo`: parity on photographs and the speedup on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from fused_resnet import testing
from fused_resnet.bench import harness, machine, report
from fused_resnet.kernels import native

from .app import (
    Images,
    Models,
    Threads,
    app,
    clear_errors,
    console_for,
    load_inputs,
    split,
    with_progress,
)

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

IMAGES = 8  # photographs for parity, and the maximum for calibration
BATCHES = (1, 8)
DTYPES = ("float32", "bfloat16")
SETTINGS: dict[str, Any] = {
    "contenders": ("eager", "eager-channels_last", "compile", "fused"),
    "seconds": 4.0,  # per case, but at least `rounds` rounds
    "rounds": 7,
}


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the JSON file and the plot.")] = Path(
        "demo-results"
    ),
    images: Images = None,
    model: Models = ["resnet18", "resnet50"],  # noqa: B006
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda (default: cuda if available).")
    ] = None,
    threads: Threads = None,
) -> None:
    """Parity with torchvision on photographs, then images per second; takes minutes."""
    console = console_for()
    with clear_errors():
        models = split(model) or ["resnet18", "resnet50"]
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        machine.use_device(device)
        torch.set_num_threads(threads or torch.get_num_threads())
        missing = native.load()
        if missing is not None:
            console.print(f"running without native kernels: {missing}", soft_wrap=True)
        parities = _parity(console, models, load_inputs(images, IMAGES, console), device)
        events = harness.run(models, BATCHES, DTYPES, device=device, name="demo", **SETTINGS)
        results = with_progress(events, console)
        results["parity"] = parities
        console.print(report.bench_table(results))
        for line in report.remarks(results):
            console.print(line, soft_wrap=True)
        path = harness.save(results, out)
        title = f"fused_resnet on {report.device_name(results)}"
        title += ": images per second, higher is better"
        plot = report.plot_bench(results, path.with_suffix(".png"), title)
        ratios = [case["contenders"]["fused"]["ratio_to_eager"] for case in results["cases"]]
        conclusion = (
            f"fused_resnet is {1 / max(ratios):.2f} to {1 / min(ratios):.2f} times as fast as the "
            f"faster eager layout on this machine"
        )
        console.print(conclusion, style="bold", soft_wrap=True)
        console.print(f"JSON: {path}\nplot: {plot}", soft_wrap=True)
    if not all(entry["ok"] for entry in parities):
        raise typer.Exit(1)


def _parity(
    console: Console, models: list[str], inputs: Tensor, device: str
) -> list[dict[str, Any]]:
    """Compare every model in every dtype: one line each, and the full table on failure."""
    from rich.progress import Progress, SpinnerColumn, TextColumn

    parities: list[dict[str, Any]] = []
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=console) as progress:
        task = progress.add_task("")
        for model in models:
            progress.update(task, description=f"{model}: calibrating on {len(inputs)} photographs")
            fused, reference = testing.matched_models(model, inputs, device=device)
            for dtype in DTYPES:
                progress.update(task, description=f"{model} {dtype}: parity with stock PyTorch")
                parity = testing.parity(fused, reference, inputs, getattr(torch, dtype))
                parities.append({"model": model, **parity.to_dict()})
                output, agreement = parity.row("output"), parity.agreement["fused with stock"]
                line = (
                    f"parity {model} {parity.dtype}: {'holds' if parity.ok else 'BROKEN'}; error "
                    f"against float64: stock {output.stock.rms:.1e}, fused {output.fused.rms:.1e}; "
                    f"same top-1 class as stock: {agreement.top1:.0%}"
                )
                console.print(line, soft_wrap=True)
                if not parity.ok:
                    console.print(report.parity_table(parity, f"{model} {dtype}"))
                    console.print(report.verdict(parity), style="bold red")
        progress.update(task, description="parity done")
    return parities
