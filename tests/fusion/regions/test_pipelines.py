"""`fuse` on the models of torchvision, timm, segmentation_models_pytorch and onnx2torch: outputs,
gradients and buffers by the tolerance rule, and every convolution accounted for."""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fused_resnet as fr
from fused_resnet.kernels import native

torchvision = pytest.importorskip("torchvision")
pytestmark = pytest.mark.skipif(native.load() is not None, reason="no native kernels")

slow = pytest.mark.slow


def classifier(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, **options)


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name, pretrained=False, **options)


def segmentation(name: str) -> Callable[[], nn.Module]:
    library = torchvision.models.segmentation
    return lambda: getattr(library, name)(weights=None, weights_backbone=None)


def smp(name: str) -> Callable[[], nn.Module]:
    package = "segmentation_models_pytorch"
    return lambda: getattr(pytest.importorskip(package), name)("resnet18", encoder_weights=None)


def from_onnx() -> nn.Module:
    """A residual network whose norms were folded before it was exported."""
    onnx2torch = pytest.importorskip("onnx2torch")
    pytest.importorskip("onnx")
    helper = importlib.import_module("onnx.helper")
    numpy_helper = importlib.import_module("onnx.numpy_helper")
    torch.manual_seed(0)
    weights = {
        name: torch.randn(shape) * 0.1
        for name, shape in {
            "w0": (16, 3, 3, 3), "b0": (16,), "w1": (16, 16, 3, 3), "b1": (16,),
            "w2": (16, 16, 3, 3), "b2": (16,),
        }.items()
    }  # fmt: skip
    same = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["a"], **same),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w1", "b1"], ["c"], **same),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Conv", ["d", "w2", "b2"], ["e"], **same),
        helper.make_node("Add", ["e", "b"], ["f"]),
        helper.make_node("Relu", ["f"], ["y"]),
    ]
    shape = [None, 3, None, None]
    graph = helper.make_graph(
        nodes, "folded", [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(w.numpy(), name) for name, w in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    return onnx2torch.convert(model)


class Backbone(nn.Module):
    """A DETR-like model: a frozen backbone, a projection, what follows left out."""

    def __init__(self) -> None:
        super().__init__()
        norm = torchvision.ops.misc.FrozenBatchNorm2d
        body = torchvision.models.resnet18(norm_layer=norm)
        getter = torchvision.models._utils.IntermediateLayerGetter
        self.body = getter(body, {"layer3": "c4", "layer4": "c5"})
        self.project = nn.Conv2d(512, 32, 1)

    def forward(self, x: Tensor) -> Any:
        found = self.body(x)
        return self.project(found["c5"]).flatten(2).permute(2, 0, 1), found["c4"]


def extractor() -> nn.Module:
    extraction = importlib.import_module("torchvision.models.feature_extraction")
    return extraction.create_feature_extractor(
        torchvision.models.resnet18(), {"layer2.0.relu_1": "low", "layer4": "high"}
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": classifier("resnet18"),
    "extractor": extractor,
    "detr": Backbone,
    "onnx": from_onnx,
    "resnet26t": timm("resnet26t"),
    "drop path": timm("resnet26d", drop_path_rate=0.2),
    "features only": timm("resnet26d", features_only=True),
    "Unet": smp("Unet"),
}
SLOW: dict[str, Callable[[], nn.Module]] = {
    **{n: classifier(n) for n in (
        "resnet50", "resnext50_32x4d", "wide_resnet50_2", "mobilenet_v2", "densenet121", "vgg11_bn",
        "regnet_y_400mf", "efficientnet_b0")},
    "googlenet": classifier("googlenet", init_weights=False),
    "fcn": segmentation("fcn_resnet50"), "deeplab": segmentation("deeplabv3_resnet50"),
    "FPN": smp("FPN"),
    **{f"timm {n}": timm(n) for n in (
        "resnet50", "resnet50d", "resnetaa50", "seresnet50", "ecaresnet50d", "resnext50_32x4d",
        "resnetv2_50", "wide_resnet50_2")},
}  # fmt: skip
ALL = [*MODELS, *(pytest.param(name, marks=slow) for name in SLOW)]


def calibrated(model: nn.Module) -> nn.Module:
    """With norms like a trained model's, so that no activation vanishes or grows."""
    torch.manual_seed(0)
    for m in model.modules():
        if hasattr(m, "running_var") and m.running_var is not None:
            m.running_var.uniform_(0.5, 2)
            m.running_mean.normal_(0, 0.2)
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None  # the first batch's statistics
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.1
    return model.eval()


def tensors_in(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


# Where the input of a ReLU is within rounding of zero, its mask may differ, in ours or in stock's.
# Measured: 2e-3 of the gradient of resnet50d, where stock's differ nowhere.
MASKS = 5e-3


def rule(mine: list[Tensor], stock: list[Tensor], exact: list[Tensor], floor: float = 1e-6) -> None:
    """The error of all together is at most twice stock's."""
    errors = []
    for found in (mine, stock):
        total = sum((a.double() - e).square().sum() for a, e in zip(found, exact, strict=True))
        errors.append(float(total) ** 0.5)
    size = float(sum(e.square().sum() for e in exact)) ** 0.5
    assert errors[0] <= 2 * errors[1] + floor * size


@pytest.mark.parametrize("name", ALL)
def test_models(name: str) -> None:
    stock = calibrated((MODELS | SLOW)[name]())
    mine, exact = fr.fuse(copy.deepcopy(stock)), copy.deepcopy(stock).double()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        y, want, true = mine(x), stock(x), exact(x.double())
    assert pytree.tree_structure(y) == pytree.tree_structure(want)
    assert [t.stride() for t in tensors_in(y)] == [t.stride() for t in tensors_in(want)]
    rule(tensors_in(y), tensors_in(want), tensors_in(true))
    listed = fr.explain(mine, x)
    assert sum(e.share or 0 for e in listed) == pytest.approx(1)
    assert all(e.fused or e.reason for e in listed)

    x, found = torch.randn(4, 3, 96, 96), []
    for model in (mine, stock, exact):
        model.train()
        torch.manual_seed(1)
        parts = tensors_in(model(x.double() if model is exact else x))
        sum(t.square().mean() for t in parts).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        buffers = [b for b in model.buffers() if b.is_floating_point()]
        found.append(([t.detach() for t in parts], gradients, buffers))
    floors = (1e-6, MASKS, 1e-6)
    for mine_, stock_, exact_, floor in zip(*found, floors, strict=True):
        rule(mine_, stock_, exact_, floor)
        assert [t.stride() for t in mine_] == [t.stride() for t in stock_]


DETECTORS = [
    "fasterrcnn_resnet50_fpn",
    *(pytest.param(n, marks=slow) for n in (
        "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn",
        "retinanet_resnet50_fpn", "fcos_resnet50_fpn")),
]  # fmt: skip


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(name: str) -> None:
    """Boxes, and gradients of the backbone and of a step."""
    torch.manual_seed(0)
    build = getattr(torchvision.models.detection, name)
    stock = build(weights=None, weights_backbone=None, min_size=96, max_size=96, num_classes=3)
    for m in stock.modules():
        if hasattr(m, "running_var"):
            m.running_var.uniform_(0.5, 2)
            m.running_mean.normal_(0, 0.2)
    mine = fr.fuse(copy.deepcopy(stock.eval()))
    images = [torch.rand(3, 96, 96), torch.rand(3, 80, 96)]
    with torch.no_grad():
        for a, b in zip(mine(images), stock(images), strict=True):
            assert a.keys() == b.keys()
            assert len(a["scores"]) == len(b["scores"])
            if len(b["scores"]):
                torch.testing.assert_close(a["scores"][:5], b["scores"][:5], rtol=1e-3, atol=1e-4)
    listed = fr.explain(mine, images)
    assert sum(e.share or 0 for e in listed) == pytest.approx(1)
    assert sum(e.share or 0 for e in listed if e.fused) > 0.9

    mine.train(), stock.train()
    exact, found = copy.deepcopy(stock).double(), []
    x = torch.rand(2, 3, 96, 96)
    for model in (mine, stock, exact):
        features = list(model.backbone(x.double() if model is exact else x).values())
        sum(t.square().mean() for t in features).backward()
        gradients = [p.grad for p in model.backbone.parameters() if p.grad is not None]
        found.append(([t.detach() for t in features], gradients))
    for parts in zip(*found, (1e-6, MASKS), strict=True):
        rule(*parts)
    targets = [
        {"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([1]),
         "masks": torch.ones(1, *t.shape[1:], dtype=torch.uint8),
         "keypoints": torch.full((1, 17, 3), 20.0)}
        for t in images
    ]  # fmt: skip
    losses = mine(images, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("name", ["quantization", "video"])
def test_models_that_are_left_alone(name: str) -> None:
    if name == "video":
        stock, x = torchvision.models.video.r3d_18(), torch.randn(1, 3, 4, 32, 32)
    else:
        stock, x = (
            torchvision.models.quantization.resnet18(quantize=False),
            torch.randn(1, 3, 32, 32),
        )
    mine = fr.fuse(copy.deepcopy(stock.eval()))
    with torch.no_grad():
        torch.testing.assert_close(mine(x), stock(x), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_averages_of_weights() -> None:
    """torch.optim.swa_utils, and a hand-written average through `.data`."""
    stock = calibrated(torchvision.models.resnet18(num_classes=4))
    mine = fr.fuse(copy.deepcopy(stock))
    averaged = torch.optim.swa_utils.AveragedModel(mine)
    ema, x = copy.deepcopy(mine), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        for average in (averaged, ema):
            average.eval()(x)
        for p in mine.parameters():
            p.mul_(0.9)
        averaged.update_parameters(mine)
        for a, b in zip(ema.parameters(), mine.parameters(), strict=True):
            a.data.mul_(0.5).add_(b.data, alpha=0.5)
        for average in (averaged.module, ema):
            want = copy.deepcopy(stock)
            want.load_state_dict(average.state_dict())
            torch.testing.assert_close(average(x), want(x), rtol=1e-3, atol=1e-4)
        torch.optim.swa_utils.update_bn([x], averaged)
        torch.testing.assert_close(
            averaged.eval()(x), fr.unfuse(copy.deepcopy(averaged)).eval()(x), rtol=1e-3, atol=1e-4
        )


def test_as_the_family_bit_by_bit() -> None:
    """torchvision's ResNet, fused, computes what ours does."""
    ours = calibrated(fr.resnet18(num_classes=8))
    theirs = torchvision.models.resnet18(num_classes=8)
    theirs.load_state_dict(ours.state_dict())
    mine, x = fr.fuse(theirs.eval()), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(mine(x), ours(x))
    for model in (mine, ours):
        model.train()(x).square().sum().backward()
    for a, b in zip(mine.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(mine.buffers(), ours.buffers(), strict=True):
        assert torch.equal(a, b)


def test_a_saved_model_is_stock_s_file() -> None:
    model = torchvision.models.resnet18(num_classes=4)
    files = []
    for m in (model, fr.fuse(model)):
        files.append(io.BytesIO())
        torch.save(m.state_dict(), files[-1])
    assert files[0].getvalue() == files[1].getvalue()
