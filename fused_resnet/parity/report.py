"""Numerical parity: checks that a model is as exact as stock PyTorch.

Compares three computations of the same function: an exact one (float64, on the CPU), stock PyTorch
in the tested dtype, and the model under test in that dtype. Weights and inputs are rounded to the
tested dtype before conversion to float64, so all three start from the same values and differ only
by the errors of their arithmetic.

    from fused_resnet.testing import assert_parity, calibrate
    reference = calibrate(torchvision.models.resnet50(), images)
    model.load_state_dict(reference.state_dict())
    assert_parity(model, reference, images, dtype=torch.bfloat16)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.models.resnet import get_model
from fused_resnet.tolerance import TOLERANCE, Error, Tolerance

from .checkpoint import load_checkpoint, load_into
from .runs import (
    Run,
    check_same_state,
    gradient_conditioning,
    layer_names,
    run_exact,
    run_measured,
    run_stock,
    stock_model,
    stock_path,
)

# --- calibrating batch norm statistics -----------------------------------------------------------


def calibrate(
    model: nn.Module, images: Tensor, *, affine_seed: int | None = None, batch: int = 16
) -> nn.Module:
    """Set the running statistics of `model`'s batch norms to those of `images`, in place; returns
    the model.

    Initial statistics (mean 0, variance 1) hide a missing mean, a wrong eps and rounded statistics.
    The running statistics become the cumulative average over batches of `images` (N, C, H, W) in
    training mode; momentum and training flags are restored. With `affine_seed`, weight and bias are
    first drawn from U(0.5, 1.5) and N(0, 0.2^2) under that seed.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if affine_seed is not None:
        generator = torch.Generator().manual_seed(affine_seed)
        with torch.no_grad():
            for norm in norms:
                if norm.weight is not None:
                    norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
                if norm.bias is not None:
                    norm.bias.copy_(torch.randn(norm.num_features, generator=generator) * 0.2)
    tracked = [m for m in norms if m.running_mean is not None]
    modes = {m: m.training for m in model.modules()}
    momenta = {m: m.momentum for m in tracked}
    parameter = next(model.parameters())
    try:
        model.eval()
        for norm in tracked:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        with torch.no_grad():
            # Never of one image, unless there is only one.
            for chunk in images.chunk(max(1, len(images) // batch)):
                model(chunk.to(device=parameter.device, dtype=parameter.dtype))
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return model


def matched_models(
    name: str,
    images: Tensor,
    *,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[nn.Module, nn.Module]:
    """(fused, reference) models of the same name and weights, in eval mode.

    The weights come from `checkpoint`, or are random under `seed`, including those of the batch
    norms, whose statistics are calibrated on images (N, 3, H, W). The reference is torchvision's
    model, or without torchvision another one of this package (`parity` runs it on torchvision's
    path).
    """
    torch.manual_seed(seed)
    classes = 1000
    if checkpoint is None:
        reference = stock_model(name)
        with stock_path():
            calibrate(reference, images, affine_seed=seed)
    else:
        state = load_checkpoint(checkpoint)
        classes = state["fc.bias"].shape[0] if "fc.bias" in state else classes
        reference = stock_model(name, num_classes=classes)
        load_into(reference, state, name, checkpoint)
    fused = get_model(name, weights=None, num_classes=classes)
    fused.load_state_dict(reference.state_dict())
    return fused.to(device).eval(), reference.to(device).eval()


# --- the report ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParityRow:
    """One compared tensor.

    kind: "layer" (measured by a forward hook), "output" (in the run without hooks), "gradient" or
    "buffer"; ratio = fused.rms / stock.rms; the rule is fused.rms <= allowed. `conditioning` is
    nonzero only for gradients in float32 and float64: see `runs.gradient_conditioning`.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    stock: Error
    fused: Error
    ratio: float
    conditioning: float
    allowed: float
    ok: bool

    @property
    def layer(self) -> str:
        """The block or top-level module of the tensor: layer1.0.conv1.weight -> layer1.0."""
        parts = self.name.split(".")
        return ".".join(parts[:2]) if parts[0].startswith("layer") else parts[0]


@dataclass(frozen=True)
class Agreement:
    """Share of images (0 to 1) on which two outputs agree.

    top1: equal best classes. top5: the mean overlap of the two sets of five best classes.
    """

    top1: float
    top5: float


@dataclass
class ParityReport:
    """The result of `parity`. ok: whether every row satisfies the tolerance rule."""

    dtype: str
    training: bool
    autocast: bool
    device: str
    input_shape: tuple[int, ...]
    threads: int
    torch: str
    rows: list[ParityRow] = field(default_factory=list)
    agreement: dict[str, Agreement] = field(default_factory=dict)
    reproducer: str = ""

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def failures(self) -> list[ParityRow]:
        return [row for row in self.rows if not row.ok]

    def row(self, name: str, kind: str | None = None) -> ParityRow:
        """The row of that name (and kind); raises KeyError if there is none."""
        for row in self.rows:
            if row.name == name and kind in (None, row.kind):
                return row
        raise KeyError(f"parity report: no row {name!r} of kind {kind or 'any'}")

    def grouped(self) -> list[ParityRow]:
        """Rows for display: all gradients of a layer are merged into one row, and all its buffers.

        The errors of a merged row are the root mean square of the relative rms errors, the largest
        absolute error, and the largest scale.
        """
        groups: dict[tuple[str, str], list[ParityRow]] = {}
        for row in self.rows:
            name = row.layer if row.kind in ("gradient", "buffer") else row.name
            groups.setdefault((row.kind, name), []).append(row)
        return [
            _merge_rows(name, rows) if len(rows) > 1 else rows[0]
            for (_, name), rows in groups.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """The whole report in JSON types, with one entry per gradient."""
        return {"ok": self.ok, **asdict(self)}


def _merge_rows(name: str, rows: list[ParityRow]) -> ParityRow:
    def mean(values: list[float]) -> float:
        return math.sqrt(sum(v**2 for v in values) / len(values))

    def merge(errors: list[Error]) -> Error:
        rms = mean([e.rms for e in errors])
        return Error(max(e.max_abs for e in errors), rms, max(e.scale for e in errors))

    stock, fused = merge([r.stock for r in rows]), merge([r.fused for r in rows])
    return ParityRow(
        name=f"{name} ({len(rows)} tensors)",
        kind=rows[0].kind,
        shape=(len(rows),),
        stock=stock,
        fused=fused,
        ratio=_ratio(fused.rms, stock.rms),
        conditioning=mean([r.conditioning for r in rows]),
        allowed=mean([r.allowed for r in rows]),
        ok=all(r.ok for r in rows),
    )


def _ratio(mine: float, theirs: float) -> float:
    if theirs > 0:
        return mine / theirs
    return 1.0 if mine == 0 else math.inf


def _agreement(a: Tensor, b: Tensor) -> Agreement:
    """a, b: (N, classes)"""
    if a.shape[0] == 0:
        return Agreement(1.0, 1.0)
    k = min(5, a.shape[1])
    top1 = (a.argmax(1) == b.argmax(1)).double().mean().item()
    best_a, best_b = a.topk(k, 1).indices, b.topk(k, 1).indices
    overlap = (best_a[:, :, None] == best_b[:, None, :]).any(2).double().mean().item()
    return Agreement(top1, overlap)


# --- the two entry points ------------------------------------------------------------------------


def parity(
    model: nn.Module,
    reference: nn.Module,
    inputs: Tensor,
    dtype: torch.dtype | None = None,
    training: bool = False,
    *,
    targets: Tensor | None = None,
    tolerance: Tolerance = TOLERANCE,
    reproducer: str = "",
) -> ParityReport:
    """Compare the errors of `model` and `reference` relative to float64, layer by layer.

    Neither model is changed.

    model:      the model under test; its state_dict must equal the reference's
    reference:  the stock model (torchvision's, or any nn.Module with the same modules)
    inputs:     (N, C, H, W)
    dtype:      tested dtype, default the model's; in training a 16-bit dtype means autocast
                (float32 parameters holding 16-bit values)
    training:   also compare a training step: every gradient of the mean cross-entropy, every
                running statistic, num_batches_tracked
    targets:    (N,) labels of that loss, default 0, 1, 2, ...
    """
    check_same_state(model, reference)
    parameter = next(model.parameters())
    dtype = dtype or parameter.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"parity: dtype must be a floating point dtype, got {dtype}")
    run = Run(
        inputs=inputs.detach().cpu().to(dtype).double(),
        targets=torch.arange(inputs.shape[0]) if targets is None else targets.cpu(),
        dtype=dtype,
        training=training,
        autocast=training and dtype in (torch.bfloat16, torch.float16),
        device=parameter.device,
    )
    layers = [n for n in layer_names(reference) if n in dict(model.named_modules())]
    exact = run_exact(run, reference, layers)
    if targets is None:
        run.targets = run.targets % exact["output", "output"].shape[1]
    stock, stock_output = run_stock(run, reference, exact, layers)
    fused, fused_output = run_measured(run, model, exact, layers)
    conditioning = gradient_conditioning(run, reference, exact)
    rows = []
    for key, value in exact.items():
        kind, name = key
        is_count = kind == "buffer" and value.dim() == 0  # num_batches_tracked must be equal
        stored = torch.float32 if run.autocast and kind in ("gradient", "buffer") else dtype
        condition = conditioning.get(name, 0.0) if kind == "gradient" else 0.0
        basis = replace(stock[key], rms=max(stock[key].rms, condition))
        allowed = 0.0 if is_count else tolerance.allowed_rms(basis, stored)
        ratio, ok = _ratio(fused[key].rms, stock[key].rms), fused[key].rms <= allowed
        shape = tuple(value.shape)
        rows.append(
            ParityRow(name, kind, shape, stock[key], fused[key], ratio, condition, allowed, ok)
        )
    return ParityReport(
        dtype=str(dtype).removeprefix("torch."),
        training=training,
        autocast=run.autocast,
        device=str(run.device),
        input_shape=tuple(inputs.shape),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        rows=rows,
        agreement={
            "fused with float64": _agreement(fused_output, exact["output", "output"]),
            "stock with float64": _agreement(stock_output, exact["output", "output"]),
            "fused with stock": _agreement(fused_output, stock_output),
        },
        reproducer=reproducer or _reproducer(model, run),
    )


def _reproducer(model: nn.Module, run: Run) -> str:
    """The call to repeat, in one line, with a checksum of the inputs."""
    blocks = "-".join(str(len(list(getattr(model, f"layer{i}", [])))) for i in range(1, 5))
    return (
        f"parity({type(model).__name__} [{blocks}], reference, "
        f"inputs {tuple(run.inputs.shape)} with sum {run.inputs.sum().item():.17g}, "
        f"dtype={run.dtype}, training={run.training})  "
        f"# torch {torch.__version__}, {run.device}, {torch.get_num_threads()} threads"
    )


def assert_parity(
    model: nn.Module,
    reference: nn.Module,
    inputs: Tensor,
    *,
    dtype: torch.dtype | None = None,
    training: bool = False,
    targets: Tensor | None = None,
    tolerance: Tolerance = TOLERANCE,
    reproducer: str = "",
) -> ParityReport:
    """As `parity`, but raises AssertionError with the first failing row; returns the report.

    The message names the layer, its error, stock's error, the allowed error, and a line to
    reproduce it.
    """
    report = parity(
        model,
        reference,
        inputs,
        dtype,
        training,
        targets=targets,
        tolerance=tolerance,
        reproducer=reproducer,
    )
    if report.ok:
        return report
    first = report.failures[0]
    raise AssertionError(
        f"{first.kind} {first.name} {first.shape}: relative rms error {first.fused.rms:.3g} "
        f"against float64 (largest {first.fused.max_abs:.3g}), allowed {first.allowed:.3g} "
        f"({tolerance.factor:g} x stock's {first.stock.rms:.3g} plus one rounding); "
        f"{len(report.failures)} of {len(report.rows)} rows fail\n"
        f"reproduce: {report.reproducer}"
    )
