"""Cases of bench_gpu_ops.py: one for each op and layer of a network, and its contenders.

    fused      this package as models use it: the kernels that the registry and tuning choose
    native     its CUDA kernels, convolutions with the fastest tile ("native TILE": a given tile)
    apart      the same tile, with the prologue or epilogue of "native" as a separate pass
    triton     its Triton kernels
    cudnn      cuDNN with batch norm folded into weights and bias; in training cuDNN's convolution
               between passes of this package
    unfused    PyTorch's chain of cuDNN's convolution, batch norm, addition, ReLU; channels_last
    compile    torch.compile of that chain

Contenders are prepared when they are measured; an unavailable one raises `Absent` with the reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from gpu_contenders import (
    EPS,
    Absent,
    Case,
    Exact,
    Place,
    Prepared,
    bn_chain,
    compiled,
    inference,
    kernels,
    randn,
    title,
)
from gpu_train_cases import (
    conv_backward_case,
    conv_norm_backward_case,
    conv_train_case,
    prologue_case,
)
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.kernels import registry, tuning
from fused_resnet.kernels.activation import Activation
from fused_resnet.kernels.cuda import cudnn
from fused_resnet.kernels.cuda.convolution import GpuConv
from fused_resnet.kernels.problem import Problem, convolution
from fused_resnet.kernels.target import multiprocessors
from fused_resnet.kernels.training.cuda import gradient_layer

CHECKED_IMAGES = 32  # per convolution, evenly spaced: images are independent


def places(model: str, batch: int, size: int) -> Counter[Place]:
    """Every convolution of a ResNet of this package, in order, with its number of occurrences."""
    from fused_resnet.models.resnet import get_model

    convolutions: list[Place] = []
    with torch.device("meta"), torch.no_grad():
        net = get_model(model).eval()
        for block in net.modules():
            if type(block) is nn.Sequential:
                continue
            inside = [m for m in block.children() if isinstance(m, nn.Conv2d)]
            shortcut = getattr(block, "downsample", None)
            for conv in [*inside, *(shortcut[:1] if shortcut is not None else ())]:

                def hook(
                    conv: Any,
                    inputs: Any,
                    output: Tensor,
                    ends: bool = block is not net and conv is inside[-1],
                    relu: bool = conv in inside,
                    later: bool = block is not net and conv in inside[1:],
                ) -> None:
                    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
                    layer = convolution(conv.weight.shape, None, *geometry)
                    layer = layer._replace(x_shape=tuple(inputs[0].shape))
                    convolutions.append(Place(layer, ends, relu, later))

                conv.register_forward_hook(hook)
        net(torch.empty(batch, 3, size, size))
    return Counter(convolutions)


# --- elementwise ----------------------------------------------------------------------------------


def add_relu_case(shape: tuple[int, ...], times: int, like: Tensor, backward: bool) -> Case:
    x, residual, dy = (randn(shape, like) for _ in range(3))
    inputs = [t.detach().requires_grad_() for t in (x, residual)]

    def stock(add: Callable[..., Tensor], x: Tensor, residual: Tensor, dy: Tensor) -> list[Tensor]:
        if not backward:
            return [add(x, residual)]
        y = add(x, residual)
        return [y.detach(), torch.autograd.grad(y, x, dy)[0]]

    def chain(x: Tensor, residual: Tensor) -> Tensor:
        return torch.relu(x + residual)

    def by(backend: str) -> Prepared:
        provider = kernels("add_relu", backend, like.device)

        def call() -> list[Tensor]:
            y = provider.add_relu(x, residual)
            return [y, provider.add_relu_backward(dy, y)] if backward else [y]

        return Prepared(call)

    def by_compiler() -> Prepared:
        run = compiled(chain)
        return Prepared(lambda: stock(run, *operands))

    def chosen() -> list[Tensor]:
        y = fr.add_relu(x, residual)
        return [y, torch.ops.fused_resnet.add_relu_backward(dy, y)] if backward else [y]

    def exact() -> list[Exact]:
        sums = x.double() + residual.double()
        results = [Exact("y", sums.relu())]
        return [*results, Exact("dx", dy.double() * (sums > 0))] if backward else results

    operands = (*inputs, dy) if backward else (x, residual, dy)
    return Case(
        "add_relu" + (" with backward" if backward else ""),
        f"add_relu {shape}" + (", and backward" if backward else ""),
        times,
        (6 if backward else 3) * x.numel() * x.element_size(),
        0,
        lambda: stock(chain, *operands),
        exact,
        {
            "fused": lambda: Prepared(chosen),
            "native": lambda: by("native"),
            "triton": lambda: by("triton"),
            "unfused": lambda: Prepared(lambda: stock(chain, *operands)),
            "compile": by_compiler,
        },
    )


def bn_case(
    shape: tuple[int, ...], has_residual: bool, relu: bool, times: int, like: Tensor, backward: bool
) -> Case:
    x, dy = randn(shape, like), randn(shape, like)
    residual = randn(shape, like) if has_residual else None
    weight, bias = (torch.rand(2, shape[1], device=like.device) + 0.5).unbind()
    plain = (x, weight, bias, residual)
    if backward and relu:  # no gradient where rounding decides the sign of the ReLU's input
        sums = bn_chain(*(None if t is None else t.double() for t in plain), False)
        margin = max(sums.abs().max().item(), 1.0) * torch.finfo(like.dtype).eps * 8
        dy = torch.where(sums.abs() < margin, torch.zeros_like(dy), dy)

    def with_autograd(run: Callable[..., Tensor], operands: Any, dy: Tensor) -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [run(*operands, relu)]
        inputs = [None if t is None else t.detach().requires_grad_() for t in operands]
        y = run(*inputs, relu)
        gradients = torch.autograd.grad(y, [t for t in inputs if t is not None], dy)
        return [y.detach(), *gradients]

    def run_with(provider: Any) -> list[Tensor]:
        y, mean, var = provider.bn_add_relu(x, weight, bias, residual, EPS, relu)
        if not backward:
            return [y]
        masked = has_residual and relu  # without a ReLU the residual's gradient is dy
        saved = (weight, mean, var, EPS, relu, True, masked)
        dx, dweight, dbias, dresidual = provider.bn_add_relu_backward(
            dy, x, y if relu else None, *saved
        )
        last = [dresidual if masked else dy] if has_residual else []
        return [y, dx, dweight, dbias, *last]

    def by_kernels(backend: str) -> Prepared:
        provider = kernels("bn_add_relu", backend, like.device)
        return Prepared(lambda: run_with(provider))

    def by_compiler() -> Prepared:
        run = compiled(bn_chain)
        return Prepared(lambda: with_autograd(run, plain, dy))

    def exact() -> list[Exact]:
        doubles = [None if t is None else t.double() for t in plain]
        values = with_autograd(bn_chain, doubles, dy.double())
        if not backward:
            return [Exact("y", values[0])]
        g = (dy * (values[0] > 0) if relu else dy).double().abs()
        var, mean = torch.var_mean(doubles[0], (0, 2, 3), correction=0, keepdim=True)
        normal = (doubles[0] - mean) / (var + EPS).sqrt()
        terms = [0.0, 0.0, (g * normal.abs()).sum((0, 2, 3)).max().item()]
        terms += [g.sum((0, 2, 3)).max().item(), 0.0]
        names = ("y", "dx", "dweight", "dbias", "dresidual")
        return [Exact(*each) for each in zip(names, values, terms, strict=False)]

    # Forward: x for the statistics; x, residual and y. Backward: dy, x and y; the same again and
    # dx; with a residual, the second pass reads dresidual instead of dy and y.
    tensors = 3 + has_residual
    if backward:
        tensors += 7 if relu else 5
    return Case(
        "bn_add_relu" + (" with backward" if backward else ""),
        f"bn_add_relu {shape}"
        + (", residual" if has_residual else "")
        + ("" if relu else ", no relu")
        + (", and backward" if backward else ""),
        times,
        tensors * x.numel() * x.element_size(),
        0,
        lambda: with_autograd(bn_chain, plain, dy),
        exact,
        {
            "fused": lambda: Prepared(lambda: run_with(torch.ops.fused_resnet)),
            "native": lambda: by_kernels("native"),
            "triton": lambda: by_kernels("triton"),
            "unfused": lambda: Prepared(lambda: with_autograd(bn_chain, plain, dy)),
            "compile": by_compiler,
        },
    )


# --- convolutions ---------------------------------------------------------------------------------


def evenly(batch: int, device: torch.device) -> Tensor:
    """Indices of evenly spaced images, including the first and the last."""
    count = min(batch, CHECKED_IMAGES)
    return torch.linspace(0, batch - 1, count, device=device).long().unique()


def conv_case(
    place: Place,
    times: int,
    like: Tensor,
    seconds: Callable[[Callable[[], Any]], float] | None,
    each_tile: bool,
) -> Case:
    """seconds: times a call, to find the fastest tile; None: use the heuristic's tile."""
    layer, relu = place.layer, place.relu
    K, C, R, S = layer.weight_shape
    x = randn(layer.x_shape, like)
    weight = randn(layer.weight_shape, like) / math.sqrt(C * R * S)
    residual = randn(layer.y_shape, like) if place.residual else None
    gamma, beta, mean, var = torch.rand(4, K, device=like.device).add_(0.5).unbind()
    scale = gamma / torch.sqrt(var + EPS)
    shift = beta - mean * scale
    geometry, device = layer.geometry, like.device
    problem = layer._replace(dtype=like.dtype, activation=Activation(relu))
    native_on_cpu = device.type == "cpu" and "emulated" in registry.names()

    def chain(x: Tensor, residual: Tensor | None) -> Tensor:
        y = F.batch_norm(F.conv2d(x, weight, None, *geometry), mean, var, gamma, beta, eps=EPS)
        y = y if residual is None else y + residual
        return torch.relu(y) if relu else y

    def eager() -> list[Tensor]:
        y = F.batch_norm(F.conv2d(x, weight, None, *geometry), mean, var, gamma, beta, eps=EPS)
        y = y if residual is None else y.add_(residual)
        return [y.relu_() if relu else y]

    conv, activation = GpuConv(problem, weight, scale, shift), Activation(relu)
    conv.is_cached = True

    def run_config(backend: str, config: Any) -> Prepared:
        def call() -> list[Tensor]:
            return [conv.run_by(backend, config, x, residual, activation)]

        def emulated() -> list[Tensor]:
            with fr.use_backend("emulated"):
                return call()

        on_host = backend == "native" and native_on_cpu
        return Prepared(emulated if on_host else call, config.label())

    def chosen() -> Prepared:
        if device.type == "cpu":
            arguments = (x, weight, scale, shift, residual, relu, *geometry)
            return Prepared(lambda: [fr.conv_bn_relu(*arguments)])
        choice = conv.choice(x, activation)
        if choice.backend == "reference":
            raise Absent("no kernel supports this convolution")
        how = f"{choice.backend} {choice.config.label()}"
        return Prepared(lambda: [conv.run(x, residual, activation)], how)

    def candidates(backend: str) -> list[Any]:
        kernels("conv_bn_relu", backend, device)
        provider = registry.gpu_provider(backend, device.type)
        reason = provider.supports(problem, provider.target(device))
        if reason is not None:
            raise Absent(reason)
        return provider.gpu_convolution().candidates(problem.gemm(), provider.target(device))

    def measured(backend: str) -> Any:
        best = tuning.winners(device).get(problem.gemm(), {}).get(backend)
        return None if best is None else best.config

    def unmeasured(backend: str) -> Any:
        provider = registry.gpu_provider(backend, device.type)
        choose = provider.gpu_convolution().choose
        return choose(problem.gemm(), provider.target(device), multiprocessors(device))

    def native() -> Prepared:
        configs = candidates("native")
        known = measured("native")
        if known is not None:
            return run_config("native", known)
        if seconds is None or device.type == "cpu":  # times of the emulator are meaningless
            return run_config("native", unmeasured("native"))

        def time_s(config: Any) -> float:
            call = run_config("native", config).call
            try:
                call()
                return min(seconds(call) for _ in range(3))
            except Exception:  # unsupported on this GPU
                return math.inf

        return run_config("native", min(configs, key=time_s))

    def triton() -> Prepared:
        candidates("triton")
        return run_config("triton", measured("triton") or unmeasured("triton"))

    def by_cudnn() -> Prepared:
        reason = registry.missing(problem, "vendor", "cuda")
        if reason is not None:
            raise Absent(reason)
        folded = (weight.float() * scale.view(-1, 1, 1, 1)).to(like.dtype)
        folded = folded.contiguous(memory_format=torch.channels_last)
        bias = shift.to(like.dtype)
        return Prepared(lambda: [cudnn._fused(x, folded, bias, residual, *geometry)])

    def by_compiler() -> Prepared:
        run = compiled(chain)
        return Prepared(lambda: [run(x, residual)])

    images = evenly(layer.x_shape[0], device)

    def exact() -> list[Exact]:
        y = F.conv2d(x[images].double(), weight.double(), None, *geometry)
        y = y * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
        y = y if residual is None else y + residual[images].double()
        return [Exact("y", y.relu() if relu else y)]

    contenders: dict[str, Callable[[], Prepared]] = {"fused": chosen, "native": native}
    if each_tile:
        try:
            configs = [c for c in candidates("native") if c.splits == 1]
        except Absent:
            configs = []
        for config in configs:
            contenders[f"native {config.label()}"] = lambda config=config: run_config(
                "native", config
            )
    contenders |= {
        "triton": triton,
        "cudnn": by_cudnn,
        "unfused": lambda: Prepared(eager),
        "compile": by_compiler,
    }
    y_size = math.prod(layer.y_shape)
    elements = x.numel() + weight.numel() + y_size * (1 + place.residual)
    return Case(
        "conv_bn_relu",
        f"conv_bn_relu {title(layer)}"
        + (", residual" if place.residual else "")
        + ("" if relu else ", no relu"),
        times,
        elements * x.element_size(),
        2 * y_size * C * R * S,
        eager,
        exact,
        {name: inference(prepare) for name, prepare in contenders.items()},
        images,
    )


def cases(
    model: str,
    batch: int,
    size: int,
    like: Tensor,
    seconds: Callable[[Callable[[], Any]], float] | None,
    each_tile: bool,
    selected: Callable[[str], bool],
) -> Iterator[Callable[[], Case]]:
    """Builders of the cases of the selected ops; convolutions first, they take most of the time."""
    convolutions = places(model, batch, size)
    if selected("conv_bn_relu"):
        for place, times in convolutions.items():
            yield lambda p=place, n=times: conv_case(p, n, like, seconds, each_tile)
    if selected("conv_bn_train"):
        for place, times in convolutions.items():
            yield lambda p=place, n=times: conv_train_case(p, n, like, seconds, each_tile)
    if selected("norm_conv_train"):
        for place, times in convolutions.items():
            layer = place.layer
            if place.residual and layer.weight_shape[2:] == (1, 1) and layer.geometry.groups == 1:
                yield lambda p=place, n=times: prologue_case(p, n, like, seconds, each_tile)
    norms: Counter[Any] = Counter()
    for place, times in convolutions.items():
        norms[place.layer.y_shape, place.residual, place.relu] += times
    for backward in (False, True):
        if selected("bn_add_relu"):
            for key, times in norms.items():
                yield lambda k=key, n=times, b=backward: bn_case(*k, n, like, b)
        if selected("add_relu"):
            for (shape, ends, _), times in norms.items():
                if ends:
                    yield lambda s=shape, n=times, b=backward: add_relu_case(s, n, like, b)
    if selected("conv_backward"):
        layers: Counter[Problem] = Counter()
        for place, times in convolutions.items():
            layers[place.layer] += times
        for layer, times in layers.items():
            yield lambda x=layer, n=times: conv_backward_case(x, n, like)
    if selected("conv_norm_backward"):
        inside: Counter[Problem] = Counter()
        for place, times in convolutions.items():
            if place.inside and gradient_layer(place.layer) is not None:
                inside[place.layer] += times
        for layer, times in inside.items():
            yield lambda x=layer, n=times: conv_norm_backward_case(x, n, like, seconds)
