"""What bench_gpu_ops.py measures: a case for each op and layer of a network, and its contenders.

    fused      this package as a model runs it: whatever `backends` and `tuning` choose
    native     its CUDA kernels, a convolution with its fastest tile ("native TILE": each by itself)
    apart      the same tile, with what "native" has in its prologue as a pass of its own
    triton     its Triton kernels
    cudnn      what cuDNN fuses: batch norm folded into weights and bias; in training its
               convolution, between passes of this package
    unfused    PyTorch's own chain of cuDNN's convolution, batch norm, addition, ReLU; channels_last
    compile    torch.compile of that chain

Each is made when its turn comes; one that is not there raises `Absent` with the reason.
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
    Ready,
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
from fused_resnet.kernels import problem as gemm
from fused_resnet.kernels import registry, target, tuning
from fused_resnet.kernels.cuda import cudnn as cudnn_conv
from fused_resnet.kernels.cuda.convolution import GpuConv
from fused_resnet.kernels.problem import Geometry, Layer
from fused_resnet.kernels.training.cuda import gradient_layer

CHECKED_IMAGES = 32  # of a convolution, from the first to the last: each is computed by itself


def places(model: str, batch: int, size: int) -> Counter[Place]:
    """Every convolution of a model of the family, in order, and how often it comes."""
    from fused_resnet.models.resnet import get_model

    found: list[Place] = []
    with torch.device("meta"), torch.no_grad():
        net = get_model(model).eval()
        for block in net.modules():
            if type(block) is nn.Sequential:
                continue
            inside = [m for m in block.children() if isinstance(m, nn.Conv2d)]
            shortcut = getattr(block, "downsample", None)
            for conv in [*inside, *(shortcut[:1] if shortcut is not None else ())]:

                def see(
                    conv: Any,
                    inputs: Any,
                    output: Tensor,
                    ends: bool = block is not net and conv is inside[-1],
                    relu: bool = conv in inside,
                    later: bool = block is not net and conv in inside[1:],
                ) -> None:
                    geometry = Geometry(conv.stride, conv.padding, conv.dilation)
                    shapes = (inputs[0].shape, conv.weight.shape, output.shape)
                    layer = Layer(*map(tuple, shapes), geometry, conv.groups)
                    found.append(Place(layer, ends, relu, later))

                conv.register_forward_hook(see)
        net(torch.empty(batch, 3, size, size))
    return Counter(found)


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

    def by(backend: str) -> Ready:
        found = kernels("add_relu", backend, like.device)

        def call() -> list[Tensor]:
            y = found.add_relu(x, residual)
            return [y, found.add_relu_backward(dy, y)] if backward else [y]

        return Ready(call)

    def by_compiler() -> Ready:
        run = compiled(chain)
        return Ready(lambda: stock(run, *operands))

    def chosen() -> list[Tensor]:
        y = fr.add_relu(x, residual)
        return [y, torch.ops.fused_resnet.add_relu_backward(dy, y)] if backward else [y]

    def exact() -> list[Exact]:
        sums = x.double() + residual.double()
        found = [Exact("y", sums.relu())]
        return [*found, Exact("dx", dy.double() * (sums > 0))] if backward else found

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
            "fused": lambda: Ready(chosen),
            "native": lambda: by("native"),
            "triton": lambda: by("triton"),
            "unfused": lambda: Ready(lambda: stock(chain, *operands)),
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
    if backward and relu:  # no gradient where the ReLU's sign hangs on a rounding
        sums = bn_chain(*(None if t is None else t.double() for t in plain), False)
        margin = max(sums.abs().max().item(), 1.0) * torch.finfo(like.dtype).eps * 8
        dy = torch.where(sums.abs() < margin, torch.zeros_like(dy), dy)

    def with_autograd(run: Callable[..., Tensor], operands: Any, dy: Tensor) -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [run(*operands, relu)]
        inputs = [None if t is None else t.detach().requires_grad_() for t in operands]
        y = run(*inputs, relu)
        found = torch.autograd.grad(y, [t for t in inputs if t is not None], dy)
        return [y.detach(), *found]

    def by(found: Any) -> list[Tensor]:
        y, mean, var = found.bn_add_relu(x, weight, bias, residual, EPS, relu)
        if not backward:
            return [y]
        masked = has_residual and relu  # without a ReLU the residual's gradient is dy
        saved = (weight, mean, var, EPS, relu, True, masked)
        dx, dweight, dbias, dresidual = found.bn_add_relu_backward(
            dy, x, y if relu else None, *saved
        )
        last = [dresidual if masked else dy] if has_residual else []
        return [y, dx, dweight, dbias, *last]

    def by_kernels(backend: str) -> Ready:
        found = kernels("bn_add_relu", backend, like.device)
        return Ready(lambda: by(found))

    def by_compiler() -> Ready:
        run = compiled(bn_chain)
        return Ready(lambda: with_autograd(run, plain, dy))

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

    # Statistics, then x, residual and y. Backward: dy, x and y, and again with dx; where there is a
    # residual, the second pass reads its gradient in the place of dy and y.
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
            "fused": lambda: Ready(lambda: by(torch.ops.fused_resnet)),
            "native": lambda: by_kernels("native"),
            "triton": lambda: by_kernels("triton"),
            "unfused": lambda: Ready(lambda: with_autograd(bn_chain, plain, dy)),
            "compile": by_compiler,
        },
    )


# --- convolutions ---------------------------------------------------------------------------------


def evenly(batch: int, device: torch.device) -> Tensor:
    """Numbers of some images, the first and the last among them."""
    count = min(batch, CHECKED_IMAGES)
    return torch.linspace(0, batch - 1, count, device=device).long().unique()


def conv_case(
    place: Place,
    times: int,
    like: Tensor,
    seconds: Callable[[Callable[[], Any]], float] | None,
    each_tile: bool,
) -> Case:
    """seconds: a clock, for finding the fastest tile; None: the one that is chosen unmeasured."""
    layer, relu = place.layer, place.relu
    K, C, R, S = layer.weight_shape
    x = randn(layer.x_shape, like)
    weight = randn(layer.weight_shape, like) / math.sqrt(C * R * S)
    residual = randn(layer.y_shape, like) if place.residual else None
    gamma, beta, mean, var = torch.rand(4, K, device=like.device).add_(0.5).unbind()
    scale = gamma / torch.sqrt(var + EPS)
    shift = beta - mean * scale
    geometry = (*layer.geometry, layer.groups)
    where, problem = like.device, gemm.problem_of(layer, like.dtype)
    native_on_cpu = where.type == "cpu" and "emulated" in registry.names()

    def chain(x: Tensor, residual: Tensor | None) -> Tensor:
        y = F.batch_norm(F.conv2d(x, weight, None, *geometry), mean, var, gamma, beta, eps=EPS)
        y = y if residual is None else y + residual
        return torch.relu(y) if relu else y

    def eager() -> list[Tensor]:
        y = F.batch_norm(F.conv2d(x, weight, None, *geometry), mean, var, gamma, beta, eps=EPS)
        y = y if residual is None else y.add_(residual)
        return [y.relu_() if relu else y]

    conv = GpuConv(weight, scale, shift, like.dtype, *geometry)
    conv.lasting = True

    def run_by(backend: str, config: Any) -> Ready:
        def call() -> list[Tensor]:
            return [conv.run_by(backend, config, x, residual, relu)]

        def emulated() -> list[Tensor]:
            with fr.use_backend("emulated"):
                return call()

        on_host = backend == "native" and native_on_cpu
        return Ready(emulated if on_host else call, config.label())

    def chosen() -> Ready:
        if where.type == "cpu":
            arguments = (x, weight, scale, shift, residual, relu, *geometry)
            return Ready(lambda: [fr.conv_bn_relu(*arguments)])
        found = conv.choice(x, relu)
        if found is None:
            raise Absent("no kernel covers it")
        how = f"{found.backend} {found.config.label()}"
        return Ready(lambda: [conv.run(x, residual, relu)], how)

    def candidates(backend: str) -> list[Any]:
        kernels("conv_bn_relu", backend, where)
        module = registry.gpu_convolution(backend)
        if not module.covers(problem, target.capability(where)):
            raise Absent("it does not cover this convolution")
        return module.candidates(problem, target.capability(where))

    def measured(backend: str) -> Any:
        best = tuning.winners(where).get(problem, {}).get(backend)
        return None if best is None else best.config

    def unmeasured(backend: str) -> Any:
        processors = target.multiprocessors(where)
        return registry.gpu_convolution(backend).choose(
            problem, target.capability(where), processors
        )

    def native() -> Ready:
        listed = candidates("native")
        known = measured("native")
        if known is not None:
            return run_by("native", known)
        if seconds is None or where.type == "cpu":  # the emulator's times say nothing
            return run_by("native", unmeasured("native"))

        def time_s(config: Any) -> float:
            call = run_by("native", config).call
            try:
                call()
                return min(seconds(call) for _ in range(3))
            except Exception:  # not for this GPU
                return math.inf

        return run_by("native", min(listed, key=time_s))

    def triton() -> Ready:
        candidates("triton")
        return run_by("triton", measured("triton") or unmeasured("triton"))

    def cudnn() -> Ready:
        reason = cudnn_conv.unavailable()
        if where.type != "cuda" or reason is not None:
            raise Absent(reason or "cuDNN needs a GPU")
        if not relu or not cudnn_conv.covers(problem, target.capability(where)):
            raise Absent("cuDNN fuses 16-bit convolutions with a ReLU")
        folded = (weight.float() * scale.view(-1, 1, 1, 1)).to(like.dtype)
        folded = folded.contiguous(memory_format=torch.channels_last)
        bias = shift.to(like.dtype)
        return Ready(lambda: [cudnn_conv._fused(x, folded, bias, residual, *geometry)])

    def by_compiler() -> Ready:
        run = compiled(chain)
        return Ready(lambda: [run(x, residual)])

    images = evenly(layer.x_shape[0], where)

    def exact() -> list[Exact]:
        y = F.conv2d(x[images].double(), weight.double(), None, *geometry)
        y = y * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
        y = y if residual is None else y + residual[images].double()
        return [Exact("y", y.relu() if relu else y)]

    makers: dict[str, Callable[[], Ready]] = {"fused": chosen, "native": native}
    if each_tile:
        try:
            every = [c for c in candidates("native") if c.splits == 1]
        except Absent:
            every = []
        for config in every:
            makers[f"native {config.label()}"] = lambda config=config: run_by("native", config)
    makers |= {
        "triton": triton,
        "cudnn": cudnn,
        "unfused": lambda: Ready(eager),
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
        {name: inference(maker) for name, maker in makers.items()},
        images,
    )


def cases(
    model: str,
    batch: int,
    size: int,
    like: Tensor,
    seconds: Callable[[Callable[[], Any]], float] | None,
    each_tile: bool,
    wanted: Callable[[str], bool],
) -> Iterator[Callable[[], Case]]:
    """A maker of each case whose op is wanted: convolutions first, they are most of a network."""
    found = places(model, batch, size)
    if wanted("conv_bn_relu"):
        for place, times in found.items():
            yield lambda p=place, n=times: conv_case(p, n, like, seconds, each_tile)
    if wanted("conv_bn_train"):
        for place, times in found.items():
            yield lambda p=place, n=times: conv_train_case(p, n, like, seconds, each_tile)
    if wanted("norm_conv_train"):
        for place, times in found.items():
            layer = place.layer
            if place.residual and layer.weight_shape[2:] == (1, 1) and layer.groups == 1:
                yield lambda p=place, n=times: prologue_case(p, n, like, seconds, each_tile)
    norms: Counter[Any] = Counter()
    for place, times in found.items():
        norms[place.layer.y_shape, place.residual, place.relu] += times
    for backward in (False, True):
        if wanted("bn_add_relu"):
            for key, times in norms.items():
                yield lambda k=key, n=times, b=backward: bn_case(*k, n, like, b)
        if wanted("add_relu"):
            for (shape, ends, _), times in norms.items():
                if ends:
                    yield lambda s=shape, n=times, b=backward: add_relu_case(s, n, like, b)
    if wanted("conv_backward"):
        layers: Counter[Layer] = Counter()
        for place, times in found.items():
            layers[place.layer] += times
        for layer, times in layers.items():
            yield lambda x=layer, n=times: conv_backward_case(x, n, like)
    if wanted("conv_norm_backward"):
        inside: Counter[Layer] = Counter()
        for place, times in found.items():
            if place.inside and gradient_layer(place.layer) is not None:
                inside[place.layer] += times
        for layer, times in inside.items():
            yield lambda x=layer, n=times: conv_norm_backward_case(x, n, like, seconds)
