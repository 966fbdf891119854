"""`fused-resnet train --cuda-graph`: the same losses as without it; without a GPU the graphs are
simulated (recorded_steps.py)."""

from __future__ import annotations

import pytest

from tests.graphs.recorded_steps import DEVICE


@pytest.fixture
def trains(tmp_path, monkeypatch):
    """run(resume=, **options of train.Config): trains on a few digits and returns the losses."""
    for package in ("torchvision", "torchmetrics", "sklearn"):
        pytest.importorskip(package, reason="training needs the train extra")
    from fused_resnet import train
    from fused_resnet.train import data, state

    digits = data._digits(16)
    few = digits._replace(train=(digits.train[0][:160], digits.train[1]),
                          test=(digits.test[0][:50], digits.test[1]))  # fmt: skip
    monkeypatch.setattr(data, "load", lambda *_: few)
    shared = dict(model="cifar_resnet8", image_size=16, batch=32, warmup=0.5, device=DEVICE)

    def run(name="run", resume=False, **options):
        config = train.Config(**{**shared, "epochs": 2, "out": str(tmp_path / name), **options})
        train.run(config, resume=resume)
        rows = state.read_metrics(tmp_path / name / "metrics.jsonl")
        return [row["loss"] for row in rows if "loss" in row]

    return run


@pytest.mark.parametrize(
    "options",
    [{"clip": 0.5, "ema": 0.9}, {"optimizer": "adamw", "amp": "bfloat16", "label_smoothing": 0.1}],
    ids=str,
)
def test_losses_equal_those_without_graphs(trains, graphs, options):
    want = trains("without", **options)
    got = trains(cuda_graph=True, **options)
    assert len(got) == 10 and graphs == [(32, 3, 16, 16)]
    assert got == pytest.approx(want, rel=1e-3 if DEVICE == "cpu" else 0.1)


def test_resume(trains, graphs, monkeypatch):
    """Training stops at a step with a non-finite loss, whose update is not applied. A resumed run
    loads the optimizer's state and captures a new graph."""
    from fused_resnet.train import NonFinite, loop

    options = {"optimizer": "adamw", "cuda_graph": True, "checkpoint_every": 2}
    want = trains("whole", **options)
    replay = loop._Run.replay

    def poisoned(run, x, y):
        return replay(run, x * float("nan") if run.step == 4 and not done else x, y)

    done, captured = [], len(graphs)
    monkeypatch.setattr(loop._Run, "replay", poisoned)
    with pytest.raises(NonFinite, match=r"step 5: the loss is nan; .* is of step 4"):
        trains(**options)
    assert len(graphs) == captured + 1
    done.append(1)
    got = trains(resume=True, **options)
    assert got == pytest.approx(want, rel=1e-4 if DEVICE == "cpu" else 0.1)
    assert len(graphs) == captured + 2


def test_invalid_options(trains, tmp_path):
    for options, words in (
        ({"optimizer": "lamb"}, "--cuda-graph is for --optimizer sgd or adamw"),
        ({"accumulate": 2}, "and --accumulate 1, got sgd and 2"),
        ({"device": "cpu"}, "--cuda-graph needs a GPU, the parameters are on cpu"),
    ):
        with pytest.raises(ValueError, match=words):
            trains(cuda_graph=True, **options)
    assert not (tmp_path / "run").exists()
