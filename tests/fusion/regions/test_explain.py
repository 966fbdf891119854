"""What `explain` says of a call of a fused model is what that call does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.fusion.regions.program import Program
from fused_resnet.fusion.regions.region import regions_of
from fused_resnet.kernels import native
from tests.fusion.regions.region_helpers import Residual, calibrated, conv

pytestmark = pytest.mark.skipif(native.load() is not None, reason="no native kernels")


class Asks(nn.Module):
    """Its forward cannot be traced: each block is a region of its own. The first is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = Residual(), Residual(), Residual()
        self.first.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y if float(y.sum()) > -1e9 else x)


class Reshapes(nn.Module):
    """Its input is no image; its block's is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.block = nn.Linear(16, 16 * 64), Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.linear(x).view(-1, 16, 8, 8))


class Converts(nn.Module):
    """Its block's input has another dtype than its own."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.float() if float(x.sum()) > -1e9 else x)


class Bytes(Converts):
    """In a forward that can be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.float())


class PartlyFrozen(nn.Module):
    """One norm by its running statistics also in training."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = conv(16, 16), conv(16, 16)
        self.n1, self.n2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)

    def train(self, mode: bool = True) -> PartlyFrozen:
        super().train(mode)
        self.n1.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.n2(self.c2(F.relu(self.n1(self.c1(x))).tanh())))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "block": lambda: nn.Sequential(Residual(), Residual()),
    "blocks that decide for themselves": Asks,
    "no image": Reshapes,
    "another dtype inside": Converts,
    "bytes": Bytes,
    "partly frozen": PartlyFrozen,
}


def _hooked(model: nn.Module) -> None:
    model.register_forward_hook(lambda m, args, y: None)


def _hooked_convolution(model: nn.Module) -> None:
    next(m for m in model.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(
        lambda m, args, y: None
    )


def _replaced(model: nn.Module) -> None:
    inner = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    forward = inner.forward
    inner.forward = lambda x: forward(x)  # type: ignore[method-assign]


EDITS: dict[str, Callable[[nn.Module], Any]] = {
    "none": lambda m: None,
    "training": lambda m: m.train(),
    "frozen": lambda m: m.requires_grad_(False),
    "hook": _hooked,
    "hook on a convolution": _hooked_convolution,
    "forward replaced": _replaced,
    "float64": lambda m: m.double(),
    "one norm in training": lambda m: next(
        n for n in m.modules() if isinstance(n, nn.BatchNorm2d)
    ).train(),
}
SETTINGS: dict[str, Callable[[], Any]] = {
    "gradients": contextlib.nullcontext,
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "reference": lambda: fr.use_backend("reference"),
    "vendor": lambda: fr.use_backend("vendor"),
}


def given(name: str, model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    torch.manual_seed(3)
    x = torch.randn(4, 16) if name == "no image" else torch.randn(4, 16, 8, 8)
    if name == "bytes":
        return (x * 20).to(torch.uint8)
    return x.bfloat16() if name == "another dtype inside" else x.to(dtype)


def happened(model: nn.Module) -> set[tuple[str, str]]:
    """(convolution, path) of what the programs that were made for a first call fuse."""
    names = {m: name for name, m in model.named_modules()}
    found = set()
    for *_, region in regions_of(model):
        for program in region._programs.values():
            if not isinstance(program, Program):
                continue
            path = "training" if program.differentiable else "inference"
            for part in program.matched.found:
                if part.nodes[0] in program.reasons:
                    continue
                modules = [program.traced.modules.get(n) for n in part.nodes]
                found |= {(names[m], path) for m in modules if isinstance(m, nn.Conv2d)}
    return found


def _and_homes(name: str) -> list[str]:
    """The module's name, and those of the modules around it: a block is listed by its own."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


@pytest.mark.pairwise
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", MODELS)
def test_explain_says_what_the_call_does(name: str, edit: str, setting: str) -> None:
    model = fr.fuse(calibrated(MODELS[name]()), inplace=True)
    EDITS[edit](model)
    x, buffers = given(name, model), [b.clone() for b in model.buffers()]
    try:
        context = SETTINGS[setting]()
        context.__enter__()
    except RuntimeError as error:
        pytest.skip(str(error))
    with contextlib.ExitStack() as stack:
        stack.push(context)
        told = fr.explain(model, x)
        # Nothing changed, and nothing is kept.
        assert all(map(torch.equal, model.buffers(), buffers)) and not happened(model)
        assert all(p.grad is None for p in model.parameters())
        try:
            model(x)
        except RuntimeError:  # stock's: of dtypes
            assert edit == "float64" and not any(e.fused for e in told)
            return
    assert sum(e.share or 0 for e in told) == pytest.approx(1)
    assert all(e.fused == (not e.reason) for e in told)
    parts = {(e.name, e.path) for e in told if e.fused and e.share}  # with a convolution
    found = happened(model)
    homes = [{(home, path) for home in ("", *_and_homes(conv))} for conv, path in found]
    assert all(home & parts for home in homes) and parts <= set().union(*homes), (told, found)


def test_modules_that_the_call_does_not_reach() -> None:
    model = fr.fuse(calibrated(Asks()))
    listed = {e.name: e for e in fr.explain(model, torch.randn(2, 16, 8, 8))}
    assert listed["first"].path == "inference" and listed["second"].path == "training"
    for name in ("unused.first", "unused.second"):
        assert listed[name].reason == "this call does not reach it" and listed[name].share == 0


def test_a_call_that_raises() -> None:
    """The answer is the reason, as for this package's networks."""
    model = fr.fuse(calibrated(Asks()))
    listed = fr.explain(model, torch.randn(2, 8, 8, 8))
    assert {e.share for e in listed} == {None}
    raised = "the call raises RuntimeError: Given groups=1, weight of size [16, 16, 3, 3]"
    assert listed and all(raised in e.reason and not e.fused for e in listed)
    listed = fr.explain(model, [1, 2])
    assert listed and not any(e.fused for e in listed)
