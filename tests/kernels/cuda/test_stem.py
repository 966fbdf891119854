"""The stem of a ResNet (csrc/cuda/convolution/stem.cu), in the emulator and, if available, on a
GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fused_resnet as fr
from fused_resnet.kernels import registry
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.cuda.convolution import GpuConv
from tests.emulator import emulation
from tests.kernels.cuda import machines
from tests.ops.op_cases import LAYOUTS, close, fused_conv, integers, lifted, randn, same

pytestmark = pytest.mark.skipif(
    emulation.unavailable() is not None, reason=str(emulation.unavailable())
)

# Tests without it run in the emulator only.
also_on_gpu = pytest.mark.usefixtures("kernels")

SIZES = {
    "one patch": (1, 3, 32, 32),
    "two images, odd": (2, 3, 45, 71),
    "one pixel": (2, 3, 1, 1),
    "one row": (1, 3, 1, 40),
    "several patches": (1, 3, 100, 66),
}


def packed(weight):
    """(64, 3, 7, 7) -> (64, 7, 8, 4), padded with zeros."""
    return F.pad(weight, (0, 1, 0, 0, 0, 1)).permute(0, 2, 3, 1).contiguous()


def operands(shape, dtype, make=randn):
    weight = make((64, 3, 7, 7), dtype)
    if make is randn:
        weight = weight / 12
    return make(shape, dtype), weight, torch.rand(64) + 0.5, torch.randn(64)


def stock(x, weight, scale, shift, pool):
    y = F.conv2d(x, weight, None, 2, 3)
    y = F.batch_norm(y, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, eps=0.0)
    y = torch.relu(y)
    return F.max_pool2d(y, 3, 2, 1) if pool else y


def exact(*arguments):
    return stock(*map(lifted, arguments[:-1]), arguments[-1])


def stem(x, weight, scale, shift, pool):
    moved = map(machines.to_device, (x, packed(weight), scale, shift))
    return machines.ops().stem(*moved, pool).cpu()


@also_on_gpu
@pytest.mark.parametrize("pool", [True, False], ids=["pooled", "not pooled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_values(poison, size, dtype, pool):
    arguments = (*operands(SIZES[size], dtype), pool)
    y = stem(*arguments)
    close(("y",), [y], [machines.stock(stock, *arguments)], [exact(*arguments)], dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)
    wide = stem(arguments[0].float(), *arguments[1:])
    same(wide, y)


@pytest.mark.parametrize("padding", [3, 2])
def test_conv_bn_relu_uses_it_only_for_the_stem(emulator, poison, padding):
    """conv_bn_relu packs the weights; with another padding the stem's kernel is not used."""
    x, weight, scale, shift = operands((2, 3, 21, 34), torch.bfloat16)
    with fr.use_backend("emulated"), emulation.launches() as launches:
        y = fr.conv_bn_relu(x, weight, scale, shift, None, True, 2, padding)

    def expected(*tensors):
        z = F.conv2d(tensors[0], tensors[1], None, 2, padding)
        return torch.relu(z * tensors[2].view(-1, 1, 1) + tensors[3].view(-1, 1, 1))

    tensors = (x, weight, scale, shift)
    want = expected(*map(lifted, tensors))
    close(("y",), [y], [expected(*tensors).to(x.dtype)], [want], torch.bfloat16)
    assert [launch.threads == 320 for launch in launches] == [padding == 3]


@also_on_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(poison, layout):
    x, *rest = operands((2, 3, 21, 34), torch.bfloat16)
    x = LAYOUTS[layout](x)
    same(stem(x, *rest, True), stem(x.contiguous(), *rest, True))


@also_on_gpu
def test_small_integers_are_exact(poison):
    x, weight, scale, shift = operands((2, 3, 70, 37), torch.bfloat16, integers)
    arguments = (x.clamp(-1, 1), weight.clamp(-1, 1), scale.round(), shift.round(), True)
    same(stem(*arguments), exact(*arguments).to(torch.bfloat16))


@also_on_gpu
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("at", [(0, 0), (13, 17), (44, 38)], ids=str)
def test_non_finite_values_propagate_as_in_stock(poison, value, at):
    """The pixel must only affect windows that cover it, although rows of taps are read at once."""
    x, weight, scale, shift = operands((1, 3, 45, 39), torch.float16)
    x[0, 1, at[0], at[1]] = value
    for pool in (True, False):
        y, want = stem(x, weight, scale, shift, pool), stock(x, weight, scale, shift, pool)
        same(y.isnan(), want.isnan())
        same(y.isinf(), want.isinf())


def test_result_does_not_depend_on_thread_order(poison):
    arguments = (*operands((1, 3, 60, 45), torch.bfloat16), True)
    first = stem(*arguments)
    for number in range(3):
        emulation.seed(number)
        with emulation.device(multiprocessors=1 + number):
            same(stem(*arguments), first)


def test_no_bank_conflicts(poison):
    arguments = operands((1, 3, 64, 64), torch.bfloat16)
    with emulation.wavefronts() as wavefronts:
        stem(*arguments, True)
    needed, ideal = wavefronts["ldmatrix"]
    assert needed == ideal > 0
    needed, ideal = wavefronts["store"]
    assert needed <= 1.1 * ideal  # patches are stored in the layout of x


@also_on_gpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: [a[0][:, :2], *a[1:]], r"x must have shape \(N, 3, H, W\), got \(1, 2, 9, 9\)"),
        (lambda a: [a[0].half(), *a[1:]], "x must be float32 or of weight's dtype, got float16"),
        (lambda a: [a[0], a[1].float(), *a[2:]], "weight must be float16 or bfloat16, got float32"),
        (lambda a: [a[0], a[1][:32], *a[2:]], r"must have shape \(64, 7, 8, 4\), got \(32, 7"),
        (lambda a: [*a[:2], a[2][:3], a[3]], r"scale must be float32 of shape \(64,\), got"),
    ],
    ids=["channels", "dtype", "weight's dtype", "outputs", "scale"],
)
def test_errors_name_the_argument(change, message):
    x, weight, scale, shift = operands((1, 3, 9, 9), torch.bfloat16)
    arguments = map(machines.to_device, change([x, packed(weight), scale, shift]))
    with pytest.raises(RuntimeError, match=f"stem: .*{message}"):
        machines.ops().stem(*arguments, True)


@pytest.mark.parametrize("C", [1, 3, 4])
def test_stem_with_any_number_of_channels(C):
    """Three channels have a separate kernel; others use the general convolution."""
    emulation.load()
    weight, x = integers((64, C, 7, 7), torch.bfloat16), integers((1, C, 30, 30), torch.bfloat16)
    with registry.use_backend("emulated"):
        ones, zeros = torch.ones(64), torch.zeros(64)
        geometry = ((2, 2), (3, 3), (1, 1), 1)
        conv = fused_conv(GpuConv, weight, ones, zeros, torch.bfloat16, *geometry)
        assert conv.stem == (C == 3)
        y = conv.run(x, None, Activation.RELU)
    want = F.conv2d(x.float(), weight.float(), None, 2, 3).relu().bfloat16()
    assert torch.equal(y, want)
