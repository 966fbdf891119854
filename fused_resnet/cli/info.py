"""fused-resnet info"""

from __future__ import annotations

from .app import Json, app, console_for, emit


@app.command()
def info(json_target: Json = None) -> None:
    """Versions, device, what was built, which backend serves which op and why."""
    from fused_resnet.bench import machine
    from fused_resnet.bench.report import info_tables

    console = console_for(json_target)
    found = machine.info()
    if json_target != "-":
        for table in info_tables(found):
            console.print(table)
    emit(found, json_target, console)
