"""The runs of `fused_resnet.testing.parity`: exact, stock and under test.

Every run yields tensors under a key (kind, name): ("layer", "layer1.0"), ("output", "output"),
("gradient", "layer1.0.conv1.weight") or ("buffer", "layer1.0.bn1.running_mean").
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.kernels.registry import use_backend
from fused_resnet.layers.hooks import watching
from fused_resnet.tolerance import Error, measure_error

Key = tuple[str, str]


@contextlib.contextmanager
def stock_path() -> Iterator[None]:
    """A context in which fused_resnet models run torchvision's path; it affects no other models."""
    with use_backend("reference"):
        yield


def stock_model(name: str, **kwargs: Any) -> nn.Module:
    """torchvision's model without weights, or this package's if torchvision does not import.

    Run it under `stock_path()`, so that this package's model takes torchvision's path.
    """
    try:
        from torchvision.models import get_model
    except Exception:  # not installed, or built for another torch
        from fused_resnet.models.resnet import get_model
    return get_model(name, weights=None, **kwargs)


def layer_names(model: nn.Module) -> list[str]:
    """The max pooling, every block, the average pooling and the classifier: modules whose hooks do
    not disable fusion."""
    names = [n for n in ("maxpool",) if hasattr(model, n)]
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        names += [f"{stage}.{n}" for n, _ in getattr(model, stage, nn.Module()).named_children()]
    return names + [n for n in ("avgpool", "fc") if hasattr(model, n)]


@dataclass
class Run:
    """The common settings of the three models' runs."""

    inputs: Tensor  # (N, C, H, W), values representable in dtype, stored as float64
    targets: Tensor  # (N,)
    dtype: torch.dtype
    training: bool
    autocast: bool
    device: torch.device
    layout: torch.memory_format = torch.preserve_format

    def prepare(self, model: nn.Module, *, exact: bool = False) -> nn.Module:
        """A copy with parameters rounded to dtype, but stored as float32 under autocast.

        Under autocast running statistics are not rounded, since autocast keeps them in float32.
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

    def forward(self, model: nn.Module, layers: Sequence[str] = (), see: Any = None) -> Tensor:
        """Output (N, classes) of `model`; calls see(name, output) for each of `layers`."""
        parameter = next(model.parameters())
        x = self.inputs.to(
            device=parameter.device, dtype=parameter.dtype, memory_format=self.layout
        )
        autocast = self.autocast and parameter.dtype != torch.float64
        with (
            watching([(name, model.get_submodule(name)) for name in layers], see),
            torch.set_grad_enabled(self.training),
            torch.autocast(parameter.device.type, self.dtype, enabled=autocast),
        ):
            return model(x)

    def backward(self, model: nn.Module, output: Tensor) -> None:
        """Gradients of the mean cross-entropy, which is computed in float32 or float64."""
        logits = output if output.dtype == torch.float64 else output.float()
        targets = self.targets.to(output.device)
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(logits, targets).backward()


def check_same_state(model: nn.Module, reference: nn.Module) -> None:
    """Raises ValueError unless both state_dicts have equal keys, shapes and values."""
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
                f"parity: {key} must have the same shape in both, got {tuple(mine[key].shape)} in "
                f"the model and {tuple(value.shape)} in the reference"
            )
        if not torch.equal(mine[key].cpu().to(value.dtype), value.cpu()):
            raise ValueError(
                f"parity: {key} has different values in model and reference; "
                f"call model.load_state_dict(reference.state_dict()) first"
            )


def _trained_state(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, name, value) of every gradient and buffer after one training step."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield "gradient", name, parameter.grad
    for name, buffer in model.named_buffers():
        yield "buffer", name, buffer


def run_exact(run: Run, reference: nn.Module, layers: Sequence[str]) -> dict[Key, Tensor]:
    """The layers' outputs, the output, and in training gradients and buffers, in float64."""
    exact: dict[Key, Tensor] = {}
    model = run.prepare(reference, exact=True)

    def keep(name: str, value: Tensor) -> None:
        exact["layer", name] = value.detach().clone()

    with stock_path():
        output = run.forward(model, layers, keep)
        exact["output", "output"] = output.detach()
        if run.training:
            run.backward(model, output)
            exact.update({(kind, name): v.double() for kind, name, v in _trained_state(model)})
    return exact


PERTURBATION = 256  # unit roundoffs; float32 activations have errors of 10 to 100


def gradient_conditioning(
    run: Run, reference: nn.Module, exact: dict[Key, Tensor]
) -> dict[str, float]:
    """Relative rms change of the exact gradients when weights and inputs change by rounding errors.

    ReLU and max pooling are not differentiable everywhere. A pre-activation within rounding error
    of zero may get either sign, and neither is wrong; one such flip changes the gradients of every
    earlier layer by far more than float32's rounding. By chance, the errors of stock's two memory
    layouts differ by factors of thousands. So the float64 gradients are recomputed with weights and
    inputs multiplied by 1 + 256 u N(0, 1), where u is the unit roundoff, and their relative rms
    change counts as an error that stock may make. Measured, stock against stock (ResNet-18 under 8
    seeds, ResNet-50): the worst ratio to it is 0.63; with 16 u it is over 1000. 16-bit dtypes need
    no such term: flips are so frequent that stock's own error contains their average. In float64
    flips do not occur, so compare gradients in float64 to find small mistakes in a backward pass.
    """
    if not run.training or run.dtype not in (torch.float32, torch.float64):
        return {}
    generator = torch.Generator().manual_seed(0)
    size = PERTURBATION * torch.finfo(run.dtype).eps / 2

    def perturb(t: Tensor) -> Tensor:
        return t * (1 + size * torch.randn(t.shape, generator=generator, dtype=t.dtype))

    model = run.prepare(reference, exact=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(perturb(parameter))
    with stock_path():
        perturbed = replace(run, inputs=perturb(run.inputs))
        perturbed.backward(model, perturbed.forward(model))
    return {
        name: measure_error(value, exact[kind, name]).rms
        for kind, name, value in _trained_state(model)
        if kind == "gradient"
    }


@contextlib.contextmanager
def _unconverted(run: Run, model: nn.Module) -> Iterator[nn.Module | None]:
    """The model itself, temporarily in eval mode; None if it would have to be converted."""
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
    """Errors of `model` relative to `exact`, and its output.

    Hooks measure the layers in one run. Output, gradients and buffers are measured in a second run
    without hooks, since hooks disable some fused paths. If nothing has to be converted, the second
    run uses the model itself, since a copy would not have its caches, which may be stale.
    """
    errors: dict[Key, Error] = {}

    def see(kind: str, name: str, value: Tensor) -> None:
        expected = exact[kind, name]
        if value.shape != expected.shape:
            raise AssertionError(
                f"parity: {name} has {kind} shape {tuple(value.shape)}, "
                f"the reference has {tuple(expected.shape)}"
            )
        errors[kind, name] = measure_error(value.cpu(), expected)

    first = run.prepare(model)
    run.forward(first, layers, functools.partial(see, "layer"))
    missing = [n for n in layers if ("layer", n) not in errors]
    if missing:
        raise AssertionError(f"parity: forward hooks on {missing} did not run")
    second = run.prepare(model) if run.training else first
    with _unconverted(run, model) as given:
        output = run.forward(second if given is None else given)
    see("output", "output", output)
    if run.training:
        run.backward(second, output)
        for kind, name, value in _trained_state(second):
            see(kind, name, value)
        missing = [name for kind, name in exact if (kind, name) not in errors]
        if missing:
            raise AssertionError(f"parity: no gradient arrived at {missing}")
    return errors, output.detach().cpu()


def run_stock(
    run: Run, reference: nn.Module, exact: dict[Key, Tensor], layers: Sequence[str]
) -> tuple[dict[Key, Error], Tensor]:
    """As `run_measured`, with the larger error of contiguous and channels_last per tensor."""
    worse: dict[Key, Error] = {}
    with stock_path():
        for layout in (torch.channels_last, torch.contiguous_format):
            errors, output = run_measured(replace(run, layout=layout), reference, exact, layers)
            for key, error in errors.items():
                worse[key] = max(error, worse.get(key, error), key=lambda e: e.rms)
    return worse, output
