"""`fused-resnet train --cuda-graph`: the same losses as without; where there is no GPU a recording
is played (recorded_steps.py)."""

from __future__ import annotations

import pytest

from tests.graphs.recorded_steps import DEVICE


@pytest.fixture
def trains(tmp_path, monkeypatch):
    """run(resume=, **options of train.Config) on a few digits -> losses."""
    for package in ("torchvision", "torchmetrics", "sklearn"):
        pytest.importorskip(package, reason="training needs the train extra")
    from fused_resnet import train
    from fused_resnet.train import data, state

    found = data._digits(16)
    few = found._replace(train=(found.train[0][:160], found.train[1]),
                         test=(found.test[0][:50], found.test[1]))  # fmt: skip
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
def test_the_command_trains_as_without(trains, graphs, options):
    want = trains("without", **options)
    found = trains(cuda_graph=True, **options)
    assert len(found) == 10 and graphs == [(32, 3, 16, 16)]
    assert found == pytest.approx(want, rel=1e-3 if DEVICE == "cpu" else 0.1)


def test_the_command_goes_on(trains, graphs, monkeypatch):
    """With the optimizer's state loaded anew; and a step of no finite number is the one it stops
    at, as if it had not been taken."""
    from fused_resnet.train import NonFinite, loop

    options = {"optimizer": "adamw", "cuda_graph": True, "checkpoint_every": 2}
    want = trains("whole", **options)
    replay = loop._Run.replay

    def poisoned(run, x, y):
        return replay(run, x * float("nan") if run.step == 4 and not done else x, y)

    done, seen = [], len(graphs)
    monkeypatch.setattr(loop._Run, "replay", poisoned)
    with pytest.raises(NonFinite, match=r"step 5: the loss is nan; .* is of step 4"):
        trains(**options)
    assert len(graphs) == seen + 1
    done.append(1)
    found = trains(resume=True, **options)
    assert found == pytest.approx(want, rel=1e-4 if DEVICE == "cpu" else 0.1)
    assert len(graphs) == seen + 2


def test_the_commands_refusals(trains, tmp_path):
    for options, words in (
        ({"optimizer": "lamb"}, "--cuda-graph is for --optimizer sgd or adamw"),
        ({"accumulate": 2}, "and --accumulate 1, got sgd and 2"),
        ({"device": "cpu"}, "--cuda-graph needs a GPU, the parameters are on cpu"),
    ):
        with pytest.raises(ValueError, match=words):
            trains(cuda_graph=True, **options)
    assert not (tmp_path / "run").exists()
