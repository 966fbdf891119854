"""How many functions of this package a forward and a training step call: a forward asks once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import fused_resnet as fr
from fused_resnet.kernels import native

PACKAGE = str(Path(fr.__file__).parent)

pytestmark = pytest.mark.skipif(native.load() is not None, reason="needs the native kernels")


def calls(run: Callable[[], object]) -> list[str]:
    """The file of each call of a function of this package, comprehensions included."""
    seen: list[str] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            seen.append(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    return seen


def test_inference_of_resnet50():
    """Measured, in a process of its own: 2,967 and 40 calls; all blocks run by one op."""
    model, x = fr.resnet50().eval(), torch.randn(1, 3, 64, 64)

    def forward() -> None:
        with torch.no_grad():
            model(x)

    first, later = len(calls(forward)), len(calls(forward))
    assert first <= 3000 and later <= 60, (first, later)


def test_training_step_of_resnet50():
    """Measured: 244 calls, 17 blocks and the stem, forward and backward."""
    model, x = fr.resnet50().train(), torch.randn(2, 3, 64, 64)

    def step() -> None:
        model(x).sum().backward()

    step()
    assert len(calls(step)) <= 500


def test_training_step_of_resnet50_with_frozen_norms():
    """Measured: 2,377 calls, of which the norms' weights, which require gradients, cause most."""
    model, x = fr.resnet50().eval(), torch.randn(2, 3, 64, 64)

    def step() -> None:
        model(x).sum().backward()

    step()
    assert len(calls(step)) <= 2700


def test_the_way_of_x_through_inference():
    """Following x from `ResNet.forward`: at most 8 files, each entered from one place in the code
    (a loop over blocks enters it again from there)."""
    model, x = fr.resnet50().eval(), torch.randn(1, 3, 64, 64)
    entered: dict[str, set[tuple[str, int]]] = {}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code, caller = frame.f_code, frame.f_back
        if event != "call" or not code.co_filename.startswith(PACKAGE) or caller is None:
            return
        arguments = [frame.f_locals[n] for n in code.co_varnames[: code.co_argcount]]
        if not any(isinstance(a, torch.Tensor) and a.dim() == 4 for a in arguments):
            return
        where = caller.f_code.co_filename, caller.f_lineno
        places = entered.setdefault(code.co_filename.removeprefix(PACKAGE), set())
        if where[0] != code.co_filename:
            places.add(where)

    with torch.no_grad():
        model(x)
        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            model(x)
        finally:
            sys.setprofile(before)
    assert len(entered) <= 8, sorted(entered)
    twice = {file: places for file, places in entered.items() if len(places) > 1}
    assert not twice, twice
