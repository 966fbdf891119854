"""Unusual tensors, modules and uses: a model changed by `fuse` gives the value or raises the error
of the same model unchanged. What concerns whole networks is tested in tests/models and
tests/fusion, on ours and on fused ones (the fixture `way`)."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.fusion.regions import verify
from fused_resnet.kernels import native
from tests.fusion.regions.pairs import images, pair
from tests.fusion.regions.region_helpers import LAST, calibrated, programs

pytestmark = pytest.mark.skipif(native.load() is not None, reason="no native kernels")

MODES = ["inference", "frozen", "training"]
NAN, INF = float("nan"), float("inf")


def outcome(m: nn.Module, args: tuple[Any, ...], mode: str) -> Any:
    """What two calls return, with the gradients of the last and the buffers; or the exception."""
    m.train(mode == "training")
    given = list(args)
    if mode != "inference":
        given = [t.detach().clone() if isinstance(t, Tensor) else t for t in args]
    floating = [t for t in given if isinstance(t, Tensor) and t.is_floating_point()]
    try:
        for _ in range(2):
            m.zero_grad()
            if mode == "inference":
                with torch.no_grad():
                    y = m(*given)
                continue
            for t in floating:
                t.requires_grad_().grad = None
            y = m(*given)
            (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    except Exception as error:
        return error
    grads = [t.grad for t in floating] + [p.grad for p in m.parameters()]
    return [y.detach(), *(() if mode == "inference" else grads), *m.buffers()]


def as_stock(
    body: Callable[..., Any],
    *args: Any,
    modes: list[str] = MODES,
    edit: Callable[[Any], Any] = lambda m: None,
    close: float = 1e-3,
    called: bool = False,
) -> None:
    """Both models' outcomes: type of the error, or values, dtypes and strides of outputs, gradients
    and buffers. close: of the largest value. called: before the edit, too."""
    for mode in modes:
        found = []
        for m in pair(body):
            if called:
                outcome(m, args, mode)
            edit(m)
            before = [t.clone() if isinstance(t, Tensor) else t for t in args]
            found.append(outcome(m, args, mode))
            for t, was in zip(args, before, strict=True):
                if isinstance(t, Tensor):
                    torch.testing.assert_close(t, was, rtol=0, atol=0, equal_nan=True)
        compare(*found, close)


def compare(got: Any, want: Any, close: float = 1e-3) -> None:
    if isinstance(want, Exception):
        assert type(got) is type(want), f"{got!r} for {want!r}"
        # Which of two devices is the wrong one, and which operation saved what was written, differ.
        words = ("device", "inplace")
        assert str(got) == str(want) or any(w in str(got) and w in str(want) for w in words)
        return
    assert not isinstance(got, Exception), got
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is None:
            continue
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        finite = b[b.isfinite()] if b.is_floating_point() else b
        size = float(finite.abs().max()) if finite.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=close, atol=close * size, equal_nan=True)


def unit(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.u1(x))


def block(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.u2(F.relu(m.u1(x))) + x)


def added(m: Any, x: Tensor, r: Any) -> Tensor:
    return F.relu(m.u1(x) + r)


def norm_first(m: Any, x: Tensor) -> Tensor:
    return m.c1(F.relu(m.n1(x)))


def norm_added(m: Any, x: Tensor, r: Any) -> Tensor:
    return F.relu(m.n1(x) + r) + 0 * m.c1(x)


def plain_addition(m: Any, x: Tensor, r: Any) -> Tensor:
    return F.relu(x + r) + 0 * m.c1(x)


BODIES = [unit, block, norm_first]
TWO = [added, norm_added, plain_addition]

# --- layouts (rows 21, 22, 26) ---

WHOLE = torch.randn(4, 32, 20, 20, generator=torch.Generator().manual_seed(5))
VIEWS: dict[str, Callable[[], Tensor]] = {
    "sliced": lambda: WHOLE[1:3, ::2, 1:17:2, 2:18:2],
    "transposed": lambda: WHOLE[:2, :16, :8, :8].transpose(2, 3),
    "expanded": lambda: WHOLE[:1, :1, :8, :8].expand(2, 16, 8, 8),
    "one row expanded": lambda: WHOLE[:2, :16, :1, :8].expand(2, 16, 8, 8),
    "channels_last": lambda: images().contiguous(memory_format=LAST),
    "channels_last, without the first image": lambda: images(n=3).contiguous(memory_format=LAST)[
        1:
    ],
    "offset of one element": lambda: torch.cat([torch.zeros(1), images().flatten()])[1:].view(
        2, 16, 8, 8
    ),
    "offset of one element, channels_last": lambda: (
        torch.cat([torch.zeros(1), images().flatten()])[1:].view(2, 8, 8, 16).permute(0, 3, 1, 2)
    ),
    "flipped": lambda: images().flip(3),
    "permuted batch": lambda: images().transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("body", BODIES)
def test_views(body, view) -> None:
    # Clones for gradients have the strides of the view where it is dense.
    as_stock(body, VIEWS[view]())


@pytest.mark.parametrize("body", TWO)
@pytest.mark.parametrize("first", [torch.contiguous_format, LAST], ids=str)
@pytest.mark.parametrize("second", [torch.contiguous_format, LAST], ids=str)
def test_layouts_of_a_residual(body, first, second) -> None:
    x, r = images().contiguous(memory_format=first), images(1).contiguous(memory_format=second)
    as_stock(body, x, r)


# --- residuals (rows 23, 29) ---

RESIDUALS: dict[str, Any] = {
    "a channel's value": lambda: torch.randn(1, 16, 1, 1),
    "a row": lambda: torch.randn(8),
    "a column": lambda: torch.randn(2, 16, 8, 1),
    "larger": lambda: torch.randn(3, 1, 16, 8, 8),
    "a number": lambda: 0.5,
    "float64": lambda: torch.randn(2, 16, 8, 8).double(),
    "bfloat16": lambda: torch.randn(2, 16, 8, 8).bfloat16(),
    "integers": lambda: torch.arange(8),
    "other channels": lambda: torch.randn(2, 8, 8, 8),
    "other images": lambda: torch.randn(3, 16, 8, 8),
    "no images": lambda: torch.randn(0, 16, 8, 8),
    "NaN and infinities": lambda: torch.tensor([NAN, INF, -INF, -0.0] * 2),
}


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("body", TWO)
def test_residuals(body, residual) -> None:
    r = RESIDUALS[residual]()
    floating = not isinstance(r, Tensor) or r.is_floating_point()
    as_stock(body, images(), r, modes=MODES if floating else MODES[:1])


ALIASES: dict[str, Callable[..., Tensor]] = {
    "x": lambda m, x: F.relu(m.u1(x) + x),
    "x detached": lambda m, x: F.relu(m.u1(x) + x.detach()),
    "a view of x": lambda m, x: F.relu(m.u1(x) + x.view_as(x)),
    "half of x": lambda m, x: F.relu(m.u1(x) + x[:, :1]),
    "x twice": lambda m, x: F.relu(x + x) + m.u1(x),
    "the value itself": lambda m, x: (lambda y: F.relu(y + y))(m.u1(x)),
    "a norm's value itself": lambda m, x: (lambda y: F.relu(y + y))(m.n1(x)) + 0 * m.c1(x),
}


@pytest.mark.parametrize("name", ALIASES)
def test_aliases(name) -> None:
    as_stock(ALIASES[name], images())


# --- shapes (rows 6, 25, 28) ---

SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "1 channel": ((2, 1, 7, 5), {}),
    "3 channels": ((2, 3, 7, 5), {}),
    "65 channels": ((1, 65, 7, 5), {}),
    "2048 channels, one pixel": ((2, 2048, 1, 1), {"kernel_size": 1, "padding": 0}),
    "one pixel": ((4, 16, 1, 1), {}),
    "a long strip": ((1, 16, 2, 3000), {}),
    "groups": ((2, 16, 9, 7), {"groups": 4}),
    "depthwise": ((2, 16, 9, 7), {"groups": 16}),
    "dilation": ((2, 16, 11, 13), {"dilation": (2, 3), "padding": (2, 3)}),
    "stride": ((2, 16, 9, 7), {"stride": (2, 3)}),
    "1x5": ((2, 16, 9, 7), {"kernel_size": (1, 5), "padding": (0, 2)}),
    "5x1, stride": ((2, 16, 9, 7), {"kernel_size": (5, 1), "padding": (2, 0), "stride": (1, 2)}),
    "padding beyond the kernel": ((2, 16, 5, 5), {"kernel_size": 1, "padding": 2}),
    "bias": ((2, 16, 9, 7), {"bias": True}),
    "padding='same'": ((2, 16, 9, 7), {"padding": "same"}),
    "reflection": ((2, 16, 9, 7), {"padding_mode": "reflect"}),
    "smaller than the kernel": ((2, 16, 3, 3), {"kernel_size": 7, "padding": 1}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name) -> None:
    shape, options = SHAPES[name]
    options = {"kernel_size": 3, "padding": 1, "bias": False} | options

    def edit(m: Any) -> None:
        torch.manual_seed(1)
        m.c1, m.n1 = nn.Conv2d(shape[1], shape[1], **options), nn.BatchNorm2d(shape[1])
        calibrated(m.n1, 1)

    # The gradient of a bias before batch statistics is rounding error only.
    modes = MODES[:2] if options["bias"] else MODES
    as_stock(unit, torch.randn(shape), modes=modes, edit=edit, close=3e-3)


# --- norms (rows 9 to 15, 18, 19, 24) ---


def _without(name: str) -> Callable[[Any], None]:
    return lambda m: setattr(m.n1, name, None)


def _statistics(make: Callable[[Tensor], Any], name: str = "running_mean") -> Callable[[Any], None]:
    return lambda m: setattr(m.n1, name, make(getattr(m.n1, name)))


def _frozen_norm(m: Any) -> None:
    misc = pytest.importorskip("torchvision.ops")
    state = {k: v for k, v in m.n1.state_dict().items() if "num" not in k}
    m.n1 = misc.FrozenBatchNorm2d(16, eps=0.3)
    m.n1.load_state_dict(state)


def _constant_channel(m: Any) -> None:
    with torch.no_grad():
        m.c1.weight[3] = 0


NORMS: dict[str, Callable[[Any], Any]] = {
    "weight without bias": _without("bias"),
    "bias without weight": _without("weight"),
    "neither": lambda m: (_without("weight")(m), _without("bias")(m)),
    "no statistics": lambda m: (_without("running_mean")(m), _without("running_var")(m)),
    "no variance": _without("running_var"),
    "track_running_stats switched off": lambda m: setattr(m.n1, "track_running_stats", False),
    "momentum=None": lambda m: setattr(m.n1, "momentum", None),
    "momentum = 1": lambda m: setattr(m.n1, "momentum", 1.0),
    "no counter": _without("num_batches_tracked"),
    "eps = 0": lambda m: setattr(m.n1, "eps", 0.0),
    "negative variance": lambda m: m.n1.running_var.neg_(),
    "shorter mean": _statistics(lambda t: t[:5].clone()),
    "longer mean": _statistics(lambda t: torch.cat([t, t])),
    "shorter variance": _statistics(lambda t: t[:5].clone(), "running_var"),
    "shorter weight": lambda m: setattr(m.n1, "weight", nn.Parameter(torch.ones(5))),
    "mean of float64": _statistics(Tensor.double),
    "mean of bfloat16": _statistics(Tensor.bfloat16),
    "mean on another device": _statistics(lambda t: t.to("meta")),
    "strided mean": _statistics(lambda t: torch.stack([t, t], 1)[:, 0]),
    "strided variance": _statistics(lambda t: torch.stack([t, t], 1)[:, 0], "running_var"),
    "FrozenBatchNorm2d of another eps": _frozen_norm,
    "constant channel": _constant_channel,
    "float64 norm": lambda m: m.n1.double(),
    "bfloat16 norm": lambda m: m.n1.bfloat16(),
    "NaN in its weight": lambda m: m.n1.weight.data[2].fill_(NAN),
}


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("body", BODIES)
def test_norms(body, name, called) -> None:
    as_stock(body, images(), edit=NORMS[name], called=called)


def test_the_error_of_a_norm() -> None:
    """The message is stock's, also after a call that was fused."""
    messages = []
    with torch.no_grad():
        for m in pair(norm_first):
            m(images())
            with pytest.raises(RuntimeError) as raised:
                m(images()[:, :8])
            messages.append(str(raised.value))
    assert messages[0] == messages[1]


def _half(dtype: torch.dtype, norms: torch.dtype, affine: bool = True) -> Callable[[Any], None]:
    def edit(m: Any) -> None:
        m.to(dtype)
        for norm in (m.n1, m.n2):
            norm.to(norms)
            if not affine:
                norm.weight = norm.bias = None

    return edit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norms", ["same", "float32", "no affine"])
@pytest.mark.parametrize("body", BODIES)
def test_sixteen_bits(body, norms, dtype) -> None:
    edit = _half(dtype, torch.float32 if norms == "float32" else dtype, norms != "no affine")
    # Stock rounds after every operation: up to 3e-2 of the largest value.
    as_stock(body, images().to(dtype), modes=MODES[:1], edit=edit, close=6e-2)


@pytest.mark.parametrize("body", [unit, norm_first])
def test_a_mean_far_from_zero(body) -> None:
    """mean 1e4, deviation 1: no E[x^2] - E[x]^2 in float32."""

    def edit(m: Any) -> None:
        m.c1.bias = nn.Parameter(torch.full((16,), 1e4))
        with torch.no_grad():
            m.c1.weight.mul_(2)

    x = images() + (1e4 if body is norm_first else 0)
    fused, stock = pair(body)
    exact = copy.deepcopy(stock).double()
    errors = []
    for m in (fused, stock, exact):
        m.train()
        edit(m)
        m.c1.to(m.n1.weight.dtype)
        y = m(x.to(m.n1.weight.dtype)).double()
        variance = m.n1.running_var.double()
        errors.append([y.detach(), variance])
    for got, want, true in zip(*errors, strict=True):
        assert (got - true).norm() <= 2 * (want - true).norm() + 1e-6 * true.norm()


@pytest.mark.parametrize("scale, weight", [(3e5, 1e-4), (1e-7, 1e2)])
def test_folding_does_not_overflow(scale: float, weight: float) -> None:
    """The folded weight is beyond float16 though every value of stock's is inside it."""

    def edit(m: Any) -> None:
        with torch.no_grad():
            m.c1.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(3)).mul_(weight)
            m.n1.running_mean.zero_()
            m.n1.running_var.fill_(1.0)
            m.n1.weight.fill_(scale)

    found = []
    for m in pair(unit):
        edit(m)
        for dtype in (torch.float16, torch.bfloat16):
            with torch.no_grad(), torch.autocast("cpu", dtype):
                found.append(m(images()))
    for got, want in zip(found[:2], found[2:], strict=True):
        assert want.isfinite().all() and got.isfinite().all()
        # float16 stores 1e-4 with 11 bits less: stock's convolution is 2e-2 off.
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.05 * float(want.abs().max()))


# --- values (rows 16, 17) ---


@pytest.mark.parametrize("value", [NAN, INF, -INF, -0.0, 1e38])
@pytest.mark.parametrize("body", [*BODIES, plain_addition])
def test_special_values(body, value) -> None:
    x = images()
    x[1, 2, 3, 4] = value
    modes = MODES[:1] if value == 1e38 else [MODES[0], MODES[2]]
    for mode in modes:
        for m, n in [pair(body)]:
            args = (x, images(1)) if body is plain_addition else (x,)
            found = [outcome(net, args, mode) for net in (m, n)]
            # Gradients of infinities are NaN in other places with another order of summation.
            compare(found[0][:1] + found[0][-6:], found[1][:1] + found[1][-6:])


# --- what is done with the output (rows 30, 32) ---


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
def test_writes_to_the_output(body, mode, layout) -> None:
    """Stock raises in backward where a ReLU's output was written."""
    errors = []
    for m in pair(body, mode == "training"):
        for write in (False, True, True):
            x = images().contiguous(memory_format=layout).requires_grad_()
            y = m(x)
            y.mul_(2) if write else None
            try:
                (y if write else y * 2).sum().backward()
                errors.append(x.grad)
            except RuntimeError as error:
                errors.append(error)
    right = errors[3]
    for got, want in zip(errors[1:3], errors[4:], strict=True):
        # In another layout than channels_last the output is a copy, which backward does not read.
        if isinstance(want, RuntimeError) and (layout is LAST or isinstance(got, RuntimeError)):
            assert type(got) is RuntimeError and "inplace" in str(got).replace("-", "")
        else:
            compare([got], [right])


def test_a_relu_in_place_on_a_value_that_backward_saved() -> None:
    def saved(m: Any, x: Tensor) -> Tensor:
        y = x.exp()  # its backward reads y
        return F.relu(m.u1(y)) + m.relu(y)

    as_stock(saved, images())

    def overwritten(m: Any, x: Tensor) -> Tensor:
        y = m.c1(x)
        z = y.sigmoid()
        m.relu(z)
        return m.n1(y) * z

    as_stock(overwritten, images())


def test_only_what_requires_a_gradient() -> None:
    """Frozen norms, convolutions or the input: the gradients are stock's, absent ones included."""
    for frozen in ("n1", "c1", "c2", "n2", ""):
        for wanted in (False, True):
            for training in (False, True):
                found = []
                for m in pair(block, training):
                    if frozen:
                        getattr(m, frozen).eval().requires_grad_(False)
                    for _ in range(2):
                        m.zero_grad()
                        x = images().requires_grad_(wanted)
                        y = m(x)
                        (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
                    found.append([y.detach(), x.grad, *(p.grad for p in m.parameters())])
                compare(*found)


# --- state (rows 2, 45; traps) ---


def test_training_after_fusing_in_eval_mode() -> None:
    """The norms are there, and learn."""
    found = []
    for m in pair(block):
        with torch.no_grad():
            m(images())
        optimizer = torch.optim.SGD(m.parameters(), 0.05)
        for seed in range(3):
            optimizer.zero_grad()
            m.train()(images(seed)).square().mean().backward()
            optimizer.step()
        assert m.n1.num_batches_tracked == 3 and m.n1.weight.grad is not None
        with torch.no_grad():
            found.append([m.eval()(images()), *m.parameters(), *m.buffers()])
    compare([t.detach() for t in found[0]], [t.detach() for t in found[1]])


def test_an_error_in_the_middle_of_a_step() -> None:
    """As when memory runs out: it surfaces, and the next step is as stock's after it."""

    class Failing(nn.Module):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise MemoryError("out of memory")
            return x

    def body(m: Any, x: Tensor) -> Tensor:
        return F.relu(m.u2(m.extra(F.relu(m.u1(x)))) + x)

    found = []
    for m in pair(body, True, extra=Failing()):
        for fails in (True, False, False, True, False):
            m.extra.fails = fails
            m.zero_grad()
            if fails:
                with pytest.raises(MemoryError):
                    m(images(n=4))
            else:
                m(images()).square().mean().backward()
        found.append([*(p.grad for p in m.parameters()), *m.buffers()])
    compare(*found)


def test_nested_autocast() -> None:
    found = []
    for m in pair(block):
        with torch.no_grad():
            for outer, inner in ((True, False), (False, True), (True, True)):
                with torch.autocast("cpu", torch.bfloat16, enabled=outer):
                    y = m(images())
                    with torch.autocast("cpu", torch.bfloat16, enabled=inner):
                        found.append(m(y.float()))
                    found += [y, m(images())]
    half = len(found) // 2
    assert [t.dtype for t in found[:half]] == [t.dtype for t in found[half:]]
    # Stock rounds to bfloat16 after every operation: up to 2e-2 of the largest value.
    for got, want in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)


def test_memory_of_a_deleted_model_is_freed() -> None:
    m, _ = pair(block)
    with torch.no_grad():
        m(images())
    m.train()(images()).sum().backward()
    (made, *_) = programs(m)
    alive = [weakref.ref(m), weakref.ref(made), weakref.ref(m.c1)]
    del m, made
    gc.collect()
    assert [r() for r in alive] == [None] * 3


def test_data_parallel_replicas() -> None:
    """torch.nn.parallel.replicate gives weights as plain attributes."""
    from torch.nn.parallel.replicate import _replicatable_module

    m, stock = pair(block)
    assert _replicatable_module(m)
    with torch.no_grad():
        m(images())
    replica = m._replicate_for_data_parallel()
    for name, child in m.named_children():
        inner = child._replicate_for_data_parallel()
        for key, p in child._parameters.items():
            setattr(inner, key, None if p is None else p * 2)
        for key, b in child.named_buffers(recurse=False):
            inner._buffers[key] = b
        replica._modules[name] = inner
    want = copy.deepcopy(stock)
    with torch.no_grad():
        for p in want.parameters():
            p.mul_(2)
    y = replica(images())
    torch.testing.assert_close(y.detach(), want(images()).detach(), rtol=1e-3, atol=1e-4)
    y.square().mean().backward()
    want(images()).square().mean().backward()
    for p, q in zip(m.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(p.grad, 2 * q.grad, rtol=1e-3, atol=1e-4)


def test_fusing_does_not_depend_on_the_mode_it_is_done_in() -> None:
    stock = calibrated(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()))
    with torch.inference_mode():
        mine = fr.fuse(stock)
        mine(images())
    mine(images()).sum().backward()
    assert all(p.grad is not None for p in stock.parameters())


@pytest.mark.parametrize("with_version", [True, False])
def test_buffers_loaded_during_the_first_call(with_version, monkeypatch) -> None:
    """Another thread loads weights while a first call is compared with the model's own, which may
    write to buffers: what was loaded stays."""
    mine = calibrated(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU())).eval()
    stock, alone, calls = copy.deepcopy(mine), verify._alone, 0
    fr.fuse(mine, inplace=True)
    new = {k: v * 2 if v.is_floating_point() else v + 1 for k, v in mine.state_dict().items()}

    def loads(own: Callable[[], Any]) -> Any:
        nonlocal calls
        y, calls = alone(own), calls + 1
        for key, t in mine.state_dict().items():
            (t if with_version else t.data).copy_(new[key])
        return y

    monkeypatch.setattr(verify, "_alone", loads)
    with torch.no_grad():
        before = stock(images())
        torch.testing.assert_close(mine(images()), before, rtol=1e-4, atol=1e-5)
        assert calls == 1
        for key, t in mine.state_dict().items():
            assert torch.equal(t, new[key]), key
        monkeypatch.undo()
        stock.load_state_dict(new)
        for _ in range(2):
            torch.testing.assert_close(mine(images()), stock(images()), rtol=1e-4, atol=1e-5)
    assert programs(mine)
