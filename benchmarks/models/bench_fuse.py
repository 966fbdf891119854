"""`fuse` on other people's models: time of a call or training step over the better stock layout.

    python benchmarks/models/bench_fuse.py --out benchmarks/results [--only resnet50 ...]

Contenders take turns, in this process: the model as it is (contiguous), in channels_last, and fused
(contiguous, as it is). Norms have random statistics. A training step is forward, backward of the
outputs' mean square (of the losses, for a detector), without an optimizer.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fused_resnet as fr
from fused_resnet.bench import machine
from fused_resnet.bench.harness import pair_ratio, write_json

CLASSIFIERS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
               "wide_resnet50_2"]  # fmt: skip
OTHERS = ["mobilenet_v2", "densenet121", "googlenet", "vgg11_bn", "regnet_y_400mf",
          "efficientnet_b0"]  # fmt: skip
TIMM = ["resnet50", "resnet50d", "resnet26t", "resnetaa50", "seresnet50", "ecaresnet50d",
        "resnext50_32x4d", "resnetv2_50", "wide_resnet50_2"]  # fmt: skip
NAMES = [
    *(f"torchvision:{n}" for n in (*CLASSIFIERS, "deeplabv3_resnet50", "fasterrcnn_resnet50_fpn")),
    *(f"timm:{n}" for n in TIMM), "smp:Unet-resnet34", *(f"torchvision:{n}" for n in OTHERS),
]  # fmt: skip
TRAINED = ["torchvision:resnet50", "timm:resnet50", "torchvision:fasterrcnn_resnet50_fpn"]


def build(name: str) -> nn.Module:
    library, _, model = name.partition(":")
    if library == "timm":
        return importlib.import_module("timm").create_model(model, pretrained=False)
    if library == "smp":
        package = importlib.import_module("segmentation_models_pytorch")
        kind, _, encoder = model.partition("-")
        return getattr(package, kind)(encoder, encoder_weights=None)
    models = importlib.import_module("torchvision.models")
    options: dict[str, Any] = {"weights": None}
    if model == "fasterrcnn_resnet50_fpn":  # as with trained weights: frozen norms
        utils = importlib.import_module("torchvision.models.detection.backbone_utils")
        backbone = utils.resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, trainable_layers=3
        )
        return models.detection.FasterRCNN(backbone, 91, min_size=320, max_size=320)
    if "deeplab" in model:
        options["weights_backbone"] = None
    if model == "googlenet":
        options["init_weights"] = False
    return models.get_model(model, **options)


def channels_last(value: Any) -> Any:
    return pytree.tree_map(
        lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t, value
    )


def inputs_of(name: str, dtype: torch.dtype) -> Any:
    if "rcnn" in name:
        return [torch.rand(3, 320, 320, dtype=dtype)]
    return torch.randn(4, 3, 160, 160, dtype=dtype)


def infer(model: nn.Module, x: Any) -> None:
    with torch.no_grad():
        model(x)


def train(model: nn.Module, x: Any) -> None:
    torch.manual_seed(0)
    if isinstance(x, list):
        target = {"boxes": torch.tensor([[10.0, 10.0, 90.0, 90.0]]), "labels": torch.tensor([1])}
        loss = sum(model(x, [target]).values())
    else:
        found = [t for t in pytree.tree_leaves(model(x)) if isinstance(t, Tensor)]
        loss = sum(t.square().mean() for t in found)
    assert isinstance(loss, Tensor)
    loss.backward()
    model.zero_grad()


def measure(name: str, dtype: torch.dtype, mode: str, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    stock = build(name)
    for m in stock.modules():
        if getattr(m, "running_var", None) is not None:
            m.running_var.uniform_(0.5, 2)
    stock = stock.to(dtype).train(mode == "train")
    x = inputs_of(name, dtype)
    last = copy.deepcopy(stock).to(memory_format=torch.channels_last)
    contenders: dict[str, tuple[nn.Module, Any]] = {
        "contiguous": (stock, x), "channels_last": (last, channels_last(x)),
        "fused": (fr.fuse(copy.deepcopy(stock), inplace=True), x),
    }  # fmt: skip
    if name == "torchvision:resnet50":
        ours = fr.resnet50().to(dtype).train(mode == "train")
        ours.load_state_dict(stock.state_dict())
        contenders["fused_resnet"] = (ours, x)
    call: Callable[[nn.Module, Any], None] = train if mode == "train" else infer
    times: dict[str, list[float]] = {key: [] for key in contenders}
    for turn in range(rounds + 2):  # the first two warm up
        for key, (model, value) in contenders.items():
            begin = time.perf_counter()
            call(model, value)
            if turn >= 2:
                times[key].append(1e3 * (time.perf_counter() - begin))
    gc.collect()
    return {"name": name, "dtype": str(dtype)[6:], "mode": mode, "times_ms": times}


def better_layout(times: dict[str, list[float]]) -> str:
    return min(("contiguous", "channels_last"), key=lambda key: statistics.median(times[key]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results file")
    parser.add_argument("--only", nargs="*", help="names that contain one of these")
    parser.add_argument("--mode", nargs="*", default=["infer", "train"])
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {**machine.provenance("fuse", "cpu"), "fuse": []}
    for mode in args.mode:
        for dtype in args.dtype if mode == "infer" else ["float32"]:
            for name in NAMES if mode == "infer" else TRAINED:
                if args.only and not any(part in name for part in args.only):
                    continue
                if dtype != "float32" and "rcnn" in name:
                    continue  # stock's detectors compute boxes in float32
                case = measure(name, getattr(torch, dtype), mode, args.rounds)
                results["fuse"].append(case)
                times = case["times_ms"]
                better = better_layout(times)
                ratio, spread = pair_ratio(times["fused"], times[better])
                print(f"{name:36s} {dtype:9s} {mode:6s} fused / {better}: {ratio:.2f} "
                      f"± {spread / 2:.2f}", flush=True)  # fmt: skip
    file = args.out / f"fuse-cpu-torch{torch.__version__.split('+')[0]}.json"
    print(write_json(results, str(file)))


if __name__ == "__main__":
    main()
