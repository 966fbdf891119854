"""The `fused-resnet` command: one file per subcommand. Requires the cli extra."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

NEEDED = ("typer", "rich")


def _arguments(argv: list[str]) -> list[str]:
    """Expand `--json` without a file name to `--json -`, standard output."""
    expanded: list[str] = []
    for index, argument in enumerate(argv):
        expanded.append(argument)
        following = argv[index + 1] if index + 1 < len(argv) else "--"
        if argument == "--json" and following.startswith("--"):
            expanded.append("-")
    return expanded


def application() -> Any:
    """Return the typer application; commands are registered in the order of `--help`."""
    from . import info, explain, predict, parity, bench, tune, demo, depth, train  # noqa: F401, I001 - registers it
    from .app import app

    return app


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exit with status 2 if typer or rich is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"fused-resnet: {' and '.join(missing)} missing: pip install fused-resnet[cli]",
            file=sys.stderr,
        )
        sys.exit(2)
    app = application()
    app(args=_arguments(sys.argv[1:] if argv is None else argv), prog_name="fused-resnet")
