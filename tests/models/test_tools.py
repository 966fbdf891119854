"""Tools that read, script, count and explain models."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet as fr
from tests.models.model_helpers import agree, both_ways, fused, images, pair

extraction = pytest.importorskip("torchvision.models.feature_extraction")


@both_ways
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "grouped"])
def test_scripting_a_traced_graph(kind):
    """TorchScript reads annotations that torch.fx copied into the graph."""
    stock, mine = pair(kind)
    graphs = [
        torch.jit.script(extraction.create_feature_extractor(m, {"layer2": "low", "fc": "out"}))
        for m in (stock, mine)
    ]
    with torch.no_grad():
        want, got = (graph(images()) for graph in graphs)
    for key in ("low", "out"):
        agree(got[key], want[key])


def test_scripting_the_other_families():
    for model in (fr.cifar_resnet(20), fr.cifar_resnet(20, block="preact")):
        graph = torch.fx.symbolic_trace(model.eval())
        with torch.no_grad():
            agree(torch.jit.script(graph)(images(2, 32)), model(images(2, 32)))


@both_ways
def test_flops_of_models_are_stock_s():
    counts = []
    for model in pair("basic"):
        with FlopCounterMode(display=False) as counter:
            model.train()(images()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_flops_of_the_op():
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    weight = torch.randn(32, 16, 3, 3, requires_grad=True)
    counts = []
    for run in (
        lambda: fr.conv_bn_relu(x, weight, torch.ones(32), torch.zeros(32), padding=1),
        lambda: torch.conv2d(x, weight, None, 1, 1),
    ):
        with FlopCounterMode(display=False) as counter:
            run().sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@both_ways
def test_explain_answers_for_the_call():
    _, mine = pair("basic")
    x = images()
    assert {e.path for e in fr.explain(mine)} == {"inference"}
    assert {e.path for e in fr.explain(mine, x)} == {"training"}
    with torch.no_grad():
        assert {e.path for e in fr.explain(mine, x)} == {"inference"}
        (reason,) = {e.reason for e in fr.explain(mine, x.double())}
        assert "float64" in reason
        (reason,) = {e.reason for e in fr.explain(mine, x[0])}
        assert "x must be a dense, non-empty 4-D tensor" in reason
        with FlopCounterMode(display=False):
            (reason,) = {e.reason for e in fr.explain(mine, x)}
        assert reason == "a TorchDispatchMode is active"
        with fr.use_backend("reference"):
            assert not any(e.fused for e in fr.explain(mine, x))
    assert {e.path for e in fr.explain(mine.train(), x)} == {"training"}


def _detectron(key: str) -> str:
    def stage(m: re.Match) -> str:
        kind = {"conv": f"conv{m[4]}", "bn": f"conv{m[4]}.norm", "downsample.": "shortcut"}[m[3]]
        if m[3] == "downsample." and m[4] == "1":
            kind = "shortcut.norm"
        return f"res{int(m[1]) + 1}.{m[2]}.{kind}"

    key = re.sub(r"^layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)", stage, key)
    key = re.sub(r"^conv1", "stem.conv1", key)
    key = re.sub(r"^bn1", "stem.conv1.norm", key)
    return "backbone.bottom_up." + re.sub(r"^fc", "linear", key)


def _caffe2(key: str) -> str:
    def stage(m: re.Match) -> str:
        branch = "1" if m[3] == "downsample." else "2" + "abc"[int(m[4]) - 1]
        norm = "_bn" if m[3] == "bn" or (m[3] == "downsample." and m[4] == "1") else ""
        return f"res{int(m[1]) + 1}_{m[2]}_branch{branch}{norm}"

    key = re.sub(r"^layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)", stage, key)
    key = re.sub(r"^bn1", "res_conv1_bn", key).replace("fc.", "fc1000.")
    scale = "s" if "_bn" in key else "w"
    for ours, theirs in (
        ("weight", scale),
        ("bias", "b"),
        ("running_mean", "rm"),
        ("running_var", "riv"),
    ):
        key = key.replace(f".{ours}", f"_{theirs}")
    return key


@pytest.mark.parametrize("names", [_detectron, _caffe2])
@pytest.mark.parametrize("statistics", [True, False])
def test_checkpoints_of_other_projects(names, statistics, tmp_path):
    model = fr.resnet50(num_classes=7)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                for t in (
                    m.weight,
                    m.bias,
                    *([m.running_mean, m.running_var] if statistics else []),
                ):
                    t.uniform_(0.5, 1.5)
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    saved = {names(k): v for k, v in state.items() if statistics or "running" not in k}
    assert len(saved) == (267 if statistics else 161)
    torch.save({"model": {f"module.{k}": v for k, v in saved.items()}}, tmp_path / "other.pth")
    loaded = fr.load_checkpoint(tmp_path / "other.pth")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


def test_checkpoints_with_prefixes(tmp_path):
    state = fr.resnet18().state_dict()
    for content in (state, {"state_dict": {f"module.{k}": v for k, v in state.items()}}):
        torch.save(content, tmp_path / "x.pth")
        loaded = fr.load_checkpoint(tmp_path / "x.pth")
        assert all(torch.equal(loaded[k], v) for k, v in state.items())
    with pytest.raises(ValueError, match="is not a file"):
        fr.load_checkpoint(tmp_path / "none.pth")
    _, mine = pair("basic")
    assert all(fused(mine))
