"""The head of a network as one op: values, what it refuses, and where it stands for the modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet as fr
from fused_resnet.fusion.inference.head import run_head
from tests.fusion.training.training_helpers import needs_native

pytestmark = needs_native
LAST = torch.channels_last
OP = torch.ops.fused_resnet_native
# Means and sums are float32 whatever the dtype: one rounding of a result near 1, and float32's of
# some thousand additions.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "classes"),
    [((1, 2048, 7, 7), 1000), ((3, 513, 5, 3), 11), ((2, 64, 1, 1), 10), ((5, 7, 20, 20), 3),
     ((9, 80, 9, 8), 5), ((1, 1, 4, 4), 1), ((40, 512, 2, 2), 33)],
)  # fmt: skip
def test_values(shape, classes, bias, dtype):
    torch.manual_seed(0)
    N, C = shape[:2]
    x = torch.randn(shape).to(dtype).contiguous(memory_format=LAST)
    weight, added = (torch.randn(classes, C) / C**0.5).to(dtype), torch.randn(classes).to(dtype)
    y = OP.mean_linear(x, weight, added if bias else None)
    want = F.linear(x.double().mean((2, 3)), weight.double(), added.double() if bias else None)
    assert y.dtype == dtype and y.shape == (N, classes) and y.is_contiguous()
    error = (y.double() - want).abs() / want.abs().clamp(min=1)
    assert error.max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 2048, 7, 7), (3, 513, 5, 3), (2, 64, 1, 1), (4, 24, 90, 70)])
def test_means(shape, dtype):
    """Not rounded to the dtype of x: in float32, or float64 for float64."""
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=LAST)
    y = OP.mean_pixels(x)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert y.dtype == wide and y.shape == shape[:2] and y.is_contiguous()
    assert (y.double() - x.double().mean((2, 3))).abs().max() <= TOLERANCE[wide]


def test_means_of_nothing():
    assert OP.mean_pixels(torch.zeros(0, 5, 2, 2)).shape == (0, 5)
    with pytest.raises(RuntimeError, match="mean_pixels: x must have pixels, got shape"):
        OP.mean_pixels(torch.zeros(2, 5, 0, 3))
    with pytest.raises(RuntimeError, match="mean_pixels: x must be channels_last"):
        OP.mean_pixels(torch.zeros(2, 20, 3, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values(value):
    x = torch.randn(2, 20, 3, 3).contiguous(memory_format=LAST)
    x[1, 3, 2, 2] = value
    weight = torch.randn(4, 20)
    y = OP.mean_linear(x, weight, None)
    want = F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), weight)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert not y[1].isfinite().any() and y[0].isfinite().all()


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.zeros(4, 19), None, "weight must be contiguous, float32 and of last size 20"),
        (torch.zeros(4, 20).double(), None, "weight must be contiguous, float32"),
        (torch.zeros(20, 4).t(), None, "weight must be contiguous"),
        (torch.zeros(4, 20), torch.zeros(5), "bias must be contiguous, float32 and of last size 4"),
    ],
)
def test_errors(weight, bias, message):
    x = torch.zeros(2, 20, 3, 3).contiguous(memory_format=LAST)
    with pytest.raises(RuntimeError, match=f"mean_linear: {message}"):
        OP.mean_linear(x, weight, bias)
    with pytest.raises(RuntimeError, match="mean_linear: x must be channels_last"):
        OP.mean_linear(torch.zeros(2, 20, 3, 3), torch.zeros(4, 20), None)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced_class(model):
    model.fc.__class__ = Scaled


def forward_hook(model):
    model.fc.register_forward_hook(lambda m, inputs, y: y * 3)


def pool_hook(model):
    model.avgpool.register_forward_hook(lambda m, inputs, y: y * 3)


def another_pool(model):
    model.avgpool = nn.AdaptiveMaxPool2d(1)


def larger_pool(model):
    model.avgpool, model.fc = nn.AdaptiveAvgPool2d(2), nn.Linear(2048, 10)


def no_head(model):
    model.fc = nn.Identity()


def weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.fc)


def plain_attribute(model):
    weight = model.fc.weight.detach() * 5
    del model.fc.weight
    model.fc.weight = weight


def no_bias(model):
    model.fc = nn.Linear(512, 10, bias=False)


def strided_weight(model):
    model.fc.weight = nn.Parameter(torch.randn(512, 10).t())


def strided_bias(model):
    model.fc.bias = nn.Parameter(torch.randn(20)[::2])


def one_bias_for_all(model):
    model.fc.bias = nn.Parameter(torch.randn(1))


def one_output(model):
    model.fc.weight, model.fc.bias = nn.Parameter(torch.randn(512)), None


def sparse_weight(model):
    kept = torch.randn(10, 512).relu()
    model.fc.weight = nn.Parameter(kept.to_sparse_csr(), requires_grad=False)


EDITS = [
    replaced_class, forward_hook, pool_hook, another_pool, larger_pool, no_head, weight_norm,
    plain_attribute, no_bias, strided_weight, strided_bias, one_bias_for_all, one_output,
    sparse_weight,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("edit", [None, *EDITS])
def test_as_the_modules(edit, fuse):
    """Before and after an edit of the head, as the modules one by one."""
    torch.manual_seed(0)
    model = fr.resnet18(weights=None, num_classes=10).eval()
    if fuse:
        models = pytest.importorskip("torchvision.models")
        stock = models.resnet18(num_classes=10).eval()
        stock.load_state_dict(model.state_dict())
        model = fr.fuse(stock)
    x = torch.randn(2, 3, 40, 48)
    with torch.no_grad():
        for _ in range(2):
            y = model(x)
            with fr.use_backend("reference"):
                want = model(x)
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
            assert y.is_contiguous() and y.stride() == want.stride()
            if edit is not None:
                torch.manual_seed(1)
                edit(model)


@pytest.mark.parametrize("where", ["weight", "input"])
def test_gradients_need_the_modules(where):
    linear, pool = nn.Linear(20, 4), nn.AdaptiveAvgPool2d(1)
    x = torch.randn(2, 20, 3, 3)
    linear.requires_grad_(where == "weight")
    x.requires_grad_(where == "input")
    assert run_head(pool, linear, x) is None
    with torch.no_grad():
        y = run_head(pool, linear, x)
    torch.testing.assert_close(y, linear(pool(x).flatten(1)), rtol=1e-5, atol=1e-6)


def test_autocast_casts_the_linear_layer():
    linear, pool = nn.Linear(20, 4), nn.AdaptiveAvgPool2d(1)
    x = torch.randn(2, 20, 3, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert run_head(pool, linear, x) is None
        y = run_head(pool, linear.bfloat16(), x.bfloat16())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, linear(pool(x.bfloat16()).flatten(1)), rtol=2e-2, atol=1e-2)


def test_replaced_functions(monkeypatch):
    linear, pool = nn.Linear(20, 4), nn.AdaptiveAvgPool2d(1)
    x = torch.randn(2, 20, 3, 3)
    with torch.no_grad():
        assert run_head(pool, linear, x) is not None
        monkeypatch.setattr(F, "linear", lambda *args: None)
        assert run_head(pool, linear, x) is None
