"""A block's training step as one autograd node: gradients, buffers, and what users do with a model
during training."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fused_resnet as fr
from fused_resnet.fusion.description import Description, describe, recipe_of
from fused_resnet.fusion.training import one_op
from fused_resnet.fusion.training.block import StepFunction
from fused_resnet.fusion.training.spec import Spec, formula
from fused_resnet.kernels import native
from fused_resnet.kernels.training.native import Native
from fused_resnet.kernels.training.protocol import Geometry, Norm, Normed
from fused_resnet.ops.portable import Portable
from tests.fusion.training.training_helpers import (
    BLOCKS,
    DTYPES,
    LAST,
    Passes,
    is_whole,
    make,
    needs_native,
    step,
    stock_step,
)
from tests.ops.op_cases import close, lifted, randn, unchanged


@pytest.fixture(params=["one op", "pass by pass"])
def execution(request, monkeypatch):
    """The two ways of running a block's step on the CPU."""
    if request.param == "pass by pass":
        monkeypatch.setattr(one_op, "layout_of", lambda *_: None)
    return request.param


@needs_native
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_against_float64(name, dtype, layout):
    """Every gradient by the tolerance rule. Where a ReLU's input is within rounding of zero, its
    mask depends on the order of summation. So that all masks agree, dy is zero where y is near
    zero, and biases move the inputs of the inner ReLUs away from zero."""
    block, x = make(name, dtype)
    with torch.no_grad():
        norms = [m for n, m in block.named_children() if n.startswith("bn")]
        for bn in norms if name.startswith("preact") else norms[:-1]:
            # far from zero, on either side
            bn.bias.copy_(torch.where(torch.arange(len(bn.bias)) % 2 == 0, 9.0, -9.0))
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    exact_block, exact_x = copy.deepcopy(block).double(), lifted(x).requires_grad_()
    stock, mine = copy.deepcopy(block), copy.deepcopy(block)
    with torch.no_grad(), fr.use_backend("reference"):
        y = copy.deepcopy(exact_block)(exact_x)
    dy = randn(y.shape, dtype).contiguous(memory_format=layout)
    dy = dy * (y.abs() > 0.3 * y.abs().mean()).to(dtype)
    check = unchanged(x, dy, *mine.parameters())
    assert is_whole(copy.deepcopy(mine)(x))
    got = step(mine, x, dy)
    check()
    want, exact = stock_step(stock, x, dy), stock_step(exact_block, exact_x, lifted(dy))
    assert got.keys() == want.keys()
    assert got["y"].stride() == want["y"].stride() or layout != LAST
    for key in got:
        assert got[key].dtype == want[key].dtype, key
        # Sums over all pixels of terms that cancel, for some biases to zero: their rounding error
        # is relative to the terms.
        largest = want[key].abs().max().item() * 4
        if want[key].dim() == 1:
            largest = max(largest, 4 * dy.abs().double().sum((0, 2, 3)).max().item())
        terms = {key: largest}
        close([key], [got[key]], [want[key]], [exact[key]], dtype, terms)


@needs_native
@pytest.mark.parametrize(
    "name",
    ["basic", "bottleneck, projection", "preact", "preact bottleneck, projection"],
)
@pytest.mark.parametrize(
    "frozen",
    [
        "x", "x and the first convolution", "all convolutions", "all norms", "the shortcut",
        "all but the last norm", "all but x",
    ],
)  # fmt: skip
def test_only_required_gradients_are_computed(name, frozen, execution, monkeypatch):
    """The required gradients are unchanged, and no others are computed."""
    block, x = make(name)
    if "projection" not in name and frozen == "the shortcut":
        pytest.skip("no projection")
    last = "bn3" if "bottleneck" in name else "bn2"
    norm_first = name.startswith("preact")

    def requires_grad(parameter: str) -> bool:
        return {
            "x": True,
            "x and the first convolution": not parameter.startswith("conv1"),
            "all convolutions": "bn" in parameter or "downsample.1" in parameter,
            "all norms": "conv" in parameter or "downsample.0" in parameter,
            "the shortcut": not parameter.startswith("downsample"),
            "all but the last norm": parameter.startswith(last),
            "all but x": False,
        }[frozen]

    everything = step(copy.deepcopy(block), x, dy := torch.randn_like(block(x)))
    for n, p in block.named_parameters():
        p.requires_grad_(requires_grad(n))
    x = x.detach().requires_grad_(not frozen.startswith(("x", "all but the last")))
    by_pytorch: list[str] = []
    for op in ("weight_gradient", "input_gradient"):
        plain = getattr(Portable, op)
        monkeypatch.setattr(
            Portable, op, lambda *a, plain=plain, op=op: (by_pytorch.append(op), plain(*a))[1]
        )
    with Passes() as passes:
        got = step(block, x, dy)
    for key, value in got.items():
        # Not buffers: they were updated by one more forward.
        if key == "dx" or (key.startswith("d") and key[1:] in dict(block.named_parameters())):
            assert torch.equal(value, everything[key]), key
    weights = sum(p.requires_grad and p.dim() == 4 for p in block.parameters())
    assert passes.weight_gradients + by_pytorch.count("weight_gradient") == weights
    inputs = passes.input_gradients + by_pytorch.count("input_gradient")
    if frozen == "all but the last norm":  # pre-activation: its convolution follows
        assert inputs == int(norm_first)
    if frozen == "x":
        units = 3 if "bottleneck" in name else 2
        shared = norm_first and "projection" in name  # bn1 needs the projection's dx
        assert inputs == units + shared - (not norm_first)


@needs_native
@pytest.mark.parametrize("name", BLOCKS)
def test_double_backward_matches_stock(name):
    results = []
    for backend in ("native", "reference"):
        block, x = make(name, torch.float64)
        with fr.use_backend(backend):
            y = block(x)
        assert is_whole(y) == (backend == "native")
        inputs = [x, *block.parameters()]
        grads = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)
        results.append([*grads, *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


@needs_native
@pytest.mark.parametrize("name", BLOCKS)
def test_double_backward_of_operands_computed_from_each_other(name):
    """Every operand is computed from the first weight, and the norms' weights are one tensor."""
    results = []
    for backend in ("native", "reference"):
        block, x = make(name, torch.float64)
        base = block.conv1.weight
        offset = base.sum() / base.numel()
        parameters = {
            n: p.detach() + offset.expand_as(p)
            for n, p in block.named_parameters()
            if p is not base
        }
        norms = [n for n, p in block.named_parameters() if n.startswith("bn") and "weight" in n]
        for n in norms:
            if parameters[n].shape == parameters[norms[0]].shape:
                parameters[n] = parameters[norms[0]]
        with fr.use_backend(backend):
            y = torch.func.functional_call(block, parameters, (x * (1 + offset),))
        assert is_whole(y) == (backend == "native")
        grads = torch.autograd.grad(y.square().sum(), [x, base], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), [x, base])
        results.append([*grads, *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


@needs_native
@pytest.mark.parametrize(
    "name",
    ["basic", "bottleneck, projection", "basic, padding", "preact", "preact bottleneck, padding"],
)
def test_gradcheck(name):
    block, x = make(name, torch.float64)
    # Away from zero, where ReLU has no derivative and finite differences are meaningless.
    with torch.no_grad():
        for m in block.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.bias.add_(4.0)
    x = x.detach()[:, :, :3, :3].contiguous(memory_format=LAST).requires_grad_()
    parameters = [p for p in block.parameters() if p.dim() == 1]

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return block(x)

    assert is_whole(block(x))
    assert gradcheck(run, (x, *parameters), fast_mode=True)
    assert gradgradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None, 0.0])
@pytest.mark.parametrize("tracking", ["float32", "float64", "bfloat16", "none", "strided"])
def test_running_statistics(momentum, tracking):
    block, x = make("bottleneck, projection")
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
            if tracking == "none":
                m.running_mean = m.running_var = m.num_batches_tracked = None
                m.track_running_stats = False
            elif tracking == "strided":
                m.running_mean = m.running_mean.repeat_interleave(2)[::2]
            elif tracking != "float32":
                m.running_mean = m.running_mean.to(getattr(torch, tracking))
                m.running_var = m.running_var.to(getattr(torch, tracking))
    if tracking in ("float64", "bfloat16"):
        with fr.use_backend("reference"), pytest.raises(RuntimeError):
            copy.deepcopy(block)(x)
        with pytest.raises(RuntimeError):  # stock's error
            block(x)
        return
    stock = copy.deepcopy(block)
    for _ in range(3):
        block(x)
        with fr.use_backend("reference"):
            stock(x)
    for (name, a), (_, b) in zip(block.named_buffers(), stock.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
        if tracking == "strided" and name.endswith("running_mean"):
            assert a.stride() == (2,)


@needs_native
def test_updates_increment_versions():
    block, x = make("basic")
    before = [b._version for b in block.buffers()]
    block(x)
    assert all(b._version > v for b, v in zip(block.buffers(), before, strict=True))


@needs_native
@pytest.mark.parametrize("where", ["output", "x", "weight"])
def test_changed_before_backward(where):
    """As in stock: an error that names the modified tensor, never a wrong gradient."""
    errors = []
    for backend in ("native", "reference"):
        block, x = make("basic")
        with fr.use_backend(backend):
            h = x * 1
            y = block(h)
            with torch.no_grad() if where != "output" else torch.enable_grad():
                {"output": y, "x": h, "weight": block.conv2.weight}[where].mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation") as error:
                y.sum().backward()
        errors.append(type(error.value))
    assert errors[0] is errors[1]


@needs_native
def test_one_value_per_channel():
    block, _ = make("basic")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 16, 1, 1))


@needs_native
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_propagate_as_in_stock(value):
    block, x = make("bottleneck, projection")
    with torch.no_grad():
        x[0, 3, 2, 2] = value
    stock = copy.deepcopy(block)
    y = block(x)
    with fr.use_backend("reference"):
        want = stock(x)
    assert torch.equal(y.isnan(), want.isnan())
    for (name, a), (_, b) in zip(block.named_buffers(), stock.named_buffers(), strict=True):
        assert torch.equal(a.isnan(), b.isnan()), name


@needs_native
def test_gradient_of_other_strides():
    block, x = make("bottleneck")
    results = []
    dy = torch.randn(2, 64, 7, 7)
    for gradient in (
        dy.contiguous(memory_format=LAST), dy.contiguous(),
        dy.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ):  # fmt: skip
        results.append(step(copy.deepcopy(block), x, gradient))
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(value, other[key]), key
    one = step(copy.deepcopy(block), x, torch.ones(1).expand(2, 64, 7, 7))
    two = step(copy.deepcopy(block), x, torch.ones(2, 64, 7, 7))
    assert all(torch.equal(one[k], two[k]) for k in one)


@needs_native
def test_recomputed_mask_is_bitwise_equal():
    """Inside a block dy is masked by a recomputed ReLU output, not by y: the same bits."""
    kernels = Native()
    for dtype in (torch.float32, torch.bfloat16):
        x = randn((4, 48, 61, 53), dtype).contiguous(memory_format=LAST)
        norm = Norm(torch.rand(48) + 0.5, torch.randn(48) * 0.3, 1e-5)
        y, state = kernels.normalise(x, norm, None, True)
        normed, dy = Normed(x, norm, state), torch.randn_like(y)
        recomputed = kernels.norm_gradients(dy, y, normed, has_residual=False)[0]
        read, _, g = kernels.norm_gradients(dy, y, normed, has_residual=False, masked=True)
        assert torch.equal(g, dy * (y > 0))
        for a, b in zip(recomputed, read, strict=True):
            assert torch.equal(a, b)


@needs_native
def test_autocast():
    block, x = make("bottleneck, projection")
    stock = copy.deepcopy(block)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
        with fr.use_backend("reference"):
            want = stock(x)
    assert is_whole(y) and y.dtype == want.dtype == torch.bfloat16
    dy = torch.randn_like(y)
    y.backward(dy)
    mine = {n: p.grad for n, p in block.named_parameters()} | {"x": x.grad}
    x.grad = None
    want.backward(dy)
    for name, grad in ({n: p.grad for n, p in stock.named_parameters()} | {"x": x.grad}).items():
        assert mine[name].dtype == grad.dtype == torch.float32
        # Measured: at most 0.04. Stock rounds each sum to bfloat16.
        assert (mine[name] - grad).norm() <= 0.1 * grad.norm(), name


@needs_native
def test_accumulated_and_scaled_gradients():
    """Gradients accumulate; scaling the loss by a power of two scales them exactly."""
    block, x = make("basic")
    dy = torch.randn_like(block(x))
    one = step(copy.deepcopy(block), x, dy)
    twice = copy.deepcopy(block)
    for _ in range(2):
        twice(x).backward(dy)
    scaled = step(copy.deepcopy(block), x, dy * 1024)
    for name, p in twice.named_parameters():
        torch.testing.assert_close(p.grad, one[f"d{name}"] * 2, rtol=1e-6, atol=0)
        assert torch.equal(scaled[f"d{name}"], one[f"d{name}"] * 1024)


@needs_native
def test_checkpointed_by_pytorch():
    """torch.utils.checkpoint around a block gives the same gradients."""
    from torch.utils.checkpoint import checkpoint

    block, x = make("bottleneck, projection")
    plain = copy.deepcopy(block)
    dy = torch.randn_like(plain(x))
    want = step(plain, x, dy)
    y = checkpoint(block, x, use_reentrant=False)
    y.backward(dy)
    for name, p in block.named_parameters():
        assert torch.equal(p.grad, want[f"d{name}"]), name


@needs_native
@pytest.mark.parametrize("edit", ["hook", "gelu", "bias", "frozen norm"])
def test_edited_blocks_match_stock(edit):
    block, x = make("bottleneck")
    if edit == "hook":
        block.bn2.register_forward_hook(lambda m, i, o: o * 2)
    elif edit == "gelu":
        block.relu = nn.GELU()
    elif edit == "bias":
        block.conv2.bias = nn.Parameter(torch.randn(16))
    else:
        block.bn2.eval()
    stock = copy.deepcopy(block)
    y = block(x)
    assert not is_whole(y)
    dy = torch.randn_like(y)
    got, want = step(block, x, dy), stock_step(stock, x, dy)
    for key in ("y", "dx"):
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("transform", ["vmap", "functional_call", "grad"])
def test_transforms_use_pytorch_operations(transform):
    block, x = make("basic")
    x = x.detach()
    state = dict(block.named_parameters())
    buffers = {n: b.clone() for n, b in block.named_buffers()}
    if transform == "functional_call":
        other = {n: p.detach() * 1.5 for n, p in state.items()}
        y = torch.func.functional_call(block, (other, buffers), (x,))
        stock = copy.deepcopy(block)
        with torch.no_grad():
            for p in stock.parameters():
                p.mul_(1.5)
        with fr.use_backend("reference"):
            torch.testing.assert_close(y, stock(x), rtol=1e-4, atol=1e-4)
        return
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.track_running_stats = False
            m.running_mean = m.running_var = m.num_batches_tracked = None

    def loss(x: Tensor) -> Tensor:
        return block(x).square().sum()

    if transform == "grad":
        mine = torch.func.grad(loss)(x)
        leaf = x.clone().requires_grad_()
        with fr.use_backend("reference"):
            loss(leaf).backward()
        torch.testing.assert_close(mine, leaf.grad, rtol=1e-3, atol=1e-4)
    else:
        mine = torch.vmap(block)(torch.stack([x, x * 2]))
        with fr.use_backend("reference"):
            torch.testing.assert_close(mine[1], block(x * 2), rtol=1e-4, atol=1e-4)


@needs_native
def test_threads_with_separate_models():
    cases = [make(name) for name in ("basic", "bottleneck, projection")]
    gradients = [torch.randn_like(copy.deepcopy(block)(x)) for block, x in cases]
    want = [step(copy.deepcopy(b), x, dy) for (b, x), dy in zip(cases, gradients, strict=True)]
    wrong: list[str] = []

    def work(index: int) -> None:
        (block, x), dy = cases[index % 2], gradients[index % 2]
        for _ in range(5):
            got = step(copy.deepcopy(block), x, dy)
            wrong.extend(k for k in got if not torch.equal(got[k], want[index % 2][k]))

    torch.set_num_threads(1)
    want = [step(copy.deepcopy(b), x, dy) for (b, x), dy in zip(cases, gradients, strict=True)]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_native
def test_250_runs_are_bitwise_equal():
    block, x = make("bottleneck, projection")
    dy = torch.randn_like(copy.deepcopy(block)(x))
    torch.use_deterministic_algorithms(True)
    first = step(copy.deepcopy(block), x, dy)
    for _ in range(249):
        repeated = step(copy.deepcopy(block), x, dy)
        assert all(torch.equal(first[k], repeated[k]) for k in first)


def test_portable_passes_match_the_formula():
    """A block on the portable passes, those of GPUs, on the CPU against PyTorch's operations."""
    for name in BLOCKS:
        block, x = make(name, torch.float64)
        parts = describe(block, recipe_of(block)[0])
        assert isinstance(parts, Description)
        tensors = [
            t
            for c, b, _ in parts.units
            for t in (c.weight, *((b.weight, b.bias) if b else 2 * (None,)))
        ]
        geometries = tuple(
            Geometry(c.stride, c.padding, c.dilation, c.groups) for c, *_ in parts.units
        )
        eps = tuple(bn.eps for bn in parts.norms)
        for level in ("full", "low", "lower", "minimal"):
            spec = Spec(
                Portable(), geometries, eps, parts.shortcut, level, torch.float64,
                (None,) * len(eps), 1 if parts.pad is None else parts.pad.stride,
                getattr(block, "activation_shared", False), name.startswith("preact"),
            )  # fmt: skip
            y = StepFunction.apply(spec, [], x, *tensors)
            want = formula(spec, x, tensors)
            torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
            dy = torch.randn_like(y)
            inputs = [t for t in (x, *tensors) if t is not None]
            for a, b in zip(
                torch.autograd.grad(y, inputs, dy),
                torch.autograd.grad(want, inputs, dy),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


# --- the memory pool ------------------------------------------------------------------------------


@needs_native
def test_freed_memory_is_reused():
    torch.set_num_threads(1)  # of several, each takes scratch memory only if they overlap
    gc.collect()  # so that garbage of other tests is not freed during this one
    gc.disable()
    try:
        _check_memory_reuse()
    finally:
        gc.enable()


def _check_memory_reuse():
    block, _ = make("basic")
    x = torch.randn(4, 16, 96, 96).contiguous(memory_format=LAST)
    fr.release_memory()
    start = native.memory()
    assert start["free_bytes"] == 0
    y = block(x)
    saved = native.memory()["used_bytes"] - start["used_bytes"]
    # y and the outputs of two convolutions, plus up to 1/16 for rounded-up sizes.
    assert 3 * x.nbytes <= saved <= 3 * x.nbytes * 17 / 16
    y.sum().backward()
    del y
    after = native.memory()
    assert after["used_bytes"] == start["used_bytes"]
    assert after["free_bytes"] > 0
    block(x).sum().backward()
    assert native.memory()["free_bytes"] == after["free_bytes"]  # nothing was allocated
    assert fr.release_memory() == after["free_bytes"]
    assert native.memory()["free_bytes"] == 0


@needs_native
def test_release_memory_keeps_live_tensors():
    """release_memory() does not free the memory of a live tensor."""
    block, _ = make("basic")
    x = torch.randn(4, 16, 96, 96).contiguous(memory_format=LAST)
    y = block(x).detach()
    before = y.clone()
    fr.release_memory()
    for _ in range(3):
        block(x * 2)
    assert torch.equal(y, before)


@needs_native
def test_out_of_memory_and_after():
    """FAULTS 45: the error names the size, and a smaller step succeeds afterwards."""
    ops = torch.ops.fused_resnet_native
    huge = torch.empty(1).expand(1 << 20, 1, 1 << 20, 1 << 4)
    weight = torch.randn(16, 16, 1, 1)
    x = torch.zeros(1, 16, 1, 1).expand(1 << 12, 16, 1 << 12, 1 << 12)
    assert huge.numel() == 1 << 44
    with pytest.raises(RuntimeError, match=r"channels_last|not enough memory"):
        ops.convolution(x, weight, None, [1, 1, 0, 0, 1, 1, 1])
    geometry = [1, 1, 1 << 20, 1 << 20, 1, 1, 1]
    tiny = torch.zeros(1, 16, 1, 1)
    with pytest.raises(
        RuntimeError, match=r"not enough memory: fused_resnet tried to allocate \d+"
    ):
        ops.convolution(tiny, weight, None, geometry)
    block, x = make("basic")
    block(x).sum().backward()
    assert block.conv1.weight.grad.isfinite().all()
