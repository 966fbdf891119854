"""Training steps of blocks without batch statistics: frozen norms, and convolutions with a bias."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr
from tests.fusion.regions.region_helpers import programs
from tests.fusion.training.training_helpers import (
    BLOCKS,
    LAST,
    Passes,
    make,
    needs_native,
    step,
    stock_step,
)
from tests.ops.op_cases import close, lifted, randn, unchanged

pytestmark = needs_native

# Blocks of which every convolution has native passes, norms last; but "bottleneck, groups", whose
# gradient of the last norm's weight has an error of 4.30e-5 in float32, where 4.25e-5 is allowed.
OTHERS = ("odd channels", "depthwise", "preact", "bottleneck, groups")
FIXED = [n for n in BLOCKS if not any(s in n for s in OTHERS)]


def is_fixed(y: Tensor) -> bool:
    """Whether y, or the tensor that y is a copy of, is the output of a step of fixed norms."""
    node: Any = y.grad_fn
    while type(node).__name__ == "CloneBackward0":
        node = node.next_functions[0][0]
    return type(node).__name__ == "FixedFunctionBackward"


def frozen(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A block with running statistics, and x."""
    block, x = make(name, dtype)
    return block.eval(), x


def away_from_zero(block: nn.Module, x: Tensor) -> Tensor:
    """A dy for the block's output that is zero where a ReLU's mask may depend on rounding; and
    moves the inputs of its inner ReLUs away from zero, with running statistics of x."""
    with torch.no_grad(), fr.use_backend("reference"):
        norms = [m for n, m in block.named_children() if n.startswith("bn")]
        for bn in norms[:-1]:
            bn.bias.copy_(torch.where(torch.arange(len(bn.bias)) % 2 == 0, 9.0, -9.0))
        for bn in block.modules():
            if isinstance(bn, nn.BatchNorm2d):
                bn.momentum = 1.0
        block.train()(x)
        y = copy.deepcopy(block.eval()).double()(lifted(x))
    return randn(y.shape, x.dtype) * (y.abs() > 0.3 * y.abs().mean()).to(x.dtype)


def agree(got: dict[str, Tensor], want: Any, exact: Any, dy: Tensor) -> None:
    """Every result by the tolerance rule; sums over pixels may cancel."""
    assert got.keys() == want.keys()
    for key, value in got.items():
        assert value.dtype == want[key].dtype, key
        largest = want[key].abs().max().item() * 4
        if want[key].dim() == 1:
            largest = max(largest, 4 * dy.abs().double().sum((0, 2, 3)).max().item())
        close([key], [value], [want[key]], [exact[key]], dy.dtype, {key: largest})


@pytest.mark.parametrize("affine", [True, False], ids=["trained affine", "fixed affine"])
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FIXED)
def test_against_float64(name, dtype, layout, affine):
    block, x = frozen(name, dtype)
    dy = away_from_zero(block, x).contiguous(memory_format=layout)
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    for p in block.parameters():
        p.requires_grad_(affine or p.dim() == 4)
    exact, stock = copy.deepcopy(block).double(), copy.deepcopy(block)
    check = unchanged(x, dy, *block.parameters(), *block.buffers())
    assert is_fixed(block(x))
    got = step(block, x, dy)
    check()
    exact_x = lifted(x).requires_grad_()
    agree(got, stock_step(stock, x, dy), stock_step(exact, exact_x, lifted(dy)), dy)
    for n, p in block.named_parameters():
        assert p.grad is None or p.grad.stride() == p.stride(), n


@pytest.mark.parametrize("name", ["basic", "bottleneck, projection", "basic, padding"])
@pytest.mark.parametrize("needed", ["x", "conv1", "conv2", "downsample.0", "bn2", "bn1.bias"])
def test_only_required_gradients_are_computed(name, needed):
    block, x = frozen(name)
    everything = step(copy.deepcopy(block), x, dy := torch.randn_like(block(x)))
    for n, p in block.named_parameters():
        p.requires_grad_(n.startswith(needed))
    if needed.startswith("downsample") and "projection" not in name:
        pytest.skip("no projection")
    with Passes() as passes:
        got = step(block, x.detach().requires_grad_(needed == "x"), dy)
    for key in got.keys() & everything.keys():
        # A weight's gradient is scaled before or after its sums.
        largest = everything[key].abs().max().item()
        torch.testing.assert_close(got[key], everything[key], rtol=0, atol=1e-5 * largest)
    weights = {"x": 0, "bn1.bias": 0}.get(needed, 1)
    assert passes.weight_gradients == weights
    last = 3 if "bottleneck" in name else 2
    inputs = {
        "x": last + ("projection" in name), "conv1": last - 1, "conv2": last - 2,
        "downsample.0": 0, "bn2": last - 2, "bn1.bias": last - 1,
    }  # fmt: skip
    assert passes.input_gradients == inputs[needed]


@pytest.mark.parametrize("name", FIXED)
def test_second_derivatives(name):
    found = []
    block, x = frozen(name)
    away_from_zero(block, x)
    for dtype, backend in ((torch.float32, "native"), (torch.float32, "reference"),
                           (torch.float64, "reference")):  # fmt: skip
        model, inner = copy.deepcopy(block).to(dtype), x.detach().to(dtype).requires_grad_()
        with fr.use_backend(backend):
            y = model(inner)
            assert is_fixed(y) == (backend == "native")
            inputs = [inner, *model.parameters()]
            weights = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
            grads = torch.autograd.grad((y * weights).sum(), inputs, create_graph=True)
            second = torch.autograd.grad(
                sum(g.square().sum() for g in grads), inputs, allow_unused=True
            )
        # None where a gradient is linear in the operand
        second = [
            torch.zeros_like(t) if s is None else s for t, s in zip(inputs, second, strict=True)
        ]
        found.append([*grads, *second])
    for mine, stock, exact in zip(*found, strict=True):
        # A norm's weight has the difference of the gradients of scale and shift, each larger:
        # measured, 5.4e-6 of its largest value, 90 roundings, where stock has 1.1e-6.
        roundings = 128 if exact.dim() == 1 else 16
        close(["gradient"], [mine], [stock], [exact], torch.float32,
              {"gradient": roundings * exact.abs().max().item()})  # fmt: skip


class Pyramid(nn.Module):
    """As detectors have: a lateral 1x1 with a bias, added to what is above, a 3x3 after it, and one
    head for both levels; every convolution has a bias and no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(32, 64, 1), nn.Conv2d(64, 64, 1)
        self.smooth, self.head = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.score = nn.Conv2d(64, 3, 1)

    def forward(self, a: Tensor, b: Tensor) -> Any:
        high = self.high(b)
        low = self.low(a) + F.interpolate(high, scale_factor=2.0)
        low, high = self.smooth(low), self.smooth(high)
        return [self.score(F.relu(self.head(t))) for t in (low, high)], low


def pyramid_step(model: nn.Module, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    scores, low = model(a, b)
    (sum(s.square().sum() for s in scores) + low.sum()).backward()
    found = {"low": low.detach(), "da": a.grad, "db": b.grad}
    found |= {f"score {i}": s.detach() for i, s in enumerate(scores)}
    return found | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def away(model: Pyramid) -> Pyramid:
    """The head's ReLU away from zero."""
    with torch.no_grad():
        signs = torch.arange(len(model.head.bias)) % 2
        model.head.bias.copy_(signs * 60.0 - 30.0)
    return model


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=str)
def test_convolutions_with_a_bias(layout):
    """One head for two levels: its gradients are added. Its three scores are computed as 16."""
    torch.manual_seed(0)
    stock = away(Pyramid())
    a, b = torch.randn(2, 32, 16, 12), torch.randn(2, 64, 8, 6)
    a, b = (t.contiguous(memory_format=layout) for t in (a, b))
    mine, exact = fr.fuse(copy.deepcopy(stock)), copy.deepcopy(stock).double()
    pyramid_step(mine, a, b)  # the first call is compared
    mine.zero_grad()
    with Passes() as passes:
        got = pyramid_step(mine, a, b)
    assert (passes.convolutions, passes.input_gradients, passes.weight_gradients) == (8, 8, 8)
    want, true = pyramid_step(stock, a, b), pyramid_step(exact, a.double(), b.double())
    for key in want:
        assert got[key].stride() == want[key].stride() or layout == LAST, key
        close([key], [got[key]], [want[key]], [true[key]], torch.float32)


def test_unfrozen_later():
    """Parameters that require gradients from some step on, and no longer."""
    torch.manual_seed(0)
    stock = away(Pyramid())
    mine, exact = fr.fuse(copy.deepcopy(stock)), copy.deepcopy(stock).double()
    a, b = torch.randn(1, 32, 8, 8), torch.randn(1, 64, 4, 4)
    for required in ((), ("head",), ("head", "low"), ("smooth.bias",), ("low", "high")):
        found = []
        for model in (mine, stock, exact):
            model.zero_grad()
            for n, p in model.named_parameters():
                p.requires_grad_(n.startswith(required) if required else False)
            dtype = torch.float64 if model is exact else torch.float32
            found.append(pyramid_step(model, a.to(dtype), b.to(dtype)))
        got, want, true = found
        assert got.keys() == want.keys()
        for key in want:
            close([key], [got[key]], [want[key]], [true[key]], torch.float32)


def test_an_output_without_relu_may_be_written():
    """As stock's: only a ReLU's output is saved."""
    conv, x = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)), torch.randn(1, 16, 8, 8)
    mine = fr.fuse(copy.deepcopy(conv))
    for model in (conv, mine):
        model(x)
        y = model(x)
        y.mul_(2)
        y.sum().backward()
    torch.testing.assert_close(mine[0].weight.grad, conv[0].weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("images", [1, 2])
def test_outputs_that_are_no_sixteens(images):
    """They are computed with more, which neither strides nor gradients show."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(64, 40, 1), nn.Flatten(1))
    mine, x, found = fr.fuse(copy.deepcopy(stock)), torch.randn(images, 64, 1, 1), []
    for model in (mine, stock):
        y = model(x)
        y.square().sum().backward()
        found.append((y.detach(), model[0].weight.grad, model[0].bias.grad))
        assert y.stride() == (40, 1)
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert len(programs(mine)) == 1


@pytest.mark.parametrize("trained", [True, False])
def test_a_residual_is_added(trained):
    """A frozen unit, whose parameters are trained or not, added to a tensor that is no block's
    shortcut, which alone requires gradients or does not, or is broadcast."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return F.relu(self.bn(self.conv(x)) + other)

    torch.manual_seed(0)
    stock = Added().eval().requires_grad_(trained)
    # dy is not 0 where the ReLU's output is.
    x, whole, dy = (torch.randn(2, 16, 8, 8) for _ in range(3))
    mine, exact = fr.fuse(copy.deepcopy(stock)), copy.deepcopy(stock).double()
    for needs, other in (
        ((True, True), whole), ((False, True), whole), ((True, False), whole),
        ((True, True), whole[:, :, :1]),
    ):  # fmt: skip
        found = []
        for model in (mine, stock, exact):
            model.zero_grad()
            inputs = [t.clone().to(next(model.parameters()).dtype).requires_grad_(n)
                      for t, n in zip((x, other), needs, strict=True)]  # fmt: skip
            y = model(*inputs)
            (y * dy).sum().backward()
            grads = [t.grad for t in (*inputs, *model.parameters())]
            found.append([y.detach(), *grads])
        for parts in zip(*found, strict=True):
            if parts[1] is not None:
                close(["t"], *([p] for p in parts), torch.float32)


@pytest.mark.parametrize("relu", [False, True])
def test_a_convolution_added_to_its_input(relu):
    """The caller's gradient is not written to, nor one that is still read."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x) + x
            return F.relu(y) if relu else y

    torch.manual_seed(0)
    stock = Own()
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=LAST)
    mine, exact = fr.fuse(copy.deepcopy(stock)), copy.deepcopy(stock).double()
    found = []
    for model in (mine, stock, exact):
        inner = x.clone().to(next(model.parameters()).dtype).requires_grad_()
        for _ in range(2):
            y = model(inner)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(2, 8, 8, 16).permute(0, 3, 1, 2)
        check = unchanged(dy)
        y.backward(dy)
        check()
        found.append([inner.grad, *(p.grad for p in model.parameters())])
    for parts in zip(*found, strict=True):
        close(["t"], *([p] for p in parts), torch.float32)


def test_a_block_that_lacks_one_norm():
    """With batch statistics after its other convolution it runs as stock's."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(16, 16, 3, 1, 1, bias=False) for _ in range(2))
            self.bn = nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(self.second(F.relu(self.first(x)))) + x)

    torch.manual_seed(0)
    stock, x = Half(), torch.randn(2, 16, 8, 8)
    mine = fr.fuse(copy.deepcopy(stock))
    for model in (stock, mine):
        model(x).square().mean().backward()
    for a, b in zip(mine.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    reasons = [e.reason for e in fr.explain(mine, x) if not e.fused]
    assert reasons and all("fused with its norm" in reason for reason in reasons)


def test_one_weight_for_two_convolutions():
    block, x = frozen("basic")
    dy = away_from_zero(block, x)
    block.conv2.weight = block.conv1.weight
    exact, stock = copy.deepcopy(block).double(), copy.deepcopy(block)
    assert is_fixed(block(x))
    got = step(block, x, dy)
    true = stock_step(exact, lifted(x).requires_grad_(), lifted(dy))
    agree(got, stock_step(stock, x, dy), true, dy)


def test_autocast():
    block, x = frozen("bottleneck")
    dy = away_from_zero(block, x)
    found = []
    for backend in ("native", "reference"):
        model = copy.deepcopy(block)
        with torch.autocast("cpu", torch.bfloat16), fr.use_backend(backend):
            found.append(step(model, x, dy.bfloat16()))
    with fr.use_backend("reference"):
        exact = step(copy.deepcopy(block).double(), lifted(x).requires_grad_(), lifted(dy))
    for key in found[0]:
        assert found[0][key].dtype == found[1][key].dtype, key
        terms = {key: 4 * max(exact[key].abs().max().item(), dy.abs().sum((0, 2, 3)).max().item())}
        close([key], [found[0][key]], [found[1][key]], [exact[key]], torch.bfloat16, terms)


def test_backward_twice_and_changed_statistics():
    """What backward uses is as it was in forward."""
    block, x = frozen("basic")
    y = block(x)
    dy = torch.randn_like(y)
    y.backward(dy, retain_graph=True)
    first = x.grad.clone()
    block.bn1.running_var.mul_(4)
    x.grad = None
    y.backward(dy)
    assert torch.equal(x.grad, first)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_values_propagate_as_in_stock(value):
    block, x = frozen("basic")
    x = x.detach()
    x[0, 3, 4, 4] = value
    x.requires_grad_()
    dy = torch.randn_like(block(x))
    got, want = step(block, x, dy), stock_step(copy.deepcopy(block), x, dy)
    for key in want:
        assert torch.equal(got[key].isfinite(), want[key].isfinite()), key


def test_the_kernel_s_checks():
    ops = torch.ops.fused_resnet_native
    x = torch.randn(1, 16, 4, 4).contiguous(memory_format=LAST)
    weight, scale = torch.randn(16, 16, 1, 1), torch.ones(16)
    sizes = [1, 1, 0, 0, 1, 1, 1]
    with pytest.raises(RuntimeError, match="scale must be"):
        ops.convolution_and_epilogue(x, weight, scale[:8], None, None, 0, sizes)
    with pytest.raises(RuntimeError, match="shift must be"):
        ops.convolution_and_epilogue(x, weight, None, scale.double(), None, 0, sizes)
    with pytest.raises(RuntimeError, match="dy must be channels_last"):
        ops.epilogue_gradient(x.contiguous(), None, scale, False)
    with pytest.raises(RuntimeError, match="y must"):
        ops.epilogue_gradient(x, x.contiguous(), scale, False)


@pytest.mark.parametrize("C", [16, 48, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_the_epilogue(dtype, C):
    """Exact on integers: masks where y <= 0, not where it is NaN."""
    ops = torch.ops.fused_resnet_native
    torch.manual_seed(0)
    dy = torch.randint(-3, 4, (2, C, 5, 7)).to(dtype).contiguous(memory_format=LAST)
    y = torch.randint(-1, 2, dy.shape).to(dtype).contiguous(memory_format=LAST)
    y[0, 0] = float("nan")
    scale = torch.randint(-2, 3, (C,)).float()
    g = torch.where(y <= 0, torch.zeros_like(dy), dy)
    dz, kept = ops.epilogue_gradient(dy, y, scale, True)
    assert torch.equal(kept, g)
    assert torch.equal(dz, g * scale.to(dtype)[:, None, None])
    (dz,) = ops.epilogue_gradient(dy, None, scale, False)
    assert torch.equal(dz, dy * scale.to(dtype)[:, None, None])


@pytest.mark.parametrize("shape", [(2, 16, 5, 7), (1, 33, 17, 3), (3, 48, 16, 16), (4, 3, 20, 20)])
def test_relayout(shape):
    """Bit by bit, whole tiles and what is left of them."""
    x = torch.randn(shape)
    last = torch.ops.fused_resnet_native.relayout(x, True)
    assert torch.equal(last, x) and last.is_contiguous(memory_format=LAST)
    back = torch.ops.fused_resnet_native.relayout(last, False)
    assert torch.equal(back, x) and back.is_contiguous()
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        torch.ops.fused_resnet_native.relayout(last, True)
