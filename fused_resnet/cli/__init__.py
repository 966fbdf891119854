"""The `fused-resnet` command. Each subcommand is a file; they need the cli extra."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

NEEDED = ("typer", "rich")


def _arguments(argv: list[str]) -> list[str]:
    """`--json` without a file name means standard output."""
    filled: list[str] = []
    for index, argument in enumerate(argv):
        filled.append(argument)
        following = argv[index + 1] if index + 1 < len(argv) else "--"
        if argument == "--json" and following.startswith("--"):
            filled.append("-")
    return filled


def application() -> Any:
    """The typer application with every command, in the order of `fused-resnet --help`."""
    from . import info, parity, bench, tune, demo, depth, train  # noqa: F401, I001 - each registers
    from .app import app

    return app


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exits with status 2 where typer or rich is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"fused-resnet: {' and '.join(missing)} missing: pip install fused-resnet[cli]",
            file=sys.stderr,
        )
        sys.exit(2)
    app = application()
    app(args=_arguments(sys.argv[1:] if argv is None else argv), prog_name="fused-resnet")
