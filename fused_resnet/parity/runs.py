"""The runs behind `fused_resnet.testing.parity`: exact, stock and under test.

Every run yields tensors under a key (kind, name): ("layer", "layer1.0"), ("output", "output"),
("gradient", "layer1.0.conv1.weight") or ("buffer", "layer1.0.bn1.running_mean").
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.tolerance import Error, measure_error

Key = tuple[str, str]


@contextlib.contextmanager
def stock_path() -> Iterator[None]:
    """Within it, a fused_resnet model runs exactly torchvision's path; others do not notice."""
    from fused_resnet.kernels.registry import use_backend

    with use_backend("reference"):
        yield


def stock_model(name: str, **kwargs: Any) -> nn.Module:
    """torchvision's model without weights, or this package's where torchvision does not import.

    Run this package's under `stock_path()`: then it takes exactly torchvision's path.
    """
    try:
        from torchvision.models import get_model
    except Exception:  # absent, or beside a torch it does not fit
        from fused_resnet.models.resnet import get_model
    return get_model(name, weights=None, **kwargs)


def layer_names(model: nn.Module) -> list[str]:
    """The stem, every block, the pool and the classifier: modules whose hooks keep fusion on."""
    names = [n for n in ("maxpool",) if hasattr(model, n)]
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        names += [f"{stage}.{n}" for n, _ in getattr(model, stage, nn.Module()).named_children()]
    return names + [n for n in ("avgpool", "fc") if hasattr(model, n)]


def _forward_hook(see: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        see(output.detach())

    return hook


@dataclass
class Run:
    """How the three models are run: the same images, labels and autocast."""

    inputs: Tensor  # (N, C, H, W), values representable in dtype, stored as float64
    targets: Tensor  # (N,)
    dtype: torch.dtype
    training: bool
    autocast: bool
    device: torch.device
    layout: torch.memory_format = torch.preserve_format

    def prepare(self, model: nn.Module, *, exact: bool = False) -> nn.Module:
        """A copy with parameters rounded to dtype; stored as float32 under autocast.

        Under autocast running statistics stay float32, since autocast never rounds them.
        """
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for tensor in [*copied.parameters(), *copied.buffers()]:
                keep = self.autocast and not isinstance(tensor, nn.Parameter)
                if tensor.is_floating_point() and not keep:
                    tensor.copy_(tensor.to(self.dtype))
        copied.train(self.training)
        if exact:
            return copied.to(device="cpu", dtype=torch.float64)
        stored = torch.float32 if self.autocast else self.dtype
        return copied.to(device=self.device, dtype=stored).to(memory_format=self.layout)

    def forward(
        self, model: nn.Module, hooks: dict[str, Callable[[Tensor], None]] | None = None
    ) -> Tensor:
        """Output (N, classes) of `model`; hooks see each named layer's output."""
        parameter = next(model.parameters())
        x = self.inputs.to(
            device=parameter.device, dtype=parameter.dtype, memory_format=self.layout
        )
        handles = []
        modules = dict(model.named_modules())
        for name, see in (hooks or {}).items():
            handles.append(modules[name].register_forward_hook(_forward_hook(see)))
        autocast = self.autocast and parameter.dtype != torch.float64
        try:
            with (
                torch.set_grad_enabled(self.training),
                torch.autocast(parameter.device.type, self.dtype, enabled=autocast),
            ):
                return model(x)
        finally:
            for handle in handles:
                handle.remove()

    def backward(self, model: nn.Module, output: Tensor) -> None:
        """Gradients of the mean cross-entropy (computed in float32 or better)."""
        logits = output if output.dtype == torch.float64 else output.float()
        targets = self.targets.to(output.device)
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(logits, targets).backward()


def check_same_state(model: nn.Module, reference: nn.Module) -> None:
    mine, theirs = model.state_dict(), reference.state_dict()
    if mine.keys() != theirs.keys():
        different = sorted(mine.keys() ^ theirs.keys())
        raise ValueError(
            f"parity: model and reference must have the same state_dict keys, "
            f"{len(different)} differ, the first is {different[0]!r}"
        )
    for key, value in theirs.items():
        if mine[key].shape != value.shape:
            raise ValueError(
                f"parity: {key} must have one shape in both, got {tuple(mine[key].shape)} in the "
                f"model and {tuple(value.shape)} in the reference"
            )
        if not torch.equal(mine[key].cpu().to(value.dtype), value.cpu()):
            raise ValueError(
                f"parity: {key} has other values in the model than in the reference; "
                f"call model.load_state_dict(reference.state_dict()) first"
            )


class _Recorder:
    """Collects the errors of one run against the exact tensors, by (kind, name)."""

    def __init__(self, exact: dict[Key, Tensor]) -> None:
        self.exact = exact
        self.errors: dict[Key, Error] = {}

    def hooks(self, names: Sequence[str]) -> dict[str, Callable[[Tensor], None]]:
        return {name: functools.partial(self.see, "layer", name) for name in names}

    def see(self, kind: str, name: str, value: Tensor) -> None:
        exact = self.exact[kind, name]
        if value.shape != exact.shape:
            raise AssertionError(
                f"parity: {name} has {kind} shape {tuple(value.shape)}, "
                f"the reference has {tuple(exact.shape)}"
            )
        self.errors[kind, name] = measure_error(value.cpu(), exact)

    def see_state(self, model: nn.Module) -> None:
        for kind, name, value in _trained_state(model):
            self.see(kind, name, value)


def _trained_state(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, name, value) of every gradient and buffer after one training step."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield "gradient", name, parameter.grad
    for name, buffer in model.named_buffers():
        yield "buffer", name, buffer


def run_exact(run: Run, reference: nn.Module, layers: Sequence[str]) -> dict[Key, Tensor]:
    """Every layer's output, the output, and in training gradients and buffers, in float64."""
    exact: dict[Key, Tensor] = {}
    model = run.prepare(reference, exact=True)

    def keep(name: str, value: Tensor) -> None:
        exact["layer", name] = value.clone()

    hooks: dict[str, Callable[[Tensor], None]] = {n: functools.partial(keep, n) for n in layers}
    with stock_path():
        output = run.forward(model, hooks)
        exact["output", "output"] = output.detach()
        if run.training:
            run.backward(model, output)
            exact.update({(kind, name): v.double() for kind, name, v in _trained_state(model)})
    return exact


PERTURBATION = 256  # roundings; float32 activations are off by 10 to 100 of them


def gradient_conditioning(
    run: Run, reference: nn.Module, exact: dict[Key, Tensor]
) -> dict[str, float]:
    """How far the exact gradients move when weights and inputs move by a few roundings.

    ReLU and max pooling have kinks. A pre-activation within rounding of zero may fall on either
    side, neither side is wrong, and one such flip changes the gradients of every earlier layer by
    far more than float32's rounding: stock's two memory layouts differ by factors of thousands
    there, by luck. So the float64 gradient is computed once more with weights and inputs
    multiplied by 1 + 256 u N(0, 1), and that relative rms change counts as an error stock may
    make. Measured on stock against stock (ResNet-18 under 8 seeds, ResNet-50): the worst ratio to
    it is 0.63; with 16 u it is over 1000. In 16 bits flips are so many that stock's own error
    holds their average, and none is needed. In float64 flips do not happen: to see a mistake in
    a backward pass sharply, compare gradients in float64.
    """
    if not run.training or run.dtype not in (torch.float32, torch.float64):
        return {}
    generator = torch.Generator().manual_seed(0)
    size = PERTURBATION * torch.finfo(run.dtype).eps / 2

    def move(t: Tensor) -> Tensor:
        return t * (1 + size * torch.randn(t.shape, generator=generator, dtype=t.dtype))

    model = run.prepare(reference, exact=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(move(parameter))
    with stock_path():
        moved = replace(run, inputs=move(run.inputs))
        moved.backward(model, moved.forward(model))
    return {
        name: measure_error(value, exact[kind, name]).rms
        for kind, name, value in _trained_state(model)
        if kind == "gradient"
    }


@contextlib.contextmanager
def _as_given(run: Run, model: nn.Module) -> Iterator[nn.Module | None]:
    """The model itself, in eval mode meanwhile; None where it would have to be converted."""
    tensors = [*model.parameters(), *model.buffers()]
    converted = any(t.is_floating_point() and t.dtype != run.dtype for t in tensors)
    if run.training or converted or run.layout != torch.preserve_format:
        yield None
        return
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode


def run_measured(
    run: Run, model: nn.Module, exact: dict[Key, Tensor], layers: Sequence[str]
) -> tuple[dict[Key, Error], Tensor]:
    """Errors of `model` against exact, and its output.

    Layers are seen by hooks in one run. The output, gradients and buffers come from another run
    without any hook, since that one may take paths that hooks switch off. Where nothing has to be
    converted, that run is one of the model itself and not of a copy, since a copy would not show
    what the model may have kept from weights it had before.
    """
    recorder = _Recorder(exact)
    first = run.prepare(model)
    run.forward(first, recorder.hooks(layers))
    missing = [n for n in layers if ("layer", n) not in recorder.errors]
    if missing:
        raise AssertionError(f"parity: forward hooks on {missing} did not run")
    second = run.prepare(model) if run.training else first
    with _as_given(run, model) as given:
        output = run.forward(second if given is None else given)
    recorder.see("output", "output", output)
    if run.training:
        run.backward(second, output)
        recorder.see_state(second)
        missing = [name for kind, name in exact if (kind, name) not in recorder.errors]
        if missing:
            raise AssertionError(f"parity: no gradient arrived at {missing}")
    return recorder.errors, output.detach().cpu()


def run_stock(
    run: Run, reference: nn.Module, exact: dict[Key, Tensor], layers: Sequence[str]
) -> tuple[dict[Key, Error], Tensor]:
    """As `run_measured`, the worse error of contiguous and channels_last for each tensor."""
    worse: dict[Key, Error] = {}
    with stock_path():
        for layout in (torch.channels_last, torch.contiguous_format):
            errors, output = run_measured(replace(run, layout=layout), reference, exact, layers)
            for key, error in errors.items():
                worse[key] = max(error, worse.get(key, error), key=lambda e: e.rms)
    return worse, output
