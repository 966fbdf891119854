"""The cases of gpu_cases.py that are of training alone: a convolution with the statistics of the
norm behind it, a convolution's gradients, and its input's with the norm's before it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_contenders import (
    EPS,
    Absent,
    Call,
    Case,
    Exact,
    Place,
    Ready,
    bn_chain,
    inference,
    kernels,
    randn,
    title,
)
from torch import Tensor

import fused_resnet as fr
from fused_resnet import cuda_conv, cuda_training, gemm, train_kernels, tuning
from fused_resnet.gemm import Layer


def tile_candidates(layer: Layer, like: Tensor) -> list[Any]:
    """The tiles that compute a layer; Absent where none does."""
    module, capability = tuning.contender("native"), gemm.capability(like.device)
    problem = gemm.problem_of(layer, like.dtype)
    kernels("conv_bn_relu", "native", like.device)
    if layer.weight_shape[1] < 8 or not module.covers(problem, capability):
        raise Absent("it does not cover this convolution")
    return [c for c in module.candidates(problem, capability) if c.tile != module.STEM]


def fastest_tile(
    layer: Layer,
    like: Tensor,
    call: Callable[[Any], Call],
    seconds: Callable[[Callable[[], Any]], float] | None,
) -> Any:
    """The one by which call(tile) takes least; without a clock, the chooser's."""

    def time_s(config: Any) -> float:
        try:
            call(config)()
            return min(seconds(call(config)) for _ in range(3)) if seconds else math.inf
        except Exception:  # not for this GPU
            return math.inf

    listed = tile_candidates(layer, like)
    if seconds is None or like.device.type == "cpu":  # the emulator's times say nothing
        module, problem = tuning.contender("native"), gemm.problem_of(layer, like.dtype)
        device = gemm.capability(like.device), gemm.multiprocessors(like.device)
        return module.choose_tile(problem, *device, module.reaches(problem, layer.geometry))
    return min(listed, key=time_s)


def own_kernels(like: Tensor) -> Any:
    """Within it, the kernels are this package's: emulated ones on the CPU."""
    emulated = like.device.type == "cpu"
    return fr.use_backend("emulated") if emulated else contextlib.nullcontext()


def conv_train_case(
    place: Place,
    times: int,
    like: Tensor,
    seconds: Callable[[Callable[[], Any]], float] | None,
    each_tile: bool,
) -> Case:
    """A convolution and the training norm behind it, forward: the statistics taken in the
    convolution's epilogue ("native"), or from its output by bn_add_relu ("fused", as models do
    where no winner was measured)."""
    layer, relu = place.layer, place.relu
    K, C, R, S = layer.weight_shape
    x = randn(layer.x_shape, like)
    weight = randn(layer.weight_shape, like) / math.sqrt(C * R * S)
    residual = randn(layer.y_shape, like) if place.residual else None
    norm = train_kernels.Norm(*(torch.rand(2, K, device=like.device) + 0.5).unbind(), EPS)
    geometry = train_kernels.Geometry(*layer.geometry, layer.groups)

    def by(maker: Any, convolve: Callable[[], Any]) -> list[Tensor]:
        z, state = convolve()
        return [maker.normalise_by(state, z, norm, residual, relu)[0]]

    def fused() -> Ready:
        maker = train_kernels.PORTABLE
        return Ready(lambda: by(maker, lambda: maker.convolve(x, weight, geometry)))

    def call(config: Any) -> Call:
        maker = cuda_training.CUDA

        def run() -> list[Tensor]:
            with own_kernels(like):
                return by(maker, lambda: maker.convolve_by(config, x, weight, geometry))

        return run

    def native() -> Ready:
        best = fastest_tile(layer, like, call, seconds)
        return Ready(call(best), best.label())

    def chain(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
        z = F.conv2d(x, weight, None, *geometry)
        return bn_chain(z, norm.weight.to(z.dtype), norm.bias.to(z.dtype), residual, relu)

    def eager() -> list[Tensor]:
        z = F.conv2d(x, weight, None, *geometry)
        return [bn_chain(z, norm.weight, norm.bias, residual, relu)]

    def exact() -> list[Exact]:
        wide = (x.double(), weight.double(), None if residual is None else residual.double())
        return [Exact("y", chain(*wide))]

    makers: dict[str, Callable[[], Ready]] = {"fused": fused, "native": native}
    if each_tile:
        with contextlib.suppress(Absent):
            for config in tile_candidates(layer, like):
                if config.splits == 1:
                    ready = Ready(call(config), config.label())
                    makers[f"native {config.label()}"] = lambda ready=ready: ready
    makers["unfused"] = lambda: Ready(eager)
    y_size = math.prod(layer.y_shape)
    return Case(
        "conv_bn_train",
        f"conv_bn_train {title(layer)}"
        + (", residual" if place.residual else "")
        + ("" if relu else ", no relu"),
        times,
        # z is written, and read once to be normalised.
        (x.numel() + weight.numel() + y_size * (3 + place.residual)) * x.element_size(),
        2 * y_size * C * R * S,
        torch.no_grad()(eager),
        torch.no_grad()(exact),
        {name: inference(maker) for name, maker in makers.items()},
    )


def conv_backward_case(layer: Layer, times: int, like: Tensor) -> Case:
    """Both gradients of the convolution: this package's Triton kernels, and the vendor's."""
    _, C, R, S = layer.weight_shape
    x, g = randn(layer.x_shape, like), randn(layer.y_shape, like)
    weight = randn(layer.weight_shape, like) / math.sqrt(C * R * S)
    geometry, mask = (*map(list, layer.geometry), layer.groups), [True, True, False]

    def stock(g: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
        *sizes, groups = geometry
        backward = torch.ops.aten.convolution_backward
        found = backward(g, x, weight, None, *sizes, False, [0, 0], groups, mask)
        return list(found[:2])

    def triton() -> Ready:
        kernels("conv_bn_relu", "triton", like.device)
        run = torch.ops.fused_resnet.convolution_backward_triton
        return Ready(lambda: list(run(g, x, weight, *geometry, mask)))

    def exact() -> list[Exact]:
        dx, dweight = stock(g.double(), x.double(), weight.double())
        terms = stock(g.double().abs(), x.double().abs(), weight.double())[1].max().item()
        return [Exact("dx", dx), Exact("dweight", dweight, terms)]

    return Case(
        "conv_backward",
        f"conv_backward {title(layer)}",
        times,
        2 * (x.numel() + weight.numel() + g.numel()) * x.element_size(),
        4 * g.numel() * C * R * S,
        lambda: stock(g, x, weight),
        exact,
        {"triton": triton, "unfused": lambda: Ready(lambda: stock(g, x, weight))},
    )


def conv_norm_backward_case(
    layer: Layer,
    times: int,
    like: Tensor,
    seconds: Callable[[Callable[[], Any]], float] | None,
) -> Case:
    """From the gradient of a convolution's output to that of the norm whose ReLU it reads: the mask
    and the sums taken in the epilogue of the input gradient ("native"), or by bn_add_relu's
    backward, after the same tile ("apart") or cuDNN ("fused", as models do where no winner was
    measured)."""
    K, C, R, S = layer.weight_shape
    x, dy = randn(layer.x_shape, like), randn(layer.y_shape, like)
    weight = randn(layer.weight_shape, like) / math.sqrt(K * R * S / layer.groups)
    norm = train_kernels.Norm(*torch.rand(2, x.shape[1], device=like.device).unbind(), EPS)
    geometry = train_kernels.Geometry(*layer.geometry, layer.groups)
    gradient = cuda_training.gradient_layer(layer)
    assert gradient is not None
    y, (mean, var) = train_kernels.PORTABLE.normalise(x, norm, None, True)
    normed = train_kernels.Normed(x, norm, (mean, var, torch.zeros_like(mean)))

    def after(dh: Tensor) -> list[Tensor]:
        plain = normed._replace(state=(mean, var))
        return list(train_kernels.PORTABLE.norm_gradients_by(None, dh, y, plain))

    def fused() -> Ready:
        maker = train_kernels.PORTABLE
        return Ready(lambda: after(maker.input_gradient(dy, y, weight, geometry)))

    def call(config: Any) -> Call:
        maker = cuda_training.CUDA

        def run() -> list[Tensor]:
            with own_kernels(like):
                made = maker.relu_gradient_by(config, dy, weight, geometry, normed)
                return list(maker.norm_gradients_by(made[1], made[0], y, normed))

        return run

    def call_apart(config: Any) -> Call:
        rows = cuda_training.turned_rows(weight, layer.groups, like.dtype)
        ones, zeros = torch.ones_like(mean), torch.zeros_like(mean)

        def run() -> list[Tensor]:
            dh = torch.empty_like(x)
            with own_kernels(like):
                cuda_conv.ops().implicit_gemm(
                    dy, rows, ones, zeros, None, dh, False, *gradient.geometry, layer.groups,
                    config.tile, config.splits,
                )  # fmt: skip
            return after(dh)

        return run

    def ready(call: Callable[[Any], Call]) -> Ready:
        best = fastest_tile(gradient, like, call, seconds)
        return Ready(call(best), best.label())

    def chain(dy: Tensor, x: Tensor, y: Tensor, weight: Tensor, *vectors: Tensor) -> list[Tensor]:
        mask = [True, False, False]
        aten, (*sizes, groups) = torch.ops.aten, geometry
        dh = aten.convolution_backward(
            dy, y, weight, None, *sizes, False, [0, 0], groups, mask
        )[0]  # fmt: skip
        scale, mean, var = vectors
        rest = (None, None, mean, (var + EPS).rsqrt(), True, EPS, [True, True, True])
        g = aten.threshold_backward(dh, y, 0)
        return list(aten.native_batch_norm_backward(g, x, scale, *rest))

    def exact() -> list[Exact]:
        operands = [t.double() for t in (dy, x, y, weight, norm.weight, mean, var)]
        dx, dweight, dbias = chain(*operands)
        terms = x[:, 0].numel() * 0.5  # of gradients of about one, half of which are let through
        return [Exact("dx", dx), Exact("dweight", dweight, terms), Exact("dbias", dbias, terms)]

    makers: dict[str, Callable[[], Ready]] = {
        "fused": fused,
        "native": lambda: ready(call),
        "apart": lambda: ready(call_apart),
        "unfused": lambda: Ready(lambda: chain(dy, x, y, weight, norm.weight, mean, var)),
    }
    return Case(
        "conv_norm_backward",
        f"conv_norm_backward {title(layer)}",
        times,
        # g is written, and read once with x, to be dx.
        (dy.numel() + weight.numel() + 5 * x.numel()) * x.element_size(),
        2 * dy.numel() * C * R * S,
        torch.no_grad()(lambda: chain(dy, x, y, weight, norm.weight, mean, var)),
        torch.no_grad()(exact),
        {name: inference(maker) for name, maker in makers.items()},
    )
