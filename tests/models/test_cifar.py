"""Networks for CIFAR: the papers' sizes and formulas, every kind of block and shortcut, and
stochastic depth."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.bench.contenders import Step
from fused_resnet.bench.memory import saved_bytes
from fused_resnet.fusion import run_norm
from fused_resnet.fusion.training import activation_memory
from fused_resnet.layers.shortcut import PadShortcut
from fused_resnet.tolerance import assert_close
from tests.fusion.training.training_helpers import LAST, needs_native
from tests.ops.op_cases import lifted

KINDS = list(
    itertools.product(("basic", "preact", "preact_bottleneck"), ("identity", "projection", "none"))
)


def make(block: str = "basic", shortcut: str = "identity", depth: int = 20, **options: Any) -> Any:
    """A network with affine parameters and statistics like a trained one's."""
    torch.manual_seed(0)
    model = fr.cifar_resnet(depth, 10, shortcut, block, **options)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(0, 0.3)
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 2)
    return model.to(memory_format=LAST)


def images(N: int = 2, size: int = 16) -> Tensor:
    x = torch.randn(N, 3, size, size, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=LAST)


def by_the_papers(model: Any, x: Tensor, block: str, shortcut: str) -> Tensor:
    """The network's formula, in eval or training mode, from its parameters only."""

    def norm(bn: nn.BatchNorm2d, h: Tensor) -> Tensor:
        if model.training:
            return F.batch_norm(h, None, None, bn.weight, bn.bias, training=True)
        return F.batch_norm(h, bn.running_mean, bn.running_var, bn.weight, bn.bias)

    def conv(c: nn.Conv2d, h: Tensor, stride: int = 1) -> Tensor:
        return F.conv2d(h, c.weight, None, stride, c.weight.shape[2] // 2)

    def pad(h: Tensor, K: int, stride: int) -> Tensor:
        y = torch.zeros(len(h), K, -(-h.shape[2] // stride), -(-h.shape[3] // stride)).to(h)
        y[:, : h.shape[1]] = h[:, :, ::stride, ::stride]
        return y

    bottleneck, preact = block == "preact_bottleneck", block != "basic"
    x = conv(model.conv1, x)
    if not preact:
        x = norm(model.bn1, x).relu()
    for i, stage in enumerate((model.layer1, model.layer2, model.layer3)):
        for j, b in enumerate(stage):
            stride = 2 if i > 0 and j == 0 else 1
            changes = j == 0 and (i > 0 or bottleneck)
            h = norm(b.bn1, x).relu() if preact else conv(b.conv1, x, stride)
            # He et al. 2016, appendix: the network's first activation is shared.
            shared = preact and ((i == j == 0) or (changes and shortcut == "projection"))
            start = h if shared else x
            if bottleneck:
                h = norm(b.bn2, conv(b.conv1, h)).relu()
                h = conv(b.conv3, norm(b.bn3, conv(b.conv2, h, stride)).relu())
            elif preact:
                h = conv(b.conv2, norm(b.bn2, conv(b.conv1, h, stride)).relu())
            else:
                h = norm(b.bn2, conv(b.conv2, norm(b.bn1, h).relu()))
            if shortcut != "none":
                if not changes:
                    s = start
                elif shortcut == "identity":
                    s = pad(start, h.shape[1], stride)
                elif preact:
                    s = conv(b.downsample, start, stride)
                else:
                    s = norm(b.downsample[1], conv(b.downsample[0], start, stride))
                h = h + s
            x = h if preact else h.relu()
    if preact:
        x = norm(model.bn, x).relu()
    return model.fc(x.mean((2, 3)))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("block", "shortcut"), KINDS)
def test_the_papers_formula(block, shortcut, train):
    model = make(block, shortcut).train(train)
    x = images()
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        want = by_the_papers(exact, lifted(x), block, shortcut)
        y = copy.deepcopy(model)(x)
        with fr.use_backend("reference"):
            stock = copy.deepcopy(model)(x)
    assert_close(y, stock, want)
    assert len({e.path for e in fr.explain(model)}) == 1
    with torch.no_grad():
        z = copy.deepcopy(model)(x.contiguous())
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "block", "millions"),
    [
        (20, "basic", "0.27"), (32, "basic", "0.46"), (44, "basic", "0.66"),
        (56, "basic", "0.85"), (110, "basic", "1.7"), (1202, "basic", "19.4"),
        (110, "preact", "1.7"), (164, "preact_bottleneck", "1.7"),
        (1001, "preact_bottleneck", "10.3"),
    ],
)  # fmt: skip
def test_parameters_as_in_the_papers(depth, block, millions):
    """He et al. 2015, table 6; He et al. 2016, table 4 (10.2 for 1001 layers, computed 10.29)."""
    with torch.device("meta"):
        model = fr.cifar_resnet(depth, block=block)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert f"{count:.{len(millions.split('.')[1])}f}" == millions
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    assert layers == depth


def test_a_plain_network_has_the_same_layers():
    for block in ("basic", "preact", "preact_bottleneck"):
        residual, plain = make(block), make(block, "none")
        assert residual.state_dict().keys() == plain.state_dict().keys()
        plain.load_state_dict(residual.state_dict())


@pytest.mark.parametrize("block", ["basic", "preact", "preact_bottleneck"])
def test_a_block_starts_as_its_shortcut(block):
    model = make(block, zero_init_residual=True).eval()
    with torch.no_grad():
        for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            bn.bias.zero_()
        if block == "basic":
            for stage in model.stages():
                for b in stage:
                    b.bn2.weight.zero_()  # overwritten by `make`
        x = torch.rand(2, 16 if block != "preact_bottleneck" else 64, 8, 8)
        assert torch.equal(model.layer1[1](x), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 21}, "depth must be 6n \\+ 2, as 20 or 26, got 21"),
        ({"depth": 5}, "as 8 or 14, got 5"),
        ({"depth": 20.0}, "depth must be 6n"),
        ({"depth": True}, "depth must be 6n"),
        ({"depth": 110, "block": "preact_bottleneck"}, "9n \\+ 2, as 110 or 119") ,
        ({"depth": 111, "block": "preact_bottleneck"}, "9n \\+ 2, as 110 or 119, got 111"),
        ({"depth": 20, "shortcut": "A"}, "shortcut must be one of identity, projection, none"),
        ({"depth": 20, "block": "bottleneck"}, "block must be one of basic, preact"),
        ({"depth": 20, "stochastic_depth": 1.0}, "stochastic_depth must be in \\[0, 1\\)"),
        ({"depth": 20, "shortcut": "none", "stochastic_depth": 0.5}, "needs a shortcut"),
    ],
)  # fmt: skip
def test_invalid_arguments(arguments, message):
    if arguments["depth"] == 110:  # 110 = 9n + 2 is valid
        assert len(fr.cifar_resnet(**arguments).layer1) == 12
        return
    with pytest.raises(ValueError, match=message):
        fr.cifar_resnet(**arguments)
    with pytest.raises(ValueError, match="out_channels must be at least in_channels, 8, got 4"):
        PadShortcut(8, 4, 1)


@pytest.mark.parametrize(
    ("cls", "block", "allowed"),
    [
        (fr.CifarResNet, "preact", "basic"),
        (fr.PreactResNet, "basic", "preact or preact_bottleneck"),
        (fr.PreactResNet, "", "preact or preact_bottleneck"),
    ],
)  # fmt: skip
def test_blocks_of_the_other_network(cls, block, allowed):
    message = f"{cls.__name__}: block must be {allowed}, got {block!r}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        cls(1, block=block)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("block", "shortcut"), KINDS)
def test_scripted(block, shortcut, training, tmp_path):
    """torch.jit.script gives the modules' outputs and running statistics, also after saving and
    loading."""
    model = make(block, shortcut).train(training)
    x = images()
    torch.jit.script(copy.deepcopy(model)).save(tmp_path / "model.pt")
    scripted = torch.jit.load(tmp_path / "model.pt")
    with fr.use_backend("reference"):
        want = model(x)
    torch.testing.assert_close(scripted(x), want)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(dict(scripted.named_buffers())[name], buffer)


def test_scripted_stochastic_depth():
    """It raises in training mode, where a scripted block would never be dropped."""
    model = fr.cifar_resnet(8, stochastic_depth=0.5).eval()
    x = images()
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(torch.jit.Error, match="stochastic_depth is not supported"):
        scripted.train()(x)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("block", "shortcut"), KINDS)
def test_levels_save_less_and_are_bitwise_equal(block, shortcut, dtype):
    model, x = make(block, shortcut, depth=29 if block[-1] == "k" else 20).train(), images(2, 8)
    results: dict[str, Any] = {}
    for level in activation_memory.LEVELS:
        fr.set_activation_memory(model, level)
        one = copy.deepcopy(model)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            saved = saved_bytes(Step(lambda one=one: one(x).float().sum(), one))
            one = copy.deepcopy(model)
            one(x).float().square().mean().backward()
        results[level] = (saved, [p.grad for p in one.parameters()], list(one.buffers()))
    sizes = [results[level][0] for level in ("full", "low", "minimal")]
    assert sizes[0] > sizes[1] > sizes[2]
    for level in activation_memory.LEVELS[1:]:
        for i in (1, 2):
            assert all(map(torch.equal, results["full"][i], results[level][i])), level


# --- stochastic depth -----------------------------------------------------------------------------


def test_survival_decreases_linearly():
    model = make(stochastic_depth=0.5)
    survival = [b.survival for stage in model.stages() for b in stage]
    assert survival == pytest.approx([1 - 0.5 * (i + 1) / 9 for i in range(9)])


def drop(monkeypatch: pytest.MonkeyPatch, dropped: set[int]) -> None:
    """Makes the following forwards drop the blocks of these indices."""
    monkeypatch.setattr(
        "fused_resnet.models.cifar.torch.rand",
        lambda n, **_: torch.tensor([1.0 if i in dropped else 0.0 for i in range(n)]),
    )


@pytest.mark.parametrize("level", ["full", "minimal"])
@pytest.mark.parametrize(("block", "shortcut"), [k for k in KINDS if k[1] != "none"])
def test_a_dropped_block_costs_nothing(block, shortcut, level, monkeypatch):
    """It is not computed, saves nothing and gets no gradient; the other branches are scaled."""
    model = make(block, shortcut, stochastic_depth=0.5).train()
    fr.set_activation_memory(model, level)
    count = sum(map(len, model.stages()))
    dropped = {1, count // 3, count - 1}  # the second changes the shape
    drop(monkeypatch, dropped)
    x = images()
    mine, stock = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    y = mine(lifted(x))
    y.square().mean().backward()
    blocks = [b for stage in stock.stages() for b in stage]
    with fr.use_backend("reference"):
        h = stock.conv1(lifted(x))
        h = stock.relu(stock.bn1(h)) if block == "basic" else h
        for i, b in enumerate(blocks):
            if i in dropped:
                h = b.skip(h)
                continue
            last: Any = b.bn2 if block == "basic" else getattr(b, "conv3", b.conv2)
            b.survival, scale = 1.0, b.survival
            scaled = {n: p / scale for n, p in last.named_parameters()}
            name = next(n for n, m in b.named_children() if m is last)
            state = {f"{name}.{n}": p for n, p in scaled.items()}
            h = torch.func.functional_call(b, state, h)
        h = h if block == "basic" else stock.relu(stock.bn(h))
        want = stock.fc(h.mean((2, 3)))
    want.square().mean().backward()
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    for (name, p), (_, q) in zip(mine.named_parameters(), stock.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-10)
    for p, q in zip(mine.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(p, q)
    if level == "full":
        drop(monkeypatch, set(range(count)))
        few = saved_bytes(Step(lambda: model(x).sum(), model))
        drop(monkeypatch, set(range(count)) - {2})
        one = saved_bytes(Step(lambda: model(x).sum(), model))
        assert few < one


@pytest.mark.parametrize("level", ["full", "minimal"])
def test_survivors_are_scaled_where_stock_divides(level):
    """In training mode also with a frozen norm, unit by unit; in eval mode never, also by batch
    statistics."""
    torch.manual_seed(0)
    norm = functools.partial(nn.BatchNorm2d, track_running_stats=False)
    block = fr.models.cifar.CifarBlock(16, 16, norm_layer=norm).double()
    x = images()[:, :1].repeat(1, 16, 1, 1).double()
    frozen = fr.models.cifar.CifarBlock(16, 16).double()
    frozen.bn1.eval()
    for b, training in ((block, True), (block, False), (frozen, True)):
        b.survival = 0.5
        fr.set_activation_memory(b, level)
        norms = [b.bn1.training, b.bn2.training]
        b.train(training)
        b.bn1.train(norms[0] and training)
        y = b(lifted(x))
        with fr.use_backend("reference"):
            torch.testing.assert_close(y, copy.deepcopy(b)(lifted(x)), rtol=1e-9, atol=1e-9)


def test_inference_drops_no_block():
    model, plain = make(stochastic_depth=0.9).eval(), make().eval()
    with torch.no_grad():
        assert torch.equal(model(images()), plain(images()))


# --- what users do with a model -------------------------------------------------------------------


@pytest.mark.parametrize("block", ["basic", "preact"])
def test_changes_take_effect(block):
    """No stale plan: weights, statistics, the shortcut's stride, modes."""
    model, x = make(block).eval(), images()
    edits: list[Any] = [
        lambda: model.layer2[1].conv1.weight.mul_(1.5),
        lambda: model.layer1[0].bn1.running_mean.add_(0.5),
        lambda: model.layer3[0].bn1.weight.neg_(),
        lambda: [setattr(model.layer2[0].downsample, "stride", 1),
                 setattr(model.layer2[0].conv1, "stride", (1, 1))],
        lambda: [model.train()(x), model.eval()],
    ]  # fmt: skip
    with torch.no_grad():
        before = model(x)
        for edit in edits:
            edit()
            now = model(x)
            with fr.use_backend("reference"):
                torch.testing.assert_close(now, model(x), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(before, now)
            before = now


@pytest.mark.parametrize("block", ["basic", "preact"])
def test_saved_copied_and_hooked(block):
    model, x = make(block).train(), images()
    with torch.no_grad():
        want = copy.deepcopy(model)(x)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), want)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), want)
        seen: list[Any] = []
        model.layer2[0].downsample.register_forward_hook(lambda *a: seen.append(1))
        model.layer1[0].bn2.register_forward_hook(lambda *a: seen.append(2))
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert seen == [2, 1]


def test_other_norms_and_compilers():
    model = fr.cifar_resnet(8, norm_layer=lambda C: nn.GroupNorm(4, C))
    assert not any(e.fused for e in fr.explain(model))
    model(images()).sum().backward()
    bare = fr.cifar_resnet(8, block="preact", norm_layer=lambda C: nn.Identity())
    assert bare(images()).shape == (2, 10)
    plain = make("preact").train()
    exported = torch.export.export(copy.deepcopy(plain).eval(), (images(),)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(images()), plain.eval()(images()), rtol=1e-4, atol=1e-5)


@needs_native
def test_the_last_norm_is_one_op():
    model = make("preact").train()
    y = model(images())
    names, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        names.add(type(node).__name__)
        todo += [n for n, _ in node.next_functions if n is not None]
    assert "NativeBatchNormBackward0" not in names
    assert run_norm(nn.GELU(), model.relu, images()) is None
