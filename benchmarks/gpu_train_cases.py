"""The cases of gpu_cases.py that are of training alone: a convolution with the statistics of the
norm behind it, and a convolution's gradients."""

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
from fused_resnet import cuda_training, gemm, train_kernels, tuning
from fused_resnet.gemm import Layer


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
    problem = gemm.problem_of(layer, like.dtype)

    def by(maker: Any, convolve: Callable[[], Any]) -> list[Tensor]:
        z, state = convolve()
        return [maker.normalise_by(state, z, norm, residual, relu)[0]]

    def fused() -> Ready:
        maker = train_kernels.PORTABLE
        return Ready(lambda: by(maker, lambda: maker.convolve(x, weight, geometry)))

    module, capability = tuning.contender("native"), gemm.capability(like.device)

    def candidates() -> list[Any]:
        kernels("conv_bn_relu", "native", like.device)
        if layer.weight_shape[1] < 8 or not module.covers(problem, capability):
            raise Absent("it does not cover this convolution")
        return [c for c in module.candidates(problem, capability) if c.tile != module.STEM]

    def call(config: Any) -> Call:
        maker = cuda_training.CUDA

        def run() -> list[Tensor]:
            emulated = like.device.type == "cpu"
            with fr.use_backend("emulated") if emulated else contextlib.nullcontext():
                return by(maker, lambda: maker.convolve_by(config, x, weight, geometry))

        return run

    def native() -> Ready:
        def time_s(config: Any) -> float:
            try:
                call(config)()
                return min(seconds(call(config)) for _ in range(3)) if seconds else math.inf
            except Exception:  # not for this GPU
                return math.inf

        listed = candidates()
        if seconds is None or like.device.type == "cpu":  # the emulator's times say nothing
            processors = gemm.multiprocessors(like.device)
            reached = module.reaches(problem, layer.geometry)
            listed = [module.choose_tile(problem, capability, processors, reached)]
        best = listed[0] if len(listed) == 1 else min(listed, key=time_s)
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
            for config in candidates():
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
