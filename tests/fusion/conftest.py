"""Fused programs are right by themselves, not because a first call is compared with stock's."""

from __future__ import annotations

import pytest

from fused_resnet.fusion.regions import verify


@pytest.fixture(autouse=True)
def refused(monkeypatch, request):
    """How programs differed from their modules' own calls; only in tests marked `refused` any."""
    reasons: list[str] = []

    def compared(*args, _compared=verify.compared):
        result, why = _compared(*args)
        if why is not None and why is not verify.UNCERTAIN:
            reasons.append(why)
        return result, why

    monkeypatch.setattr(verify, "compared", compared)
    yield reasons
    if request.node.get_closest_marker("refused") is None:
        assert not reasons
