"""Unusual and invalid inputs: ours returns the value or raises the error of torchvision's."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import fused_resnet as fr
from tests.models.model_helpers import agree, both_ways, images, pair, same_outputs, same_step

NAN, INF = float("nan"), float("inf")


def _outcome(model, x):
    try:
        with torch.no_grad():
            return model(x)
    except Exception as error:
        return error


@both_ways
def test_bfloat16_under_and_without_autocast():
    """A plan that serves bfloat16 under autocast does not accept it without: stock raises then."""
    stock, mine = pair("basic")
    x = images().bfloat16()
    for model in (stock, mine):
        model.fc.bfloat16()  # only the convolutions refuse
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                assert isinstance(_outcome(model, x), torch.Tensor)
            assert isinstance(_outcome(model, x), RuntimeError)


def _train_with(**settings):
    def edit(model):
        model.train()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                for key, value in settings.items():
                    setattr(m, key, value)

    return edit


def _wrong_mean(make):
    def edit(model):
        model.layer1[0].bn1.running_mean = make(model.layer1[0].bn1.running_mean)

    return edit


def _without_statistics(model):
    model.bn1.running_mean = model.bn1.running_var = None


def nothing(model):
    return None


# name -> edit of the model, input, part of the error message (None: a value or any message)
CASES = {
    "no images": (nothing, torch.zeros(0, 3, 64, 64), None),
    "no images in training": (_train_with(), torch.zeros(0, 3, 64, 64), None),
    "one value per channel": (_train_with(), images(1, 32), "more than 1 value per channel"),
    "3-D": (nothing, images()[0], None),
    "2-D": (nothing, torch.zeros(3, 64), "2"),
    "channels": (nothing, torch.zeros(2, 4, 64, 64), "3 channels, but got 4 channels"),
    "height 0": (nothing, torch.zeros(2, 3, 0, 64), ""),
    "one pixel": (nothing, images(2, 1), None),
    "one pixel, strided": (nothing, images(2, 8)[:, :, :1, :1], None),
    "a long strip": (nothing, torch.randn(1, 3, 9, 700), None),
    "uint8": (nothing, torch.zeros(2, 3, 64, 64, dtype=torch.uint8), ""),
    "float16 input, float32 weights": (nothing, images().half(), ""),
    "float64 input, float32 weights": (nothing, images().double(), ""),
    "meta input": (nothing, images().to("meta"), ""),
    "shorter mean": (_wrong_mean(lambda m: m[:5]), images(), "64"),
    "longer mean": (_wrong_mean(lambda m: torch.cat([m, m])), images(), "64"),
    "float64 mean": (_wrong_mean(lambda m: m.double()), images(), ""),
    "mean on another device": (_wrong_mean(lambda m: m.to("meta")), images(), ""),
    "strided mean": (_wrong_mean(lambda m: torch.stack([m, m], 1)[:, 0]), images(), None),
    "no mean, no variance": (_without_statistics, images(), None),
    "no variance": (lambda m: setattr(m.layer1[0].bn1, "running_var", None), images(), ""),
    "no weight": (lambda m: setattr(m.layer1[0].conv2, "weight", None), images(), "NoneType"),
    "eps = 0": (lambda m: setattr(m.layer1[0].bn1, "eps", 0.0), images(), None),
    "eps = 0 in training": (_train_with(eps=0.0), images(), None),
    "negative variance": (lambda m: m.layer1[0].bn1.running_var.neg_(), images(), None),
    "variance of 0 and eps of 0": (
        lambda m: (setattr(m.bn1, "eps", 0.0), m.bn1.running_var[3].zero_()), images(), None,
    ),
    "momentum=None": (_train_with(momentum=None), images(), None),
    "momentum = 1": (_train_with(momentum=1.0), images(), None),
    "scale beyond float32": (lambda m: m.layer1[0].bn1.weight.data.mul_(1e38), images(), None),
    "no variance in training": (
        lambda m: (m.train(), setattr(m.layer1[0].bn1, "running_var", None)), images(), "",
    ),
    "shorter mean in training": (
        lambda m: (m.train(), _wrong_mean(lambda m: m[:5])(m)), images(), "64",
    ),
    "NaN in the weights": (lambda m: m.layer1[0].conv2.weight.data[3].fill_(NAN), images(), None),
}  # fmt: skip


@both_ways
@pytest.mark.parametrize("name", CASES)
def test_same_value_or_same_error(name):
    edit, x, words = CASES[name]
    stock, mine = pair("basic")
    for model in (stock, mine):
        edit(model)
    want, got = _outcome(stock, x), _outcome(mine, x)
    if isinstance(want, Exception):
        assert type(got) is type(want), f"{got!r} for {want!r}"
        assert words is None or words in str(got)
    else:
        assert not isinstance(got, Exception), got
        assert not words
        agree(got, want)
    for (key, a), (_, b) in zip(stock.named_buffers(), mine.named_buffers(), strict=True):
        if b.device.type != "meta":
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, equal_nan=True, msg=key)


@both_ways
def test_statistics_that_require_a_gradient():
    """PyTorch's norms refuse them."""
    for model in pair("basic"):
        model.layer1[0].bn1.running_mean.requires_grad_()
        with pytest.raises(RuntimeError, match="not differentiable with respect to"):
            model(images())


@both_ways
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e38, -0.0], ids=str)
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "grouped"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_special_values_in_one_image(kind, value, training):
    stock, mine = (m.train(training) for m in pair(kind))
    x = images(3)
    same_outputs(stock, mine, x)
    x[1, 2, 30, 31] = value
    with torch.no_grad():
        want, got = stock(x), mine(x)
    if training and value == 1e38:
        # Squares overflow float32: stock's variance is inf, ours is summed in float64.
        assert got[want.isfinite()].isfinite().all()
        return
    agree(got, want)
    for (key, a), (_, b) in zip(stock.named_buffers(), mine.named_buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5, equal_nan=True, msg=key)
    if not training:
        same_outputs(stock, mine, images(3))  # no effect on the next batch


@both_ways
def test_outputs_may_be_edited_and_inputs_are_not():
    _, mine = pair("basic")
    x = images().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        first = mine(x)
        expected = first.clone()
        first.add_(1)
        assert torch.equal(mine(x), expected)
        block_in = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
        before = block_in.clone()
        y = mine.layer1[0](block_in)
        y.zero_()
        assert torch.equal(block_in, before) and mine.layer1[0](block_in).abs().sum() > 0
    stock, mine = pair("basic")
    errors = []
    # channels_last: in another layout the output is a copy, which backward does not read.
    for model in (stock.train(), mine.train()):
        x = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
        y = model.layer1[0](x.requires_grad_())
        y.mul_(2)
        errors.append(_error_of(lambda y=y: y.sum().backward()))
    assert type(errors[0]) is type(errors[1]) is RuntimeError


def _error_of(call):
    try:
        call()
    except Exception as error:
        return error
    return None


@both_ways
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_double_backward(training):
    gradients = []
    for model in pair("basic"):
        model.double().train(training)
        x = images(2, 32).double().requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (gg,) = torch.autograd.grad(g.square().sum(), x)
        gradients.append(gg)
    agree(gradients[1], gradients[0], 1e-6)
    gradients = []
    for model in pair("basic"):
        model.train(training)
        x = images(4, 64).requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (gg,) = torch.autograd.grad(g.sum(), x)
        gradients.append(gg)
    # float32, measured: 0.014 of the norm (ReLU inputs within rounding of zero).
    assert (gradients[1] - gradients[0]).norm() <= 0.1 * gradients[0].norm()


@both_ways
def test_bitwise_repeatable():
    torch.use_deterministic_algorithms(True)
    _, mine = pair("bottleneck")
    x = images()
    with torch.no_grad():
        first = mine(x)
        assert all(torch.equal(mine(x), first) for _ in range(250))
    state = {k: v.clone() for k, v in mine.state_dict().items()}
    runs = []
    for _ in range(6):
        mine.load_state_dict(state)
        mine.train().zero_grad()
        mine(x).square().sum().backward()
        runs.append([p.grad.clone() for p in mine.parameters()])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


@both_ways
def test_images_of_a_batch_are_independent():
    """Packing and tiling must not mix images."""
    _, mine = pair("bottleneck")
    x = images(5)
    with torch.no_grad():
        batch = mine(x)
        for i in range(5):
            agree(mine(x[i : i + 1]), batch[i : i + 1], 1e-4)


@both_ways
def test_eight_threads_with_two_models():
    models = [pair("basic")[1], pair("bottleneck")[1]]
    work = [(models[i % 2], images(2, 48 + 16 * (i % 3), seed=i)) for i in range(24)]

    def run(item):
        with torch.no_grad():
            return item[0](item[1])

    serial = [run(item) for item in work]
    fresh = [
        pair("basic")[1],
        pair("bottleneck")[1],
    ]  # plans are built by eight threads concurrently
    work = [(fresh[i % 2], x) for i, (_, x) in enumerate(work)]
    with ThreadPoolExecutor(8) as pool:
        for got, want in zip(pool.map(run, work * 2), serial * 2, strict=True):
            agree(got, want, 1e-5)


@both_ways
def test_an_error_inside_forward_leaves_no_state(monkeypatch):
    stock, mine = pair("basic")
    x = images()
    for training in (False, True):
        for model in (stock, mine):
            model.train(training)
        forward = mine.layer3[0].forward

        def fail(_):
            raise MemoryError("out of memory")

        counts = [m.num_batches_tracked.clone() for m in mine.modules() if hasattr(m, "momentum")]
        monkeypatch.setattr(mine.layer3[0], "forward", fail)
        with pytest.raises(MemoryError), torch.no_grad():
            mine(x)
        monkeypatch.undo()
        assert mine.layer3[0].forward == forward
        if not training:
            same_outputs(stock, mine, x[:1])
        else:
            after = [m.num_batches_tracked for m in mine.modules() if hasattr(m, "momentum")]
            assert sum(int(b) - int(a) for a, b in zip(counts, after, strict=True)) == 8


def test_import_and_use_survive_a_fork():
    code = """
import os, torch, fused_resnet as fr
torch.set_num_threads(1)
model, x = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=4).eval(), torch.randn(1, 3, 32, 32)
with torch.no_grad():
    want = model(x)
assert not torch.cuda.is_initialized()
pid = os.fork()
if pid == 0:
    with torch.no_grad():
        os._exit(0 if torch.equal(model(x), want) else 1)
assert os.waitpid(pid, 0)[1] == 0
class Data(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i):
        with torch.no_grad(): return model(x)[0]
for batch in torch.utils.data.DataLoader(Data(), num_workers=2, timeout=60):
    torch.testing.assert_close(batch, want)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert run.returncode == 0, run.stderr


def test_meta_and_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with torch.device("meta"):
        model = fr.resnet18(num_classes=7).eval()
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
        assert model.train()(torch.zeros(2, 3, 64, 64)).device.type == "meta"
    with FakeTensorMode():
        model = fr.resnet18(num_classes=7)
        y = model(torch.zeros(2, 3, 64, 64))
        assert y.shape == (2, 7) and y.requires_grad
        y.sum().backward()


@both_ways
def test_gradient_accumulation_and_partial_batches():
    stock, mine = pair("basic")
    for model in (stock.train(), mine.train()):
        for seed, count in ((1, 4), (2, 3)):
            model(images(count, 64, seed)).square().mean().backward()
    errors = [
        ((q.grad - p.grad).norm() / (p.grad.norm() + 1e-6)).item()
        for p, q in zip(stock.parameters(), mine.parameters(), strict=True)
    ]
    assert max(errors) < 0.1 and sorted(errors)[len(errors) // 2] < 0.02
    same_outputs(stock.eval(), mine.eval(), images())
    same_step(stock, mine, images())
