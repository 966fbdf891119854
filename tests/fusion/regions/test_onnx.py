"""torch.onnx.export of fused models gives the portable graph of their own forwards."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.kernels import native
from tests.fusion.regions.region_helpers import calibrated, programs
from tests.fusion.regions.zoo import MODELS
from tests.models.model_helpers import agree, images, pair

onnx = pytest.importorskip("onnx")
reference = pytest.importorskip("onnx.reference")
pytestmark = [
    pytest.mark.skipif(native.load() is not None, reason="no native kernels"),
    pytest.mark.filterwarnings("ignore"),
]


def network() -> tuple[nn.Module, torch.Tensor]:
    return pair("bottleneck")[0], images(1, 32)


def own() -> tuple[nn.Module, torch.Tensor]:
    return calibrated(MODELS["residual"]()), torch.randn(1, 16, 8, 8)


@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "torch.export"])
@pytest.mark.parametrize("make", [network, own])
def test_export(make: Any, dynamo: bool) -> None:
    if dynamo:
        pytest.importorskip("onnxscript", reason="the exporter by torch.export needs it")
    stock, x = make()
    mine = fr.fuse(copy.deepcopy(stock))
    with torch.no_grad():
        want = mine(x)
    assert programs(mine)  # the model was fused before its export
    kinds = []
    for model in (stock, mine):
        file = io.BytesIO()
        if dynamo:
            torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(file)
        else:
            torch.onnx.export(model, (x,), file, dynamo=False)
        exported = onnx.load_from_string(file.getvalue())
        onnx.checker.check_model(exported)
        assert {node.domain for node in exported.graph.node} == {""}
        kinds.append([node.op_type for node in exported.graph.node])
    assert kinds[0] == kinds[1] and "Conv" in kinds[1]
    feed = {exported.graph.input[0].name: x.numpy()}
    (got,) = reference.ReferenceEvaluator(exported).run(None, feed)
    agree(torch.from_numpy(got), want)
    with torch.no_grad():
        agree(mine(x), want)


def test_quick_runtime_agrees() -> None:
    """ONNX Runtime, where it is installed, on the graph of a fused network."""
    runtime = pytest.importorskip("onnxruntime")
    stock, x = network()
    mine, file = fr.fuse(stock), io.BytesIO()
    torch.onnx.export(mine, (x,), file, dynamo=False)
    session = runtime.InferenceSession(file.getvalue())
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        agree(torch.from_numpy(got), mine(x))
