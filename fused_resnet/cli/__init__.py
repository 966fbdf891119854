"""The `fused-resnet` command. Its subcommands are in commands.py, which needs the cli extra."""

from __future__ import annotations

import importlib.util
import sys

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


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exits with status 2 where typer or rich is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"fused-resnet: {' and '.join(missing)} missing: pip install fused-resnet[cli]",
            file=sys.stderr,
        )
        sys.exit(2)
    from . import depth as depth_command  # noqa: F401 - register their commands
    from . import train as train_command  # noqa: F401
    from .commands import app

    app(args=_arguments(sys.argv[1:] if argv is None else argv), prog_name="fused-resnet")
