"""Models of this package under torch.compile: one op in inference, the compiler's own graph where
that does not serve."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.kernels import native
from fused_resnet.kernels.cpu.convolution import NativeConv
from fused_resnet.layers.planned import NUMBER
from tests.models.model_helpers import agree, images, pair, randomise

pytestmark = pytest.mark.skipif(native.load() is not None, reason="no native kernels")
OP = torch.ops.fused_resnet.module_inference.default


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Recorder:
    """A backend that keeps the graphs that it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, gm: Any, _: Any) -> Any:
        self.graphs.append(gm.graph)
        return gm.forward

    @property
    def ops(self) -> int:
        """The number of our ops in the last graph; -1 if it has convolutions too."""
        targets = [n.target for n in self.graphs[-1].nodes]
        called = targets.count(torch.ops.fused_resnet.module_inference)
        called += targets.count(OP)
        return -1 if torch.conv2d in targets else called


def compiled(model: Any, **options: Any) -> tuple[Any, Recorder]:
    recorder = Recorder()
    return torch.compile(model, backend=recorder, fullgraph=True, **options), recorder


def cifar() -> nn.Module:
    return randomise(fr.cifar_resnet(20)).eval()


MODELS: dict[str, Any] = {
    "basic": lambda: pair()[1], "bottleneck": lambda: pair("bottleneck")[1],
    "grouped": lambda: pair("grouped")[1], "cifar": cifar,
    "preact": lambda: randomise(fr.PreactResNet(20)).eval(),
    "block": lambda: nn.Sequential(randomise(fr.BasicBlock(3, 3)).eval(), nn.Flatten()),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_is_one_op(name: str, dtype: torch.dtype) -> None:
    """Bitwise what the uncompiled model computes, for all sizes, in every layout."""
    model = MODELS[name]().to(dtype)
    mine, recorder = compiled(model)
    for count, size in ((2, 64), (3, 64), (2, 32)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = images(count, size).to(dtype).contiguous(memory_format=layout)
            with torch.no_grad():
                found, want = mine(x), model(x)
            assert torch.equal(found, want) and found.stride() == want.stride()
    assert recorder.ops == 1


def test_weights_are_operands_where_a_graph_may_write_them() -> None:
    """Not in the module's own forward: Dynamo would guard each at every call."""
    _, model = pair()
    for function, count in ((model, 0), (lambda x: model(x) * 2, len(model.state_dict()))):
        mine, recorder = compiled(function)
        with torch.no_grad():
            mine(images())
        (op,) = [n for n in recorder.graphs[-1].nodes if n.target in (OP, OP.overloadpacket)]
        assert len(op.args[1]) == count


def test_weights_are_packed_once() -> None:
    """Compiled and uncompiled calls share them."""
    _, model = pair()
    packed: list[Any] = []
    original = NativeConv.__init__
    mine, _ = compiled(model)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(NativeConv, "__init__", lambda *a: packed.append(a) or original(*a))
        for size in (64, 64, 32):
            mine(images(size=size))
        count = len(packed)
        model(images())
    assert count == len(packed) > 8


def test_opcheck() -> None:
    _, model = pair()
    tensors = [*(p.detach() for p in model.parameters()), *model.buffers()]
    torch.library.opcheck(OP, (images(size=32), tensors, getattr(model, NUMBER), None))


CHANGES: dict[str, Any] = {
    "written": lambda m: m.layer1[0].conv1.weight.mul_(2),
    "data": lambda m: m.bn1.running_mean.data.add_(1),
    "assigned": lambda m: m.load_state_dict(
        {k: t * 1.25 if t.is_floating_point() else t for k, t in m.state_dict().items()},
        assign=True,
    ),
    "replaced": lambda m: setattr(m, "conv1", nn.Conv2d(3, 64, 7, 2, 3, bias=False)),
    "removed": lambda m: setattr(m, "layer4", nn.Sequential(m.layer4[0])),
    "hooked": lambda m: m.layer2.register_forward_hook(lambda *a: a[-1] * 2),
    "reconfigured": lambda m: setattr(m.bn1, "eps", 0.5),
    "head": lambda m: setattr(m, "fc", nn.Linear(m.fc.in_features, 3)),
    "activation": lambda m: setattr(m, "relu", nn.SiLU()),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str) -> None:
    """Whether Dynamo compiles again or not."""
    _, model = pair()
    mine, _ = compiled(model)
    x = images()
    with torch.no_grad():
        mine(x)
        CHANGES[change](model)
        for _ in range(2):
            agree(mine(x), model(x))
        agree(mine(x[:1]), model(x[:1]))


def test_not_where_gradients_are_wanted() -> None:
    """There it is another op: test_compiled_step.py."""
    stock, model = pair()
    mine, recorder = compiled(model)
    for training in (False, True):
        for m in (stock, model):
            m.train(training).zero_grad()
        a, b = mine(images()), stock(images())
        agree(a, b)
        assert recorder.ops == 0
        a.sum().backward(), b.sum().backward()
        for p, q in zip(model.parameters(), stock.parameters(), strict=True):
            agree(p.grad, q.grad, 1e-3)
    model.eval().requires_grad_(False)
    agree(mine(images()), model(images()))  # gradients are enabled, and nothing requires one
    assert recorder.ops == 1
    x = images().requires_grad_()
    mine(x).sum().backward()
    assert recorder.ops == 0 and x.grad is not None


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_portable(strict: bool) -> None:
    _, model = pair()
    with torch.no_grad():
        program = torch.export.export(model, (images(),), strict=strict)
    targets = {str(n.target) for n in program.graph.nodes}
    assert not [t for t in targets if "fused_resnet" in t]
    with torch.no_grad():
        agree(program.module()(images()), model(images()))


def test_subclasses() -> None:
    """One with its own forward is traced, and the blocks in it are ops."""

    class Doubled(fr.ResNet):
        def _forward_impl(self, x: Tensor) -> Tensor:
            return super()._forward_impl(x) * 2

    class Plain(fr.ResNet):
        pass

    for cls, ops in ((Plain, 1), (Doubled, -1)):
        model = randomise(cls(fr.BasicBlock, [1, 1, 1, 1], num_classes=5)).eval()
        mine, recorder = compiled(model)
        with torch.no_grad():
            agree(mine(images()), model(images()))
        assert recorder.ops == ops


def test_writes_in_the_graph_come_first() -> None:
    """The op computes with the tensors that it is given, which the graph may have written."""
    _, model = pair()
    reference = copy.deepcopy(model)

    def step(m: Any, x: Tensor) -> Tensor:
        m.conv1.weight.mul_(0.5)
        return m(x)

    for backend in ("eager", "aot_eager_decomp_partition"):
        mine = torch.compile(step, backend=backend, fullgraph=True)
        with torch.no_grad():
            for _ in range(2):
                agree(mine(model, images()), step(reference, images()))


@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle"])
def test_copies_are_their_own(way: str) -> None:
    _, model = pair()
    if way == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = getattr(copy, way)(model)
    assert getattr(other, NUMBER) != getattr(model, NUMBER)
    assert NUMBER not in model.__getstate__()
    mine = [compiled(m)[0] for m in (model, other)]
    with torch.no_grad():
        agree(mine[1](images()), model(images()))
        if way != "copy":
            other.conv1.weight.zero_()
            agree(mine[1](images()), other(images()))
        agree(mine[0](images()), model(images()))


def test_memory_is_freed() -> None:
    _, model = pair()
    mine, _ = compiled(model)
    with torch.no_grad():
        mine(images())
    weight = weakref.ref(model.conv1.weight)
    del model, mine
    gc.collect()
    assert weight() is None


def test_a_module_that_is_no_more() -> None:
    with pytest.raises(RuntimeError, match="module 1000000 does not exist"):
        OP(images(), [], 1000000, None)


@pytest.mark.slow
def test_by_inductor() -> None:
    _, model = pair()
    mine = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for x in (images(), images(3), images(2, 32)):
            agree(mine(x), model(x))
        model.fc = nn.Linear(model.fc.in_features, 3)
        agree(mine(images()), model(images()))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found, want = mine(images()), model(images())
    assert found.dtype == want.dtype
    torch.testing.assert_close(found, want, rtol=2e-2, atol=2e-2)
