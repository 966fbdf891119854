"""`fused-resnet info`: versions, device and which provider computes each op."""

from __future__ import annotations

from .app import Json, app, console_for, emit


@app.command()
def info(json_target: Json = None) -> None:
    """Versions, device, built kernels, and which provider computes each op and why."""
    from fused_resnet.bench import machine
    from fused_resnet.bench.report import info_tables

    console = console_for(json_target)
    information = machine.info(initialise_cuda=True)
    if json_target != "-":
        for table in info_tables(information):
            console.print(table)
    emit(information, json_target, console)
