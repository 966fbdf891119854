"""The cases of gpu_cases.py that are of training alone: a convolution with the statistics of the
norm behind it, with the norm before it as well, a convolution's gradients, and its input's with the
norm's before it."""

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
from fused_resnet.kernels import problem as gemm
from fused_resnet.kernels import registry, target
from fused_resnet.kernels.cuda import implicit_gemm as cuda_conv
from fused_resnet.kernels.problem import Layer
from fused_resnet.kernels.training import choice
from fused_resnet.kernels.training import cuda as cuda_training
from fused_resnet.kernels.training import protocol as train_kernels

Seconds = Callable[[Callable[[], Any]], float] | None


def tiles_of(layer: Layer, like: Tensor) -> list[Any]:
    """The configurations of the CUDA kernels that take statistics of such a convolution."""
    kernels("conv_bn_relu", "native", like.device)
    module, problem = registry.gpu_convolution("native"), gemm.problem_of(layer, like.dtype)
    capability = target.capability(like.device)
    if layer.weight_shape[1] < 8 or not module.covers(problem, capability):
        raise Absent("it does not cover this convolution")
    return [c for c in module.candidates(problem, capability) if c.tile != module.STEM]


def fastest(
    layer: Layer, like: Tensor, seconds: Seconds, listed: list[Any], call: Callable[[Any], Call]
) -> Ready:
    """call(config) of the fastest configuration listed; of the one by heuristic, unmeasured."""

    def time_s(config: Any) -> float:
        try:
            call(config)()
            return min(seconds(call(config)) for _ in range(3)) if seconds else math.inf
        except Exception:  # not for this GPU
            return math.inf

    if seconds is None or like.device.type == "cpu":  # the emulator's times say nothing
        module, problem = registry.gpu_convolution("native"), gemm.problem_of(layer, like.dtype)
        capability, processors = target.capability(like.device), target.multiprocessors(like.device)
        reached = module.reaches(problem, layer.geometry)
        listed = [module.choose_tile(problem, capability, processors, reached)]
    best = listed[0] if len(listed) == 1 else min(listed, key=time_s)
    return Ready(call(best), best.label())


def own(like: Tensor) -> contextlib.AbstractContextManager[None]:
    """Within it the CUDA kernels serve: emulated ones on the CPU."""
    return fr.use_backend("emulated") if like.device.type == "cpu" else contextlib.nullcontext()


def conv_train_case(
    place: Place,
    times: int,
    like: Tensor,
    seconds: Seconds,
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
        maker = choice.portable()
        return Ready(lambda: by(maker, lambda: maker.convolve(x, weight, geometry)))

    def call(config: Any) -> Call:
        maker = cuda_training.CUDA

        def run() -> list[Tensor]:
            with own(like):
                return by(maker, lambda: maker.convolve_by(config, x, weight, geometry))

        return run

    def native() -> Ready:
        return fastest(layer, like, seconds, tiles_of(layer, like), call)

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
            for config in tiles_of(layer, like):
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


def prologue_case(
    place: Place, times: int, like: Tensor, seconds: Seconds, each_tile: bool
) -> Case:
    """A training norm and a ReLU, the 1x1 convolution behind them and its own norm, forward: norm
    and ReLU in the convolution's prologue ("native"), or written by a pass of their own and read by
    the same tile ("apart") or by cuDNN's convolution ("cudnn"), whose statistics are taken from its
    output. Predicted bytes, with K = 4 C as in ResNet-50, in C elements of a pixel: x 1, z written
    and read, residual and y 4 each: 17; apart 19, a being written and read; by cuDNN 23, z being
    read once more. So up to 11% where memory is the limit, and nothing or less where products
    are."""
    layer = place.layer
    K, C = layer.weight_shape[:2]
    x, residual = randn(layer.x_shape, like), randn(layer.y_shape, like)
    weight = randn(layer.weight_shape, like) / math.sqrt(C)
    before, after = (
        train_kernels.Norm(*(torch.rand(2, n, device=like.device) + 0.5).unbind(), EPS)
        for n in (C, K)
    )
    geometry = train_kernels.Geometry(*layer.geometry, layer.groups)
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    normed = train_kernels.Normed(x, before, (mean, var, torch.zeros_like(mean)))
    maker = cuda_training.CUDA

    def ending(convolve: Callable[[], Any]) -> Call:
        def run() -> list[Tensor]:
            with own(like):
                z, state = convolve()
                return [maker.normalise_by(state, z, after, residual, True)[0]]

        return run

    def native(config: Any) -> Call:
        return ending(lambda: maker.convolve_normed_by(config, normed, weight))

    def apart(config: Any) -> Call:
        return ending(
            lambda: maker.convolve_by(config, maker.apply(normed, None, True), weight, geometry)
        )

    def cudnn() -> Ready:
        kernels("bn_add_relu", "native", like.device)
        stock = choice.portable()
        return Ready(
            ending(lambda: stock.convolve(maker.apply(normed, None, True), weight, geometry))
        )

    def listed() -> list[Any]:
        return [c for c in tiles_of(layer, like) if cuda_conv.normalises(c)]

    def of_tiles(call: Callable[[Any], Call]) -> Callable[[], Ready]:
        return lambda: fastest(layer, like, seconds, listed(), call)

    def chain(x: Tensor, weight: Tensor, residual: Tensor, *norms: Any) -> Tensor:
        a = bn_chain(x, norms[0], norms[1], None, True)
        return bn_chain(F.conv2d(a, weight, None, *geometry), norms[2], norms[3], residual, True)

    vectors = (before.weight, before.bias, after.weight, after.bias)

    def eager() -> list[Tensor]:
        return [chain(x, weight, residual, *vectors)]

    def exact() -> list[Exact]:
        return [Exact("y", chain(*(t.double() for t in (x, weight, residual, *vectors))))]

    makers = {"native": of_tiles(native), "apart": of_tiles(apart), "cudnn": cudnn}
    if each_tile:
        with contextlib.suppress(Absent):
            for config in listed():
                ready = Ready(native(config), config.label())
                makers[f"native {config.label()}"] = lambda ready=ready: ready
    makers["unfused"] = lambda: Ready(eager)
    return Case(
        "norm_conv_train",
        f"norm_conv_train {title(layer)}",
        times,
        (x.numel() + weight.numel() + 4 * residual.numel()) * x.element_size(),
        2 * residual.numel() * C,
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
    seconds: Seconds,
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
    y, (mean, var) = choice.portable().normalise(x, norm, None, True)
    normed = train_kernels.Normed(x, norm, (mean, var, torch.zeros_like(mean)))

    def after(dh: Tensor) -> list[Tensor]:
        plain = normed._replace(state=(mean, var))
        return list(choice.portable().norm_gradients_by(None, dh, y, plain))

    def fused() -> Ready:
        maker = choice.portable()
        return Ready(lambda: after(maker.input_gradient(dy, y, weight, geometry)))

    def call(config: Any) -> Call:
        maker = cuda_training.CUDA

        def run() -> list[Tensor]:
            with own(like):
                made = maker.relu_gradient_by(config, dy, weight, geometry, normed)
                return list(maker.norm_gradients_by(made[1], made[0], y, normed))

        return run

    def call_apart(config: Any) -> Call:
        rows = cuda_training.turned_rows(weight, layer.groups, like.dtype)
        ones, zeros = torch.ones_like(mean), torch.zeros_like(mean)

        def run() -> list[Tensor]:
            dh = torch.empty_like(x)
            with own(like):
                cuda_conv.ops().implicit_gemm(
                    dy, rows, ones, zeros, None, dh, False, *gradient.geometry, layer.groups,
                    config.tile, config.splits,
                )  # fmt: skip
            return after(dh)

        return run

    def ready(call: Callable[[Any], Call]) -> Ready:
        return fastest(gradient, like, seconds, tiles_of(gradient, like), call)

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
