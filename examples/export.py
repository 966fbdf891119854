"""A model as a package for C++: exported with fused operations, compiled ahead of time.

examples/cpp/main.cpp runs the package without Python."""

import sys
import tempfile
from pathlib import Path

import torch
import torchvision

import fused_resnet as fr

model = torchvision.models.resnet18(weights=None).eval()
x = torch.randn(2, 3, 224, 224)
program = fr.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
package = torch._inductor.aoti_compile_and_package(
    program, package_path=str(folder / "resnet18.pt2")
)
compiled = torch._inductor.aoti_load_package(package)
with torch.inference_mode():
    print(package, (compiled(x) - model(x)).abs().max().item())
