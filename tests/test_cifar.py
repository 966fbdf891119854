"""The networks for small images: the paper's sizes, and fused as exactly as the other family."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fused_resnet as fr
from fused_resnet import native
from fused_resnet.cifar import depth_of
from fused_resnet.parity_runs import stock_path
from fused_resnet.shortcut import PadShortcut
from fused_resnet.tolerance import assert_close, measure_error

LAST = torch.channels_last

# Table 6 of the paper: depth -> millions of parameters.
PAPER = {20: "0.27", 32: "0.46", 44: "0.66", 56: "0.85", 110: "1.7"}


@pytest.mark.parametrize("depth", PAPER)
def test_as_many_parameters_as_in_the_paper(depth):
    millions = sum(p.numel() for p in fr.cifar_resnet(depth).parameters()) / 1e6
    places = len(PAPER[depth].split(".")[1])
    assert f"{millions:.{places}f}" == PAPER[depth]


def test_as_many_layers_as_its_name_says_and_three_sizes():
    model = fr.cifar_resnet(20)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 20
    sizes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda m, i, y: sizes.append(tuple(y.shape[1:])))
    model(torch.randn(2, 3, 32, 32))
    assert sizes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_the_shortcut_is_option_a():
    """Every pixel and channel where the paper puts it, by indices alone."""
    x = torch.arange(2 * 3 * 5 * 4.0).reshape(2, 3, 5, 4)
    shortcut = PadShortcut(3, 7, 2)
    y = shortcut(x)
    assert tuple(y.shape) == shortcut.output_shape(x.shape) == (2, 7, 3, 2)
    for n in range(2):
        for c in range(7):
            for i in range(3):
                for j in range(2):
                    want = x[n, c, 2 * i, 2 * j] if c < 3 else 0.0
                    assert y[n, c, i, j] == want
    with pytest.raises(ValueError, match="out_channels must be at least in_channels, 4, got 3"):
        PadShortcut(4, 3, 1)


def randomised(depth: int = 14) -> nn.Module:
    torch.manual_seed(0)
    model = fr.cifar_resnet(depth)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(0, 0.3)
                m.running_mean.normal_(0, 0.2)
                m.running_var.uniform_(0.5, 1.5)
    return model


def stepped(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    y.square().mean().backward()
    found = {"output": y.detach(), "dx": x.grad}
    found |= {f"d{n}": p.grad for n, p in model.named_parameters()}
    return found | {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("size", [(32, 32), (13, 11)], ids=str)
def test_training_is_fused_and_exact(size, layout):
    model = randomised()
    x = torch.randn(6, 3, *size).contiguous(memory_format=layout)
    exact = copy.deepcopy(model).double()
    both = (torch.contiguous_format, LAST)  # stock's worse layout counts, as for whole models
    stock = [copy.deepcopy(model) for _ in both]
    if native.load() is None:
        assert {e.path for e in fr.explain(model)} == {"training"}
    with stock_path():
        want = stepped(exact, x.double())
        theirs = [
            stepped(m, x.contiguous(memory_format=f)) for m, f in zip(stock, both, strict=True)
        ]
    mine = stepped(model, x)
    for name, value in mine.items():
        worse = max((t[name] for t in theirs), key=lambda t: measure_error(t, want[name]).max_abs)
        assert_close(value, worse, want[name], what=name)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "with gradients"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_running_statistics_are_fused_and_exact(dtype, grad):
    model = randomised().eval()
    x = torch.randn(4, 3, 17, 16)
    if native.load() is None:
        assert {e.path for e in fr.explain(model)} == {"inference"}
    with torch.no_grad(), stock_path():
        exact = copy.deepcopy(model).double()(x.double())
    model, x = model.to(dtype), x.to(dtype)
    with torch.set_grad_enabled(grad):
        mine = model(x)
        with stock_path():
            theirs = model(x)
    assert_close(mine, theirs, exact)


@pytest.mark.skipif(native.load() is not None, reason="memory levels are of the fused path")
def test_every_memory_level_gives_the_same_bits():
    x = torch.randn(4, 3, 16, 16)
    kept = None
    for level in ("full", "low", "lower", "minimal"):
        model = randomised(20)
        fr.set_activation_memory(model, level)
        found = stepped(model, x)
        kept = kept or found
        assert all(torch.equal(found[n], kept[n]) for n in kept), level


def test_a_changed_shortcut_is_honoured():
    """Another module in its place runs the block's own path; a hook on it is called."""
    model = randomised(8).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(x)
        calls = []
        handle = model.layer2[0].downsample.register_forward_hook(lambda *a: calls.append(1))
        assert torch.allclose(model(x), before, atol=1e-5) and calls == [1]
        handle.remove()

        class Doubled(PadShortcut):
            def forward(self, x):
                return 2 * super().forward(x)

        model.layer2[0].downsample = Doubled(16, 32, 2)
        changed = model(x)
        with stock_path():
            want = model(x)
    assert (changed - before).abs().max() > 0.01
    assert torch.allclose(changed, want, atol=1e-5)


def test_copies_and_state_are_whole():
    model = randomised(8).eval()
    x = torch.randn(2, 3, 8, 8)
    other = fr.cifar_resnet(8).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        y = model(x)
        for same in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(same(x), y)


def test_the_gradient_of_the_shortcut_reaches_the_input():
    """With the residual branch at zero, the block is relu(shortcut), and so is its gradient."""
    block = fr.cifar_resnet(8).layer2[0]
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(3, 16, 6, 6, requires_grad=True)
    y = block(x)
    assert torch.equal(y, F.relu(PadShortcut(16, 32, 2)(x)))
    y.sum().backward()
    want = torch.zeros_like(x)
    want[:, :, ::2, ::2] = (x[:, :, ::2, ::2] > 0).float()
    assert torch.equal(x.grad, want)


@pytest.mark.parametrize(
    ("depth", "words"),
    [(19, "14 or 20, got 19"), (0, "8 or 14"), (111, "110 or 116"), ("20", "got '20'")],
)
def test_depths_that_do_not_exist_name_the_nearest(depth, words):
    with pytest.raises(ValueError, match=f"depth must be 6n \\+ 2, as .*{words}"):
        fr.cifar_resnet(depth)


def test_names():
    assert [depth_of(f"resnet{n}") for n in (20, 110, 1202)] == [20, 110, 1202]
    assert [depth_of(n) for n in ("resnet50", "resnet18", "vgg16")] == [None] * 3
    # ResNet-50 is of the other family, though 50 = 6 * 8 + 2.
    with pytest.raises(ValueError, match=r"no ResNet has 51 layers.* 44 or 56"):
        depth_of("resnet51")
