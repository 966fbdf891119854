"""isinstance by torchvision's classes, whichever package is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torchvision")

PROGRAM = """
import sys
{first}
import fused_resnet as fr
early = fr.resnet18()
assert ("torchvision" in sys.modules) == {imported}
import torchvision.models.resnet as tv
for model, block in ((early, tv.BasicBlock), (fr.resnet50(), tv.Bottleneck)):
    assert isinstance(model, tv.ResNet) and isinstance(model.layer1[0], block)
assert not isinstance(fr.cifar_resnet(20), tv.ResNet)
assert not any("torchvision_bases" in type(finder).__module__ for finder in sys.meta_path)

# Their methods come last: nothing else changes.
for name in ("BasicBlock", "Bottleneck", "ResNet"):
    ours, theirs = getattr(fr, name), getattr(tv, name)
    order = ours.__mro__
    assert order.index(theirs) == len(order) - 3 and theirs.__mro__[:2] == order[-3:-1]
    for name in vars(theirs):
        if not name.startswith("__") or name == "__init__":
            assert getattr(ours, name) is not vars(theirs)[name] or name in ("expansion",), name
assert list(early.state_dict()) == list(tv.resnet18().state_dict())

class Mine(fr.BasicBlock):
    def __init__(self, *arguments):
        super().__init__(*arguments)

assert isinstance(Mine(8, 8), tv.BasicBlock) and not isinstance(Mine(8, 8), tv.Bottleneck)
"""


@pytest.mark.parametrize("first", ["", "import torchvision"])
def test_isinstance(first):
    program = PROGRAM.format(first=first, imported=bool(first))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_torchvision():
    program = (
        "import sys; sys.modules['torchvision'] = None; import fused_resnet as fr; fr.resnet18()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
