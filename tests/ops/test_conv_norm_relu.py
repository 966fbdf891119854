"""conv_norm_relu: values, gradients, and when its convolution is packed."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

import fused_resnet as fr
from fused_resnet.kernels import cache, native
from fused_resnet.layout import memory_format
from tests.ops.op_cases import (
    DENSE,
    DTYPES,
    LAYOUTS,
    close,
    integers,
    interpreted,
    lifted,
    randn,
    same,
    unchanged,
)

OP = "conv_bn_relu"  # whose kernels it runs
EPS = 1e-3
VECTORS = ("bias", "norm_weight", "norm_bias", "running_mean", "running_var")
NAMES = ("weight", *VECTORS)

# name -> x's (N, C, H, W), K, kernel (R, S), stride, padding, dilation, groups
CASES = {
    "pointwise": ((2, 32, 7, 5), 48, (1, 1), 1, 0, 1, 1),
    "3x3": ((2, 16, 6, 7), 24, (3, 3), 1, 1, 1, 1),
    "asymmetric": ((1, 6, 9, 8), 10, (1, 5), (2, 1), (0, 2), (1, 2), 1),
    "groups": ((2, 12, 6, 5), 30, (3, 3), 2, 1, 1, 3),
}
ABSENT = {
    "all given": (), "no bias": ("bias",), "no norm_weight": ("norm_weight",),
    "no norm_bias": ("norm_bias",), "statistics alone": ("bias", "norm_weight", "norm_bias"),
}  # fmt: skip


def operands(
    case: str, dtype: torch.dtype, device: str = "cpu", absent: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor | None], Tensor, tuple]:
    """x, weight and the vectors by name, a residual (all channels_last), and the geometry."""
    shape, K, kernel, *rest = CASES[case]
    geometry = tuple(rest)
    fan_in = shape[1] // geometry[3] * kernel[0] * kernel[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = randn(shape, dtype, device)
    weight = randn((K, shape[1] // geometry[3], *kernel), dtype, device) / fan_in**0.5
    tensors: dict[str, Tensor | None] = {"x": x, "weight": weight}
    for name in VECTORS:
        tensors[name] = randn((K,), dtype if name == "bias" else wide, device)
    tensors["running_var"] = tensors["running_var"].square() + 0.5
    out = F.conv2d(x.float(), weight.float(), None, *geometry).shape
    for name in absent:
        tensors[name] = None
    last = torch.channels_last
    tensors["x"], tensors["weight"] = (t.contiguous(memory_format=last) for t in (x, weight))
    return tensors, randn(out, dtype, device).contiguous(memory_format=last), geometry


def fused(tensors, residual, relu, *geometry) -> Tensor:
    return fr.conv_norm_relu(*tensors.values(), EPS, residual, relu, *geometry)


def stock(tensors, residual, relu, *geometry) -> Tensor:
    """As in a model: convolution with its bias, batch norm in eval(), addition, ReLU."""
    x, weight, bias, norm_weight, norm_bias, mean, var = tensors.values()
    y = F.conv2d(x, weight, bias, *geometry)
    y = F.batch_norm(y, mean, var, norm_weight, norm_bias, eps=EPS)
    if residual is not None:
        y = y + residual
    return torch.relu(y) if relu else y


def exact(tensors, residual, relu, *geometry) -> Tensor:
    wide = {name: lifted(t) for name, t in tensors.items()}
    return stock(wide, lifted(residual), relu, *geometry)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("absent", ABSENT)
def test_values(device, backend, poison, absent, case, dtype):
    tensors, residual, geometry = operands(case, dtype, device, ABSENT[absent])
    for layout in DENSE:
        tensors["x"], added = LAYOUTS[layout](tensors["x"]), LAYOUTS[layout](residual)
        check = unchanged(*tensors.values(), residual)
        variants = ((added, True), (None, True), (added, False), (None, False))
        for rest in variants[::3] if interpreted(backend, device) else variants:
            arguments = (tensors, *rest, *geometry)
            y = fused(*arguments)
            close(("y",), [y], [stock(*arguments)], [exact(*arguments)], dtype)
            assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format(tensors["x"]))
        check()


@pytest.mark.pairwise
@pytest.mark.parametrize("case", ["3x3", "groups"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(device, backend, poison, layout, case):
    tensors, residual, geometry = operands(case, torch.float32, device)
    tensors["x"], residual = LAYOUTS[layout](tensors["x"]), LAYOUTS[layout](residual)
    arguments = (tensors, residual, True, *geometry)
    close(("y",), [fused(*arguments)], [stock(*arguments)], [exact(*arguments)], torch.float32)


def test_small_integers_are_exact(device, backend):
    """With a variance of 4 and eps 0 every value is exact: one wrong operand changes the result."""
    tensors, _, geometry = operands("3x3", torch.float32, device)
    for name, t in tensors.items():
        tensors[name] = integers(t.shape, torch.float32, device)
    tensors["running_var"].fill_(4)
    with torch.no_grad():
        y = fr.conv_norm_relu(*tensors.values(), 0.0, None, False, *geometry)
    x, weight, bias, norm_weight, norm_bias, mean, _ = (lifted(t) for t in tensors.values())
    gain, offset = (norm_weight / 2)[:, None, None], norm_bias[:, None, None]
    want = F.conv2d(x, weight, bias - mean, *geometry) * gain + offset
    same(y.cpu(), want.float())


def composed(tensors, residual, relu, *geometry) -> Tensor:
    """By PyTorch's elementwise operations: its batch norm has no gradients of the statistics."""
    x, weight, bias, norm_weight, norm_bias, mean, var = tensors.values()
    channel = lambda v: v[:, None, None]  # noqa: E731
    y = F.conv2d(x, weight, bias, *geometry)
    y = (y - channel(mean)) * channel(torch.rsqrt(var + EPS))
    if norm_weight is not None:
        y = y * channel(norm_weight)
    if norm_bias is not None:
        y = y + channel(norm_bias)
    y = y.to(x.dtype) + residual
    return torch.relu(y) if relu else y


@pytest.mark.slow_interpreted
@pytest.mark.pairwise
@pytest.mark.parametrize("case", ["3x3", "asymmetric", "groups"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_gradients(device, backend, dtype, absent, relu, case):
    tensors, residual, geometry = operands(case, dtype, device, ABSENT[absent])
    wide = {name: lifted(t) for name, t in tensors.items()}
    sums = composed(wide, lifted(residual), False, *geometry)
    near_zero = sums.abs() < 16 * torch.finfo(dtype).eps * sums.abs().max()
    dy = torch.where(near_zero, 0, torch.randn_like(sums))

    def gradients(function, given, added):
        leaves = {k: None if t is None else t.clone().requires_grad_() for k, t in given.items()}
        added = added.clone().requires_grad_()
        y = function(leaves, added, relu, *geometry)
        inputs = [t for t in (*leaves.values(), added) if t is not None]
        grads = torch.autograd.grad(y, inputs, dy.to(y.device, y.dtype))
        assert [g.dtype for g in grads] == [t.dtype for t in inputs]
        return grads

    # The vectors' gradients are sums over (N, P, Q), whose terms may cancel.
    g = (torch.where(sums > 0, dy, 0) if relu else dy).abs()
    centred = {**wide, "norm_weight": None, "norm_bias": None}
    centred["x"], centred["weight"] = wide["x"].abs(), wide["weight"].abs()
    centred["running_mean"] = -wide["running_mean"].abs()
    if wide["bias"] is not None:
        centred["bias"] = wide["bias"].abs()
    terms = g * composed(centred, torch.zeros_like(sums), False, *geometry)
    invstd = torch.rsqrt(wide["running_var"] + EPS)
    gain = invstd if wide["norm_weight"] is None else invstd * wide["norm_weight"].abs()
    of_shift, of_scale = g.sum((0, 2, 3)), terms.sum((0, 2, 3))
    bounds = {
        "bias": of_shift * gain, "norm_weight": of_scale, "norm_bias": of_shift,
        "running_mean": of_shift * gain, "running_var": of_scale * gain * invstd / 2,
    }  # fmt: skip
    names = [name for name, t in tensors.items() if t is not None] + ["residual"]
    close(
        names, gradients(fused, tensors, residual), gradients(composed, tensors, residual),
        gradients(composed, wide, lifted(residual)), dtype,
        {name: bound.max().item() for name, bound in bounds.items()},
    )  # fmt: skip


def test_only_some_gradients(device):
    tensors, residual, geometry = operands("groups", torch.float32, device)
    every = [t.clone().requires_grad_() for t in (*tensors.values(), residual)]
    y_of = lambda given: fr.conv_norm_relu(*given[:7], EPS, given[7], True, *geometry)  # noqa: E731
    y_of(every).sum().backward()
    for mask in range(1, 256):
        some = [t.detach().clone().requires_grad_(bool(mask >> i & 1)) for i, t in enumerate(every)]
        y_of(some).sum().backward()
        for t, full in zip(some, every, strict=True):
            assert (t.grad is not None) == t.requires_grad
            if t.requires_grad:
                torch.testing.assert_close(t.grad, full.grad, rtol=1e-5, atol=1e-5)
    assert not y_of([t.detach() for t in every]).requires_grad


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
def test_first_and_second_derivatives(device, relu):
    shapes = ((1, 4, 5, 4), (4, 2, 3, 3), *[(4,)] * 5, (1, 4, 3, 2))
    inputs = [randn(shape, torch.float64, device) for shape in shapes]
    inputs[6] = inputs[6].square() + 0.5
    inputs = [t.requires_grad_() for t in inputs]

    def y_of(*tensors):
        return fr.conv_norm_relu(*tensors[:7], EPS, tensors[7], relu, 2, 1, 1, 2)

    assert gradcheck(y_of, inputs)
    assert gradgradcheck(y_of, inputs)

    def of_weight(weight):  # every operand is computed from one tensor
        v = weight.sum((1, 2, 3))
        return y_of(
            inputs[0] * v.view(-1, 1, 1), weight, v, v * 2, v * 3, v * 4, v.square() + 1, None
        )

    assert gradcheck(of_weight, inputs[1:2])
    assert gradgradcheck(of_weight, inputs[1:2])


@pytest.fixture
def packed(device, backend, monkeypatch) -> list[Tensor]:
    """The weights of which a convolution was packed, in order."""
    if backend in ("reference", "emulated"):
        pytest.skip("the reference computes, for the emulated kernels in float32 without TF32")
    made: list[Tensor] = []
    right = cache.cached_convolution

    def counting(kind, problem, weight, *rest):
        def counted(problem, weight, scale, shift):
            made.append(weight)
            return kind(problem, weight, scale, shift)

        kinds[kind] = kinds.get(kind, counted)  # compared by the cache
        return right(kinds[kind], problem, weight, *rest)

    kinds: dict = {}
    monkeypatch.setattr(cache, "cached_convolution", counting)
    return made


WRITES = {
    "in place": lambda tensors, name: tensors[name].mul_(1.5),
    "data": lambda tensors, name: tensors[name].data.mul_(1.5),
    "new data": lambda tensors, name: setattr(tensors[name], "data", tensors[name].data * 1.5),
    "new object": lambda tensors, name: tensors.__setitem__(name, tensors[name] * 1.5),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", NAMES)
def test_packed_again_after_a_write_alone(device, backend, packed, name, write):
    if write == "data" and (device == "cuda" or native.load() is not None):
        pytest.skip("fingerprints are of the native build, and of tensors on the CPU")
    if interpreted(backend, device) and write != "in place":
        pytest.skip("slow when interpreted")
    tensors, residual, geometry = operands("3x3", torch.float32, device)

    def packings(calls: int) -> int:
        packed.clear()
        for _ in range(calls):
            arguments = (tensors, residual, True, *geometry)
            close(
                ("y",), [fused(*arguments)], [stock(*arguments)], [exact(*arguments)], torch.float32
            )
        return len(packed)

    # Packed for each of the first two calls: those of the second are kept.
    assert packings(2) == 2 and packings(3) == 0
    WRITES[write](tensors, name)
    assert packings(2) == 2 and packings(3) == 0


def test_packed_again_for_other_arguments(device, backend, packed):
    tensors, residual, geometry = operands("3x3", torch.float32, device)
    for _ in range(3):
        fused(tensors, residual, True, *geometry)
    assert len(packed) == 2
    changed = {
        "eps": lambda: fr.conv_norm_relu(*tensors.values(), 1.0, residual, True, *geometry),
        "bias": lambda: fused({**tensors, "bias": None}, residual, True, *geometry),
        "swapped": lambda: fused(
            {**tensors, "bias": tensors["norm_bias"], "norm_bias": tensors["bias"]},
            residual, True, *geometry,
        ),
        "conv_bn_relu": lambda: fr.conv_bn_relu(
            tensors["x"], tensors["weight"], tensors["bias"], tensors["norm_bias"],
            residual, True, *geometry,
        ),
    }  # fmt: skip
    for name, call in changed.items():
        packed.clear()
        y = call()
        assert len(packed) == 1, name
        with fr.use_backend("reference"):
            torch.testing.assert_close(y, call(), rtol=1e-4, atol=1e-4)


def test_packed_again_for_the_same_tensors_in_another_place(device, backend, packed):
    """As the bias, and then as the norm's weight: the tensors given are the same."""
    tensors, residual, geometry = operands("3x3", torch.float32, device)
    given = tensors["bias"]
    for bias, norm_weight in ((given, None), (None, given)):
        packed.clear()
        for _ in range(3):
            placed = {**tensors, "bias": bias, "norm_weight": norm_weight}
            y = fused(placed, residual, True, *geometry)
        assert len(packed) == 2
        torch.testing.assert_close(
            y, stock(placed, residual, True, *geometry), rtol=1e-4, atol=1e-4
        )


def test_inference_tensors_are_packed_for_each_call(device, packed, backend):
    tensors, residual, geometry = operands("3x3", torch.float32, device)
    with torch.inference_mode():  # tensors without a version counter
        tensors["running_mean"] = tensors["running_mean"] * 2
        for _ in range(3):
            arguments = (tensors, residual, True, *geometry)
            close(
                ("y",), [fused(*arguments)], [stock(*arguments)], [exact(*arguments)], torch.float32
            )
            tensors["running_mean"].add_(1)
    assert len(packed) == 3


def test_packed_weights_are_freed_with_the_weight(device):
    """Also where a norm's hook leads to the weight."""
    tensors, residual, geometry = operands("3x3", torch.float32, device)
    before = len(cache._cached)
    weight = tensors["weight"]
    tensors["norm_weight"].requires_grad_().register_hook(lambda grad, weight=weight: None)
    for _ in range(3):
        fused(tensors, residual, True, *geometry)
    reference = weakref.ref(weight)
    del tensors, weight
    gc.collect()
    assert reference() is None and len(cache._cached) <= before


class Block(torch.nn.Module):
    """A convolution and a norm as one op."""

    def __init__(self, tensors, geometry) -> None:
        super().__init__()
        for name in (*NAMES[:4],):
            self.register_parameter(name, torch.nn.Parameter(tensors[name]))
        for name in NAMES[4:]:
            self.register_buffer(name, tensors[name])
        self.geometry = geometry

    def forward(self, x, residual):
        tensors = [getattr(self, name) for name in NAMES]
        return fr.conv_norm_relu(x, *tensors, EPS, residual, True, *self.geometry) * 2


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_compiles_as_one_graph_that_packs_once(device, backend, packed, grad):
    if interpreted(backend, device):
        pytest.skip("slow when interpreted")
    tensors, residual, geometry = operands("3x3", torch.float32, device)
    block = Block(tensors, geometry)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        with torch.set_grad_enabled(grad):
            packed.clear()
            got = [compiled(tensors["x"], residual) for _ in range(4)]
            assert len(packed) == 2
            want = block(tensors["x"], residual)
            same(got[-1], want)
            if grad:
                parameters = [*block.parameters()]
                wanted = torch.autograd.grad(want.square().sum(), parameters)
                for g, w in zip(
                    torch.autograd.grad(got[-1].square().sum(), parameters), wanted, strict=True
                ):
                    torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6 * w.abs().max().item())
        with torch.no_grad():  # a step of the running statistics
            block.running_mean.add_(1)
    with torch.no_grad():
        program = torch.export.export(block, (tensors["x"], residual)).module()
        same(program(tensors["x"], residual), block(tensors["x"], residual))


@pytest.mark.slow_interpreted
def test_opcheck(device, backend):
    tensors, residual, geometry = operands("3x3", torch.float32, device)
    inputs = [t.requires_grad_() for t in (*tensors.values(), residual)]
    pairs = [[v, v] for v in geometry[:3]]
    torch.library.opcheck(
        torch.ops.fused_resnet.conv_norm_relu, (*inputs[:7], EPS, inputs[7], True, *pairs, 1)
    )


@pytest.mark.parametrize("case", CASES)
def test_fake_tensors_have_the_real_strides(device, case):
    tensors, residual, geometry = operands(case, torch.bfloat16, device)
    for layout in ("contiguous", "channels_last", "sliced channels_last"):
        tensors["x"] = LAYOUTS[layout](tensors["x"])
        real = fused(tensors, residual, True, *geometry)
        with FakeTensorMode() as mode:
            given = {name: mode.from_tensor(t) for name, t in tensors.items()}
            fake = fused(given, mode.from_tensor(residual), True, *geometry)
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_autocast(device, backend):
    tensors, residual, geometry = operands("3x3", torch.float32, device)
    arguments = (residual, True, *geometry)
    for dtype in (torch.bfloat16, torch.float16):
        cast = {k: t.to(dtype) if k in ("x", "weight", "bias") else t for k, t in tensors.items()}
        want = fused(cast, residual.to(dtype), True, *geometry)
        with torch.autocast(device, dtype):
            same(fused(tensors, *arguments), want)
            with torch.autocast(device, enabled=False):
                assert fused(tensors, *arguments).dtype == torch.float32


def test_function_transforms(device):
    tensors, residual, geometry = operands("3x3", torch.float64, device)
    xs = torch.stack([tensors["x"], tensors["x"] * 2])
    y_of = lambda x: fused({**tensors, "x": x}, residual, True, *geometry)  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(y_of)(xs), torch.stack([y_of(x) for x in xs]))


def test_counted_flops(device):
    from torch.utils.flop_counter import FlopCounterMode

    tensors, residual, geometry = operands("3x3", torch.float32, device)
    counted = []
    for function in (fused, composed):
        with FlopCounterMode(display=False) as counter:
            function(tensors, residual, True, *geometry)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


ERRORS = {
    "x": (lambda a: {"x": a["x"][0]}, ValueError, "x must be 4-D (N, C, H, W), got 3-D of shape"),
    "weight": (
        lambda a: {"weight": a["weight"].half()},
        RuntimeError,
        "weight must be float32 on cpu as x is, got float16 of shape (4, 8, 3, 3) on cpu",
    ),
    **{
        name: (
            lambda a, name=name: {name: torch.ones(8)},
            RuntimeError,
            f"{name} must be floating point of shape (4,) on cpu, got float32 of shape (8,)",
        )
        for name in VECTORS
    },
    "integers": (
        lambda a: {"running_var": torch.ones(4, dtype=torch.int64)},
        RuntimeError,
        "running_var must be floating point of shape (4,) on cpu, got int64 of shape (4,)",
    ),
    "residual": (
        lambda a: {"residual": torch.zeros(1, 4, 4, 4)},
        RuntimeError,
        "residual must be float32 of shape (2, 4, 4, 4) on cpu, got float32 of shape (1, 4, 4, 4)",
    ),
    "eps": (lambda a: {"eps": -0.5}, ValueError, "eps must be at least 0, got -0.5"),
    "stride": (lambda a: {"stride": 0}, RuntimeError, "stride must be at least 1, got (0, 0)"),
    "padding": (lambda a: {"padding": (1, 1, 1)}, ValueError, "one or two integers, got (1,"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error_messages(case):
    change, error, words = ERRORS[case]
    arguments = {"x": torch.zeros(2, 8, 6, 6), "weight": torch.zeros(4, 8, 3, 3)}
    arguments |= {name: torch.ones(4) for name in VECTORS}
    fr.conv_norm_relu(**arguments)
    with pytest.raises(error, match="^conv_norm_relu: .*" + re.escape(words)):
        fr.conv_norm_relu(**{**arguments, **change(arguments)})
