"""Training cases of bench_gpu_ops.py: a convolution with the statistics of the following norm, the
same with the preceding norm, the gradients of a convolution, and the input gradient with the
gradients of the preceding norm."""

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
    Prepared,
    bn_chain,
    inference,
    kernels,
    randn,
    title,
)
from torch import Tensor

import fused_resnet as fr
from fused_resnet.kernels.cuda import implicit_gemm
from fused_resnet.kernels.problem import Problem
from fused_resnet.kernels.target import multiprocessors
from fused_resnet.kernels.training import choice, cuda
from fused_resnet.kernels.training.protocol import Norm, Normed

Seconds = Callable[[Callable[[], Any]], float] | None


def tiles_of(layer: Problem, like: Tensor) -> list[Any]:
    """The configurations of the CUDA kernels that support fused statistics for this layer."""
    kernels("conv_bn_relu", "native", like.device)
    problem = layer._replace(dtype=like.dtype)
    target = implicit_gemm.target(like.device)
    reason = implicit_gemm.supports(problem, target)
    if layer.weight_shape[1] < 8 or reason is not None:
        raise Absent(reason or "it does not support this convolution")
    configs = implicit_gemm.candidates(problem.gemm(), target)
    return [c for c in configs if c.tile != implicit_gemm.STEM]


def fastest(
    layer: Problem, like: Tensor, seconds: Seconds, configs: list[Any], call: Callable[[Any], Call]
) -> Prepared:
    """call(config) of the fastest of `configs`, or of the heuristic's choice without a timer."""

    def time_s(config: Any) -> float:
        try:
            call(config)()
            return min(seconds(call(config)) for _ in range(3)) if seconds else math.inf
        except Exception:  # unsupported on this GPU
            return math.inf

    if seconds is None or like.device.type == "cpu":  # times of the emulator are meaningless
        problem, target = layer._replace(dtype=like.dtype), implicit_gemm.target(like.device)
        configs = [implicit_gemm.choose_tile(problem, target, multiprocessors(like.device))]
    best = configs[0] if len(configs) == 1 else min(configs, key=time_s)
    return Prepared(call(best), best.label())


def cuda_kernels(like: Tensor) -> contextlib.AbstractContextManager[None]:
    """Context in which the CUDA kernels are used; on the CPU, the emulated ones."""
    return fr.use_backend("emulated") if like.device.type == "cpu" else contextlib.nullcontext()


def conv_train_case(
    place: Place,
    times: int,
    like: Tensor,
    seconds: Seconds,
    each_tile: bool,
) -> Case:
    """Forward of a convolution and its training norm: statistics computed in the epilogue of the
    convolution ("native"), or from its output by bn_add_relu ("fused", as in models if no winner
    was measured)."""
    layer, relu = place.layer, place.relu
    K, C, R, S = layer.weight_shape
    x = randn(layer.x_shape, like)
    weight = randn(layer.weight_shape, like) / math.sqrt(C * R * S)
    residual = randn(layer.y_shape, like) if place.residual else None
    norm = Norm(*(torch.rand(2, K, device=like.device) + 0.5).unbind(), EPS)
    geometry = layer.geometry

    def run_with(passes: Any, convolve: Callable[[], Any]) -> list[Tensor]:
        z, state = convolve()
        return [passes.normalise_with(state, z, norm, residual, relu)[0]]

    def fused() -> Prepared:
        passes = choice.portable()
        return Prepared(lambda: run_with(passes, lambda: passes.convolve(x, weight, geometry)))

    def call(config: Any) -> Call:
        passes = cuda.CUDA

        def run() -> list[Tensor]:
            with cuda_kernels(like):
                return run_with(
                    passes, lambda: passes.convolve_with_config(config, x, weight, geometry)
                )

        return run

    def native() -> Prepared:
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

    contenders: dict[str, Callable[[], Prepared]] = {"fused": fused, "native": native}
    if each_tile:
        with contextlib.suppress(Absent):
            for config in tiles_of(layer, like):
                if config.splits == 1:
                    prepared = Prepared(call(config), config.label())
                    contenders[f"native {config.label()}"] = lambda prepared=prepared: prepared
    contenders["unfused"] = lambda: Prepared(eager)
    y_size = math.prod(layer.y_shape)
    return Case(
        "conv_bn_train",
        f"conv_bn_train {title(layer)}"
        + (", residual" if place.residual else "")
        + ("" if relu else ", no relu"),
        times,
        # z is written, and read once by the normalization.
        (x.numel() + weight.numel() + y_size * (3 + place.residual)) * x.element_size(),
        2 * y_size * C * R * S,
        torch.no_grad()(eager),
        torch.no_grad()(exact),
        {name: inference(prepare) for name, prepare in contenders.items()},
    )


def prologue_case(
    place: Place, times: int, like: Tensor, seconds: Seconds, each_tile: bool
) -> Case:
    """Forward of a training norm with ReLU, the following 1x1 convolution and its norm. Norm and
    ReLU run in the prologue of the convolution ("native"), or in a separate pass whose output a is
    read by the same tile ("apart") or by cuDNN's convolution ("cudnn"), with statistics computed
    from its output. Predicted bytes, with K = 4 C as in ResNet-50, in units of C elements per
    pixel: x 1, z written and read, residual and y 4 each: 17; apart 19, as a is written and read;
    cuDNN 23, as z is read again. So up to 11% if memory is the limit, nothing or a loss if compute
    is."""
    layer = place.layer
    K, C = layer.weight_shape[:2]
    x, residual = randn(layer.x_shape, like), randn(layer.y_shape, like)
    weight = randn(layer.weight_shape, like) / math.sqrt(C)
    before, after = (
        Norm(*(torch.rand(2, n, device=like.device) + 0.5).unbind(), EPS) for n in (C, K)
    )
    geometry = layer.geometry
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    normed = Normed(x, before, (mean, var, torch.zeros_like(mean)))
    passes = cuda.CUDA

    def with_norm(convolve: Callable[[], Any]) -> Call:
        def run() -> list[Tensor]:
            with cuda_kernels(like):
                z, state = convolve()
                return [passes.normalise_with(state, z, after, residual, True)[0]]

        return run

    def native(config: Any) -> Call:
        return with_norm(lambda: passes.convolve_normed_with_config(config, normed, weight))

    def apart(config: Any) -> Call:
        return with_norm(
            lambda: passes.convolve_with_config(
                config, passes.apply(normed, None, True), weight, geometry
            )
        )

    def cudnn() -> Prepared:
        kernels("bn_add_relu", "native", like.device)
        portable = choice.portable()
        return Prepared(
            with_norm(lambda: portable.convolve(passes.apply(normed, None, True), weight, geometry))
        )

    def prologue_tiles() -> list[Any]:
        return [c for c in tiles_of(layer, like) if implicit_gemm.normalises(c)]

    def fastest_of(call: Callable[[Any], Call]) -> Callable[[], Prepared]:
        return lambda: fastest(layer, like, seconds, prologue_tiles(), call)

    def chain(x: Tensor, weight: Tensor, residual: Tensor, *norms: Any) -> Tensor:
        a = bn_chain(x, norms[0], norms[1], None, True)
        return bn_chain(F.conv2d(a, weight, None, *geometry), norms[2], norms[3], residual, True)

    vectors = (before.weight, before.bias, after.weight, after.bias)

    def eager() -> list[Tensor]:
        return [chain(x, weight, residual, *vectors)]

    def exact() -> list[Exact]:
        return [Exact("y", chain(*(t.double() for t in (x, weight, residual, *vectors))))]

    contenders = {"native": fastest_of(native), "apart": fastest_of(apart), "cudnn": cudnn}
    if each_tile:
        with contextlib.suppress(Absent):
            for config in prologue_tiles():
                prepared = Prepared(native(config), config.label())
                contenders[f"native {config.label()}"] = lambda prepared=prepared: prepared
    contenders["unfused"] = lambda: Prepared(eager)
    return Case(
        "norm_conv_train",
        f"norm_conv_train {title(layer)}",
        times,
        (x.numel() + weight.numel() + 4 * residual.numel()) * x.element_size(),
        2 * residual.numel() * C,
        torch.no_grad()(eager),
        torch.no_grad()(exact),
        {name: inference(prepare) for name, prepare in contenders.items()},
    )


def conv_backward_case(layer: Problem, times: int, like: Tensor) -> Case:
    """Both gradients of a convolution: this package's Triton kernels, and cuDNN's."""
    _, C, R, S = layer.weight_shape
    x, g = randn(layer.x_shape, like), randn(layer.y_shape, like)
    weight = randn(layer.weight_shape, like) / math.sqrt(C * R * S)
    geometry, mask = layer.geometry, [True, True, False]

    def stock(g: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
        *sizes, groups = geometry
        backward = torch.ops.aten.convolution_backward
        gradients = backward(g, x, weight, None, *sizes, False, [0, 0], groups, mask)
        return list(gradients[:2])

    def triton() -> Prepared:
        kernels("conv_bn_relu", "triton", like.device)
        run = torch.ops.fused_resnet.convolution_backward_triton
        return Prepared(lambda: list(run(g, x, weight, *geometry, mask)))

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
        {"triton": triton, "unfused": lambda: Prepared(lambda: stock(g, x, weight))},
    )


def conv_norm_backward_case(
    layer: Problem,
    times: int,
    like: Tensor,
    seconds: Seconds,
) -> Case:
    """From the output gradient of a convolution to the gradients of the norm whose ReLU it reads:
    mask and sums computed in the epilogue of the input gradient ("native"), or by the backward of
    bn_add_relu after the same tile ("apart") or cuDNN ("fused", as in models if no winner was
    measured)."""
    K, C, R, S = layer.weight_shape
    x, dy = randn(layer.x_shape, like), randn(layer.y_shape, like)
    weight = randn(layer.weight_shape, like) / math.sqrt(K * R * S / layer.geometry.groups)
    norm = Norm(*torch.rand(2, x.shape[1], device=like.device).unbind(), EPS)
    geometry = layer.geometry
    gradient = cuda.gradient_layer(layer)
    assert gradient is not None
    y, (mean, var) = choice.portable().normalise(x, norm, None, True)
    normed = Normed(x, norm, (mean, var, torch.zeros_like(mean)))

    def norm_backward(dh: Tensor) -> list[Tensor]:
        plain = normed._replace(state=(mean, var))
        return list(choice.portable().norm_gradients_from_sums(None, dh, y, plain))

    def fused() -> Prepared:
        passes = choice.portable()
        return Prepared(lambda: norm_backward(passes.input_gradient(dy, y, weight, geometry)))

    def call(config: Any) -> Call:
        passes = cuda.CUDA

        def run() -> list[Tensor]:
            with cuda_kernels(like):
                dh, sums = passes.relu_gradient_with_config(config, dy, weight, geometry, normed)
                return list(passes.norm_gradients_from_sums(sums, dh, y, normed))

        return run

    def call_apart(config: Any) -> Call:
        rows = cuda.turned_rows(weight, geometry.groups, like.dtype)
        ones, zeros = torch.ones_like(mean), torch.zeros_like(mean)

        def run() -> list[Tensor]:
            dh = torch.empty_like(x)
            with cuda_kernels(like):
                implicit_gemm.ops(dy).implicit_gemm(
                    dy, rows, ones, zeros, None, dh, False, *gradient.geometry,
                    config.tile, config.splits,
                )  # fmt: skip
            return norm_backward(dh)

        return run

    def fastest_call(call: Callable[[Any], Call]) -> Prepared:
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
        terms = x[:, 0].numel() * 0.5  # gradients of about 1, half of them masked
        return [Exact("dx", dx), Exact("dweight", dweight, terms), Exact("dbias", dbias, terms)]

    contenders: dict[str, Callable[[], Prepared]] = {
        "fused": fused,
        "native": lambda: fastest_call(call),
        "apart": lambda: fastest_call(call_apart),
        "unfused": lambda: Prepared(lambda: chain(dy, x, y, weight, norm.weight, mean, var)),
    }
    return Case(
        "conv_norm_backward",
        f"conv_norm_backward {title(layer)}",
        times,
        # g is written, then read with x to compute dx.
        (dy.numel() + weight.numel() + 5 * x.numel()) * x.element_size(),
        2 * dy.numel() * C * R * S,
        torch.no_grad()(lambda: chain(dy, x, y, weight, norm.weight, mean, var)),
        torch.no_grad()(exact),
        {name: inference(prepare) for name, prepare in contenders.items()},
    )
