"""Checks of arguments: ValueError that names the argument, what is allowed and what was given."""

from __future__ import annotations

from collections.abc import Collection


def one_of(what: str, value: object, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(allowed)}, got {value!r}")


def at_least(what: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{what} must be at least {least}, got {value}")
