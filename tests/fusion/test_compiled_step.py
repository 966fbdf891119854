"""Training of this package's models under torch.compile: the uncompiled step, bit for bit.

In most tests AOTAutograd alone compiles: it functionalises and partitions as for Inductor, and
PyTorch's operations around the step stay what they are uncompiled, so results can be equal."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_resnet as fr
from fused_resnet.fusion import compiled_step
from fused_resnet.fusion.training import network as training
from fused_resnet.fusion.training import units
from fused_resnet.kernels import native
from fused_resnet.layers.planned import NUMBER
from tests.models.model_helpers import agree, images, pair, randomise

pytestmark = pytest.mark.skipif(native.load() is not None, reason="no native kernels")
OPS = torch.ops.fused_resnet


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """How each step ran: "fused" or "composed" of PyTorch's operations."""
    found: list[str] = []
    for name in ("fused", "composed"):
        original = getattr(compiled_step, f"_{name}")

        def note(*args: Any, name: str = name, run: Any = original) -> Any:
            y = run(*args)
            if y is not None:
                found.append(name)
            return y

        monkeypatch.setattr(compiled_step, f"_{name}", note)
    torch.compiler.reset()
    yield found
    torch.compiler.reset()


def norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def step(called: Any, model: nn.Module, x: Tensor) -> list[Any]:
    """The output, all gradients and all buffers of a step."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = called(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    grads = [x.grad, *(p.grad for p in model.parameters())]
    return [y.detach(), *grads, *map(Tensor.clone, model.buffers())]


def equal(found: list[Any], want: list[Any]) -> None:
    for i, (a, b) in enumerate(zip(found, want, strict=True)):
        assert (a is None) == (b is None), i
        if a is not None:
            assert a.dtype == b.dtype and a.stride() == b.stride(), i
            assert torch.equal(a, b), i


def same_steps(
    model: Any, wrap: Callable[[Any], Any] = lambda m: m, context: Any = contextlib.nullcontext,
    compare: Any = equal, counts: tuple[int, ...] = (2, 3), dynamic: bool | None = True,
) -> Any:  # fmt: skip
    """Steps of the compiled and the uncompiled model, with batches of these sizes."""
    reference = copy.deepcopy(model)
    mine = torch.compile(wrap(model), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for i, count in enumerate(counts):
        x = images(count, 64, i)
        with context():
            found, want = step(mine, model, x), step(wrap(reference), reference, x)
        compare(found, want)
    return mine


MODELS: dict[str, Any] = {
    "basic": lambda: pair()[1], "bottleneck": lambda: pair("bottleneck")[1],
    "grouped": lambda: pair("grouped")[1], "cifar": lambda: randomise(fr.cifar_resnet(20)),
    "plain": lambda: randomise(fr.cifar_resnet(20, shortcut="none")),
    "projection": lambda: randomise(fr.cifar_resnet(20, shortcut="projection")),
    "preact": lambda: randomise(fr.PreactResNet(3)),
    "preact bottleneck": lambda: randomise(
        fr.PreactResNet(2, block="preact_bottleneck", shortcut="projection")
    ),
    "block": lambda: nn.Sequential(randomise(fr.BasicBlock(3, 3)), nn.Flatten()),
}  # fmt: skip


QUICK = ("bottleneck", "preact")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MODELS]
)
def test_steps_are_equal(name: str, steps: list[str]) -> None:
    """Without another compilation after the second size, for channels_last images too."""
    model = MODELS[name]().train()
    mine = same_steps(model, counts=(2, 2, 3), dynamic=None)
    assert steps == ["fused"] * 3
    reference = copy.deepcopy(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        equal(step(mine, model, images(5)), step(reference, reference, images(5)))
    x = images(2).contiguous(memory_format=torch.channels_last)
    equal(step(mine, model, x), step(reference, reference, x))


def _frozen(m: Any) -> None:
    for part in (m.conv1, m.bn1, m.layer1):
        part.requires_grad_(False).eval()


def _eval_norms(m: Any) -> None:
    for norm in norms(m):
        norm.eval()


def _cumulative(m: Any) -> None:
    for norm in norms(m):
        norm.momentum = None


def _head(m: Any) -> None:
    m.fc = nn.Sequential(nn.Linear(512, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3))


VARIANTS: dict[str, Any] = {
    "frozen layers": _frozen, "norms in eval": _eval_norms, "eval": lambda m: m.eval(),
    "one norm in eval": lambda m: m.layer2[0].bn1.eval(), "no momentum": _cumulative,
    "another head": _head, "minimal": lambda m: fr.set_activation_memory(m, "minimal"),
    "full": lambda m: fr.set_activation_memory(m, "full"),
    "no gradients": lambda m: m.requires_grad_(False),
    "untracked": lambda m: [setattr(n, "track_running_stats", False) for n in norms(m)],
    "tied": lambda m: m.layer2.append(m.layer2[-1]),
    "a hook on the model": lambda m: m.register_forward_hook(lambda *args: args[-1] * 2),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_settings(name: str, steps: list[str]) -> None:
    model = pair()[1].train()
    VARIANTS[name](model)
    same_steps(model)
    assert steps == ["fused"] * 2


def test_autocast(steps: list[str]) -> None:
    same_steps(pair("bottleneck")[1].train(), context=lambda: torch.autocast("cpu", torch.bfloat16))
    assert steps == ["fused"] * 2


def _checkpointed(m: Any) -> Any:
    return lambda x: checkpoint(m, x, use_reentrant=False)


def _checkpointed_stages(m: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        x = m.maxpool(m.relu(m.bn1(m.conv1(x))))
        for stage in (m.layer1, m.layer2, m.layer3):
            x = checkpoint(stage, x, use_reentrant=False)
        return m.fc(m.avgpool(m.layer4(x)).flatten(1))

    return forward


GRAPHS: dict[str, tuple[Any, int]] = {
    "checkpoint": (_checkpointed, 2), "checkpointed stages": (_checkpointed_stages, 9),
    "two images": (lambda m: lambda x: m(x) + m(x * 2), 2),
    "the same images twice": (lambda m: lambda x: m(x) + torch.relu(m(x)) * 2, 2),
    "before and after": (lambda m: lambda x: m((x * 2 + 1).sigmoid()).softmax(1), 1),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name: str, steps: list[str]) -> None:
    """Running statistics are updated once for each forward, whatever the compiler makes of it."""
    wrap, count = GRAPHS[name]
    same_steps(pair()[1].train(), wrap)
    assert steps == ["fused"] * 2 * count


def test_no_gradients_wanted(steps: list[str]) -> None:
    """Recalibration of statistics."""
    model = pair()[1].train()
    reference = copy.deepcopy(model)
    mine = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for i in range(2):
            equal([mine(images(seed=i))], [reference(images(seed=i))])
    equal(list(model.buffers()), list(reference.buffers()))
    assert steps == ["fused"] * 2 and not compiled_step._steps


def test_several_forwards_before_a_backward() -> None:
    model = pair()[1].train()
    reference, found = copy.deepcopy(model), []
    mine = torch.compile(model, backend="aot_eager", fullgraph=True)
    for called, m in ((mine, model), (reference, reference)):
        losses = [called(images(seed=i)).square().mean() for i in range(3)]
        dropped = called(images(seed=9))  # no backward
        for loss in (losses[1], losses[2], losses[0]):
            loss.backward(retain_graph=True)
        losses[1].backward()
        del dropped, losses, loss
        found.append([p.grad for p in m.parameters()] + list(m.buffers()))
    equal(*found)
    gc.collect()
    assert not compiled_step._steps, "steps outlive what autograd saved"


def test_as_stock_where_it_raises() -> None:
    model = pair()[1].train()
    mine = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = mine(images()).sum()
    with torch.no_grad():
        model.layer3[0].conv2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        mine(images(1, 32))


@pytest.mark.parametrize("by", ["eager", "aot_eager"])
def test_second_derivatives_raise(by: str) -> None:
    model = pair()[1].train()
    x = images().requires_grad_()
    y = torch.compile(model, backend=by, fullgraph=True)(x)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"once|double backward"):
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        g.sum().backward()


def test_hooks_of_parameters_run_once(steps: list[str]) -> None:
    model, calls = pair()[1].train(), []
    mine = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = step(mine, model, images())
    model.load_state_dict(pair()[1].state_dict())
    model.layer1[0].conv1.weight.register_hook(lambda g: calls.append(1) or g * 2)
    after = step(mine, model, images())
    assert calls == [1] and steps == ["fused", "composed"]
    at = 2 + [name for name, _ in model.named_parameters()].index("layer1.0.conv1.weight")
    agree(after[at], before[at] * 2)
    agree(after[at + 1], before[at + 1])


def test_writes_in_the_graph_come_first(steps: list[str]) -> None:
    def wrap(m: Any) -> Any:
        def forward(x: Tensor) -> Tensor:
            with torch.no_grad():
                m.conv1.weight.add_(0.05)  # a factor would not change what a norm returns
                m.bn1.running_mean.mul_(0.5)
            return m(x)

        return forward

    def close(found: list[Any], want: list[Any]) -> None:
        for a, b in zip(found, want, strict=True):
            assert (a is None) == (b is None)
            if a is None:
                continue
            # Measured: 4e-6 of the largest value; PyTorch's norms sum in another order.
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))

    model = pair()[1].train()
    model.conv1.requires_grad_(False)
    same_steps(model, wrap, compare=close)
    assert steps == ["composed"] * 2


def _assigned(m: Any) -> None:
    state = {k: t * 1.25 if t.is_floating_point() else t for k, t in m.state_dict().items()}
    m.load_state_dict(state, assign=True)
    m.requires_grad_()


def _other_buffers(m: Any) -> None:
    norm = nn.BatchNorm2d(64)
    norm.weight, norm.bias = m.bn1.weight, m.bn1.bias
    m.bn1 = norm


CHANGES: dict[str, Any] = {
    "a norm with the same weights": _other_buffers,
    "assigned": _assigned, "data": lambda m: m.conv1.weight.data.mul_(2),
    "a norm in eval": lambda m: m.layer2[0].bn1.eval(), "eval": lambda m: m.eval(),
    "frozen": lambda m: m.layer1.requires_grad_(False),
    "replaced norm": lambda m: setattr(m, "bn1", nn.BatchNorm2d(64)),
    "replaced buffer": lambda m: setattr(m.bn1, "running_mean", torch.ones(64)),
    "momentum": lambda m: setattr(m.bn1, "momentum", 0.5),
    "removed": lambda m: setattr(m, "layer4", nn.Sequential(m.layer4[0])),
    "level": lambda m: fr.set_activation_memory(m, "minimal"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str, steps: list[str]) -> None:
    """And undone: a norm that is switched back trains again."""
    model = pair()[1].train()
    reference = copy.deepcopy(model)
    mine = torch.compile(model, backend="aot_eager", fullgraph=True)
    step(mine, model, images()), step(reference, reference, images())
    for m in (model, reference):
        CHANGES[change](m)
    equal(step(mine, model, images(seed=2)), step(reference, reference, images(seed=2)))
    for m in (model, reference):
        m.train()
    equal(step(mine, model, images(seed=3)), step(reference, reference, images(seed=3)))
    assert steps == ["fused"] * 3


def _plain_weight(m: Any) -> Any:
    weight = m.conv1.weight.detach().clone()
    del m.conv1.weight
    m.conv1.weight = weight
    return m


def _other_part(m: Any) -> Any:
    m.layer1[0] = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    return m


def _gelu(m: Any) -> Any:
    m.relu = nn.GELU()
    return m


LEFT: dict[str, Any] = {
    "synchronised": lambda: fr.BasicBlock(3, 3), "is a GELU": lambda: _gelu(fr.BasicBlock(3, 3)),
    "stochastic depth": lambda: fr.cifar_resnet(8, stochastic_depth=0.5),
    "weight a plain attribute": lambda: _plain_weight(fr.BasicBlock(3, 3)),
    "one of its parts is no block": lambda: _other_part(fr.cifar_resnet(8)),
}  # fmt: skip


@pytest.mark.parametrize("why", LEFT)
def test_what_is_left_to_the_compiler(
    why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """PyTorch's operations are in the graph, and the log says why."""
    model: Any = randomise(LEFT[why]()).train()
    if why == "synchronised":
        monkeypatch.setattr(units, "group_of", lambda bn: bn)
    reference, graphs = copy.deepcopy(model), []
    with caplog.at_level(logging.INFO, "fused_resnet"):
        mine = torch.compile(model, backend=lambda gm, _: graphs.append(gm.graph) or gm.forward)
        torch.manual_seed(0)
        found = step(mine, model, images(2, 32))
    torch.manual_seed(0)
    for a, b in zip(found, step(reference, reference, images(2, 32)), strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()) + 1e-6)
    assert "a training step of" in caplog.text and why in caplog.text
    called = [n.target for graph in graphs for n in graph.nodes]
    assert why == "stochastic depth" or torch.conv2d in called


def test_not_fused_when_it_runs(monkeypatch: pytest.MonkeyPatch, steps: list[str]) -> None:
    """What a compiled step finds changed that no compiler guards."""
    model = pair()[1].train()
    reference = copy.deepcopy(model)
    mine = torch.compile(model, backend="aot_eager", fullgraph=True)
    equal(step(mine, model, images()), step(reference, reference, images()))
    with fr.use_backend("reference"):
        found, want = step(mine, model, images()), step(reference, reference, images())
    original = training.run_step

    def not_in_stage_2(step: Any, x: Tensor) -> Tensor | None:
        return None if x.shape[1] == 128 else original(step, x)

    monkeypatch.setattr(training, "run_step", not_in_stage_2)
    found += step(mine, model, images(seed=2))
    want += step(reference, reference, images(seed=2))
    assert steps == ["fused", "composed", "composed"]
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_weights_that_are_no_parameters() -> None:
    """The op for inference is given parameters and buffers alone."""
    model, graphs = _plain_weight(randomise(fr.BasicBlock(3, 3))).eval(), []
    mine = torch.compile(model, backend=lambda gm, _: graphs.append(gm.graph) or gm.forward)
    with torch.no_grad():
        agree(mine(images()), model(images()))
    assert torch.conv2d in [n.target for n in graphs[0].nodes]


def test_opcheck() -> None:
    model = randomise(fr.BasicBlock(3, 3)).train()
    parameters, buffers = list(model.parameters()), [b.clone() for b in model.buffers()]
    needs, positions = [True] * (1 + len(parameters)), list(range(len(buffers)))
    x = images(size=16).requires_grad_()
    arguments = (x, parameters, buffers, getattr(model, NUMBER), None, needs, positions)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPS.module_step.default, arguments, test_utils=tests)
    y, kept = OPS.module_step(*arguments)
    backward = (torch.ones_like(y), kept, y.detach(), x.detach(), parameters, needs)
    torch.library.opcheck(OPS.module_step_backward.default, backward, test_utils=tests)
    given = (buffers, kept, getattr(model, NUMBER), positions)
    torch.library.opcheck(OPS.module_statistics.default, given, test_utils=tests)
    with pytest.raises(RuntimeError, match="the step is no more"):
        OPS.module_step_backward(y, torch.tensor([1 << 40]), y, x, parameters, needs)


def test_needs_are_those_of_the_graph(steps: list[str]) -> None:
    """The op asks for the gradients that it is told of, whatever a parameter says by now."""
    model = randomise(fr.BasicBlock(3, 3)).train()
    parameters, buffers = list(model.parameters()), list(model.buffers())
    x, needs = images(size=16), [True] * (1 + len(parameters))
    found = []
    for frozen in (False, True):
        model.conv1.requires_grad_(not frozen)
        arguments = (parameters, buffers, getattr(model, NUMBER), None, needs, [0, 1, 2, 3, 4, 5])
        y, kept = OPS.module_step(x, *arguments)
        op = OPS.module_step_backward
        found.append(op(torch.ones_like(y), kept, y.detach(), x, parameters, needs))
    assert steps == ["fused", "composed"] and len(found[1]) == len(needs)
    for a, b in zip(*found, strict=True):
        agree(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bottleneck", "preact"])
def test_by_inductor(name: str, steps: list[str]) -> None:
    """A training loop. Inductor computes the head, whose sums have another order."""
    model = MODELS[name]().train()
    reference, losses = copy.deepcopy(model), []
    mine = torch.compile(model, fullgraph=True)
    target = torch.tensor([1, 3, 5])
    for called, m in ((mine, model), (reference, reference)):
        optimizer = torch.optim.SGD(m.parameters(), 1e-3, momentum=0.9)
        for i in range(4):
            loss = nn.functional.cross_entropy(called(images(3, seed=i)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    assert steps == ["fused"] * 4
    for a, b in zip(losses[:4], losses[4:], strict=True):
        agree(a, b, 1e-4)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        agree(p.detach(), q.detach(), 1e-4)
    for p, q in zip(model.buffers(), reference.buffers(), strict=True):
        agree(p, q, 1e-4) if p.is_floating_point() else torch.testing.assert_close(p, q)
