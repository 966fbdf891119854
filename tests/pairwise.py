"""Fewer combinations of a test's parameters, for tests marked `pairwise`.

Per backend, each value of a parameter meets each value of every other (Cohen et al. 1997, "The AETG
System"), instead of every combination. Faults that need three particular values at once are rare;
the mutation tables (tests/mutations) say which tests must notice what, and a marker may ask for
`strength` values at once instead of two. In Triton's interpreter, where a test takes up to a
hundred times as long, each value occurs once, in at most `interpreted` tests where the marker gives
that. `pytest --all-combinations` runs everything.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import pytest


def is_interpreted(params: dict[str, Any]) -> bool:
    return params.get("backend") == "triton" and params.get("device", "cpu") == "cpu"


def tuples_of(params: dict[str, Any], strength: int) -> list[Any]:
    """Every `strength` values of the parameters. Values are told apart by how they print."""
    values = sorted((name, repr(value)) for name, value in params.items())
    return list(itertools.combinations(values, min(strength, len(values))))


def chosen(items: list[Any], strength: int, most: int | None) -> list[Any]:
    """Greedily, the items that cover most tuples not covered yet; the same ones each time."""
    tuples = [tuples_of(item.callspec.params, strength) for item in items]
    holders: dict[Any, list[int]] = defaultdict(list)  # of each tuple not covered yet
    for i, mine in enumerate(tuples):
        for one in mine:
            holders[one].append(i)
    new = [len(mine) for mine in tuples]  # how many tuples each item would cover
    found: list[Any] = []
    while holders and (most is None or len(found) < most):
        best = max(range(len(items)), key=new.__getitem__)
        found.append(items[best])
        for one in tuples[best]:
            for i in holders.pop(one, ()):
                new[i] -= 1
    return found


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what `chosen` leaves out."""
    if config.getoption("--all-combinations"):
        return
    groups: dict[Any, list[Any]] = defaultdict(list)
    for item in items:
        spec: Any = getattr(item, "callspec", None)
        if spec is not None and item.get_closest_marker("pairwise"):
            name = item.nodeid.partition("[")[0]
            groups[name, spec.params.get("backend"), spec.params.get("device")].append(item)
    left_out: set[Any] = set()
    for group in groups.values():
        marker = group[0].get_closest_marker("pairwise")
        strength, most = marker.kwargs.get("strength", 2), None
        if is_interpreted(group[0].callspec.params):
            strength, most = 1, marker.kwargs.get("interpreted")
        left_out |= set(group) - set(chosen(group, strength, most))
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
