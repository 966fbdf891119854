"""`fused-resnet depth`: the report of a small run, resuming, divergence, memory estimates and the
claims derived from measurements."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fusion.training.training_helpers import needs_native

pytest.importorskip("torchvision", reason="the data set's transforms are torchvision's")
pytest.importorskip("torchmetrics", reason="needs the train extra")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
pytest.importorskip("typer", reason="the command needs typer and rich")

from typer.testing import CliRunner

from fused_resnet.bench.contenders import Step
from fused_resnet.bench.memory import activation_peak_bytes
from fused_resnet.cli import application
from fused_resnet.cli import depth as depth_command
from fused_resnet.depth import report, setting, steps, ultra
from fused_resnet.depth.experiment import Experiment
from fused_resnet.depth.setting import Config
from fused_resnet.fusion.training.activation_memory import set_activation_memory

SMALL = dict(depths=(8, 14), deep=(20, 26), deep_steps=3, seeds=2, epochs=1)


def small(out: Path, **changes: Any) -> Config:
    return Config(**{**SMALL, "out": str(out), **changes})


def command(out: Path, *more: str) -> Any:
    arguments = ["--depths", "8,14", "--deep", "20,26", "--deep-steps", "3", "--seeds", "2"]
    arguments += ["--epochs", "1", "--out", str(out), *more]
    return CliRunner().invoke(application(), ["depth", *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("depth")
    result = command(out)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_the_report(finished):
    out, output = finished
    summary = json.loads((out / "report.json").read_text())
    assert summary["bench"] == "depth" and summary["settings"]["batch"] == 64
    assert str(out) not in (out / "report.json").read_text()  # no local path
    assert [(r["kind"], r["depth"]) for r in summary["errors"]] == [
        ("plain", 8), ("residual", 8), ("plain", 14), ("residual", 14),
    ]  # fmt: skip
    for row in summary["errors"]:
        assert row["seeds"] == 2 and row["diverged"] == {}
        for key in ("train_error", "test_error"):
            assert 0 <= row[key]["min"] <= row[key]["mean"] <= row[key]["max"] <= 1
        # After one epoch; zero-initialised residual branches learn slowly at first.
        assert row["train_error"]["max"] < (0.9 if row["kind"] == "residual" else 0.86)
        one, two = (
            c for c in summary["curves"] if (c["kind"], c["depth"]) == (row["kind"], row["depth"])
        )
        mean = (one["test_error"][-1] + two["test_error"][-1]) / 2
        assert row["test_error"]["mean"] == pytest.approx(mean)
        assert one["train_error"] != two["train_error"]  # different seeds
    for look in summary["looks"]:
        assert len(look["gradients"]) == look["depth"]
        assert len(look["responses"]) == look["depth"] - 1
        around = look["around"]
        here = around["losses"][around["distances"].index(0.0)]
        assert len(around["losses"]) == 17 and all(v > 0 for v in around["losses"])
        if look["kind"] == "plain":  # it has learnt something
            assert here < min(around["losses"][0], around["losses"][-1])
    assert {(p["kind"], p["depth"]) for p in summary["start"]} == {
        (kind, depth) for kind in ("plain", "residual") for depth in (8, 14, 20, 26)
    }
    assert [deep["depth"] for deep in summary["deep"]] == [20, 26]
    for deep in summary["deep"]:
        assert deep["steps"] == 3 and len(deep["gradients_after"]) == deep["depth"]
        rows = {row["level"]: row for row in deep["costs"]}
        saved = [rows[level]["saved_bytes"] for level in ("minimal", "low", "eager")]
        assert saved == sorted(set(saved))
    page = (out / "report.md").read_text()
    for depth in (20, 26):
        claims = [c for c in summary["claims"] if f"of {depth} layers trains" in c["claim"]]
        assert len(claims) == 1 and page.count(f"\n| {depth} | minimal | ") == 1
    for claim in summary["claims"]:
        assert claim["words"] in page and claim["words"] in output.replace("\n", "")
    for name in report.plot_names(summary):
        assert (out / f"{name}.png").stat().st_size > 5000 and f"({name}.png)" in page


@pytest.mark.slow
def test_an_interrupted_report_is_resumed(finished, tmp_path, monkeypatch):
    """After an interruption finished parts are read from disk, and the others have the same
    results as in an uninterrupted run."""
    trained: list[str] = []
    plain_train = Experiment.train

    def train(self: Experiment, kind: str, depth: int, seed: int) -> dict[str, Any]:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(f"{kind}-{depth}-{seed}")
        return plain_train(self, kind, depth, seed)

    monkeypatch.setattr(Experiment, "train", train)
    with pytest.raises(KeyboardInterrupt):
        Experiment(small(tmp_path)).run()
    (tmp_path / "parts" / "half-written.json.tmp").write_text("{")
    monkeypatch.setattr(Experiment, "train", plain_train)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("train-*.json")}
    assert len(before) == 3
    parts = Experiment(small(tmp_path)).run()
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    uninterrupted = json.loads((finished[0] / "report.json").read_text())
    resumed = report.summarise(small(tmp_path), parts)
    assert resumed["curves"] == uninterrupted["curves"]
    more = Experiment(small(tmp_path, seeds=3, deep=()))  # one more seed
    assert len(more.parts) == 16
    with pytest.raises(ValueError, match=r"--out .* --epochs 1, not 2; choose another --out"):
        Experiment(small(tmp_path, epochs=2))


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_deep_networks_warm_up_to_the_peak(data, tmp_path, monkeypatch):
    """Linearly over half of their steps, with the paper's momentum, at every depth."""
    experiment = Experiment(small(tmp_path, deep_steps=6, lr=0.3))
    experiment.config = dataclasses.replace(experiment.config, data=data)
    monkeypatch.setattr(ultra, "costs", lambda *_: [])
    monkeypatch.setattr(steps, "WARM_UP_DEPTH", 8)
    taken: list[tuple[float, float]] = []
    plain_step = steps.Steps.step

    def step(self: steps.Steps, x: torch.Tensor, y: torch.Tensor) -> tuple[float, int]:
        taken.extend((g["lr"], g["momentum"]) for g in self.optimizer.param_groups)
        return plain_step(self, x, y)

    monkeypatch.setattr(steps.Steps, "step", step)
    ultra.run(experiment, 8)
    assert [momentum for _, momentum in taken] == [0.9] * 6
    assert [lr for lr, _ in taken] == pytest.approx([0.003, 0.102, 0.201, 0.3, 0.3, 0.3])


def test_divergence_is_a_result(tmp_path, monkeypatch):
    config = small(tmp_path, depths=(8,), deep=(14,), seeds=1, lr=1e30)
    lines: list[str] = []
    parts = Experiment(config, lines.append).run()
    for kind in ("plain", "residual"):
        run = parts[f"train-{kind}-8-0"]
        assert run["diverged"] > 1 and "gradients" not in run
        assert f"{kind} 8, seed 0: diverged in step {run['diverged']}" in lines
    assert parts["deep-14"]["diverged"] and parts["deep-14"]["gradients_after"] is None
    summary = depth_command.write(config, parts, tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "diverged (diverged: seed 0 in step" in page
    assert any("not shown: a residual network of 14 layers trains. diverged" in s for s in summary)


@needs_native
@pytest.mark.parametrize("level", ["full", "low", "minimal"])
def test_memory_estimate(level):
    """Measured: the estimate is 1.02 to 1.52 times the peak, workspace included. It is largest at
    "minimal", where weight gradients' inputs, recomputed in blocks or freed early, do not raise the
    peak."""
    estimate = ultra.estimate_bytes(Config(), 110, 32, 16, level)
    model = setting.make(Config(), "residual", 110, 0, 10)
    set_activation_memory(model, level)
    x = torch.randn(32, 3, 16, 16).contiguous(memory_format=torch.channels_last)

    def step() -> torch.Tensor:
        loss = model(x).sum()
        loss.backward()
        return loss

    assert 0.8 < estimate / activation_peak_bytes(Step(step, model)) < 1.6


def test_depth_that_does_not_fit_raises():
    sizes = {"full": 9 * 2**30, "low": 6 * 2**30, "lower": 5 * 2**30, "minimal": 2**30}
    ultra.refuse_what_does_not_fit(1202, "low", sizes, None)
    ultra.refuse_what_does_not_fit(1202, "low", sizes, 7 * 2**30)
    with pytest.raises(
        ultra.TooDeep,
        match=r"depth 1202: .* 9.0 GiB with --activation-memory full, and 5.5 GiB are free; "
        r"--activation-memory lower would fit, with about 5.0 GiB",
    ):
        ultra.refuse_what_does_not_fit(1202, "full", sizes, int(5.5 * 2**30))
    with pytest.raises(ultra.TooDeep, match=r"1.0 GiB with minimal, .*; use a smaller --batch"):
        ultra.refuse_what_does_not_fit(1202, "full", sizes, 2**29)
    assert ultra.available_bytes() is None or ultra.available_bytes() > 2**20


def test_stock_that_does_not_fit_is_not_measured(tmp_path, monkeypatch):
    """Its row contains the bytes needed; the other levels are measured."""
    experiment = Experiment(small(tmp_path))
    sizes = {"full": 3 * 2**30, "low": 2**30, "lower": 2**30, "minimal": 2**20}
    monkeypatch.setattr(ultra, "available_bytes", lambda: 2 * 2**30)
    rows = ultra.costs(experiment, 8, sizes)
    assert [(r["level"], r.get("needed_bytes")) for r in rows] == [
        ("eager", 3 * 2**30), ("full", 3 * 2**30), ("low", None), ("minimal", None),
    ]  # fmt: skip
    table = report.cost_table({"deep": [{"depth": 8, "costs": rows}]}).splitlines()
    assert table[2] == "| 8 | eager | not measured: would need 3.0 GiB | | | | |"
    assert {line.count("|") for line in table} == {8}


def test_probes_that_fit(monkeypatch):
    whole = ultra.estimate_bytes(Config(), 110, 256, 8, "full")
    for available, images in ((None, 256), (whole, 256), (whole - 1, 128), (1, 1)):
        monkeypatch.setattr(ultra, "available_bytes", lambda a=available: a)
        assert ultra.images_that_fit(Config(), 110, 256, 8) == images


def test_too_deep_ends_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(ultra, "available_bytes", lambda: 1000)
    result = command(tmp_path, "--depths", "8", "--seeds", "1")
    assert result.exit_code == 1
    assert "fused-resnet: depth 20: activations need about" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", "20,57"], "depth must be 6n + 2, as 56 or 62, got 57"),
        (["--deep", "a"], "--deep must be numbers of layers"),
        (["--data", "mnist"], "--data must be one of digits, cifar10, got 'mnist'"),
        (["--data", "cifar10"], "--root must name the folder"),
        (["--block", "wide"], "--block must be one of basic, preact, preact_bottleneck"),
        (["--activation-memory", "none"], "--activation-memory must be one of full, low"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
    ],
)
def test_clear_errors(arguments, message, tmp_path):
    result = CliRunner().invoke(application(), ["depth", "--out", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_missing_packages_are_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "sklearn" else find(name, *a)
    )
    result = CliRunner().invoke(application(), ["depth", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "depth needs sklearn: pip install fused-resnet[train]" in result.output


# --- claims ---------------------------------------------------------------------------------------


def curve(kind: str, depth: int, error: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "depth": depth, "seed": seed, "train_error": [error],
            "test_error": [error], "diverged": None, "seconds": 1.0, **more}  # fmt: skip


def claims(runs: list[dict[str, Any]], **parts: Any) -> dict[str, dict[str, Any]]:
    named = {f"train-{i}": run for i, run in enumerate(runs)}
    summary = report.summarise(Config(depths=(20, 56)), {**named, **parts})
    return {c["claim"]: c for c in summary["claims"]}


def test_degradation_is_detected():
    plain, residual = (
        "plain networks degrade with depth",
        "residual networks do not degrade with depth",
    )
    runs = [curve("plain", 20, 0.01), curve("plain", 56, 0.4), curve("residual", 20, 0.01)]
    result = claims([*runs, curve("residual", 56, 0.0)])
    assert result[plain]["shown"] and result[residual]["shown"]
    assert "1.00% at 20, 40.00% at 56" in result[plain]["words"]
    result = claims([runs[0], curve("plain", 56, 0.01), runs[2], curve("residual", 56, 0.2)])
    assert not result[plain]["shown"] and not result[residual]["shown"]
    tested = curve("residual", 56, 0.0) | {"test_error": [0.05]}
    assert not claims([*runs, tested])[residual]["shown"]
    diverged = [curve("residual", 56, 0.0, seed=1, diverged=7), curve("residual", 56, 0.02)]
    result = claims([*runs, *diverged])
    assert "Diverged: 56 layers in step 7" in result[residual]["words"]


@pytest.mark.parametrize(
    ("deep", "state"),
    [
        ([1.0] * 9, "kept"), ([1e-5] * 9, "vanishing"), ([1e5] * 9, "exploding"),
        ([0.0] * 4 + [1.0] * 5, "vanished to zero"),
        ([None] + [1.0] * 8, "exploding beyond float32"),
    ],
)  # fmt: skip
def test_gradient_flow(deep, state):
    def start(kind: str, gradients: list[Any], depth: int) -> dict[str, Any]:
        case = {"bn": True, "init": "he", "gradients": gradients}
        return {"kind": kind, "depth": depth, "cases": [case], "seconds": 1.0}

    parts = {
        "start-a": start("plain", [1.0] * 9, 20), "start-b": start("plain", deep, 56),
        "start-c": start("residual", [1.0] * 9, 20), "start-d": start("residual", [2.0] * 9, 56),
    }  # fmt: skip
    (claim,) = (c for c in claims([], **parts).values() if "batch norm" in c["claim"])
    assert claim["shown"] == (state != "kept")
    assert f"plain: {state} (" in claim["words"] and "residual: kept (" in claim["words"]


def test_gradient_flow_excludes_the_classifier():
    flow = report.flow([1.0, 10.0, 100.0, 5.0, 5.0, 5.0, 777.0])
    assert flow["early"] == pytest.approx(10) and flow["late"] == pytest.approx(5)
    assert math.isclose(report.flow([2.0, 2.0, 2.0])["early"], 2.0)
