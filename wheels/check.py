"""Smoke test of an installed fused_resnet: what it imports, says and computes. Needs torch alone.

python check.py --kernels yes   # or no: the pure wheel
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

IMPORT_LIMIT_S = 0.060  # of the package, over torch's own


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def check_import() -> None:
    """Cheap, and without threads or CUDA."""
    script = (
        "import time, os, torch\n"
        "tasks = len(os.listdir('/proc/self/task'))\n"
        "start = time.process_time()\n"  # a busy machine must not count
        "import fused_resnet\n"
        "print(time.process_time() - start)\n"
        "assert len(os.listdir('/proc/self/task')) == tasks, 'the import started a thread'\n"
        "assert not torch.cuda.is_initialized(), 'the import initialised CUDA'\n"
    )
    times = [
        float(subprocess.check_output([sys.executable, "-c", script], text=True)) for _ in range(5)
    ]
    print(
        f"import: {min(times) * 1e3:.0f} ms of processor over torch's own (fastest of {len(times)})"
    )
    assert min(times) < IMPORT_LIMIT_S, f"import took {sorted(times)} s"


def check_library(wanted: str) -> None:
    import fused_resnet as fr
    from fused_resnet.kernels import native

    print("kernels:", native.load() or native.build_info())
    assert (native.load() is None) == (wanted == "yes"), native.load()
    info = fr.info()
    assert info["versions"]["torch"] == torch.__version__
    if importlib.util.find_spec("typer") and importlib.util.find_spec("rich"):
        command = [sys.executable, "-m", "fused_resnet.cli", "info"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert torch.__version__ in text, text
    if wanted == "no":
        return
    try:
        torch.ops.fused_resnet_native.add_relu(torch.ones(1, 1, 1, 1), torch.ones(2))
    except RuntimeError as error:  # an exception of the library, through libtorch
        assert str(error).startswith("add_relu: residual must have x's shape"), error
    else:
        raise AssertionError("a wrong shape was accepted")


def check_ops() -> None:
    """By the project's tolerance: twice stock's error against float64, plus one rounding."""
    import fused_resnet as fr
    from fused_resnet.testing import assert_close

    torch.manual_seed(0)
    functional = torch.nn.functional
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 32, 14, 14).to(dtype).contiguous(memory_format=torch.channels_last)
        residual = torch.randn_like(x)
        exact = torch.relu(x.double() + residual.double())
        assert_close(fr.add_relu(x, residual), torch.relu(x + residual), exact)
        exact = torch.relu(functional.batch_norm(x.double(), None, None, training=True))
        stock = torch.relu(functional.batch_norm(x, None, None, training=True))
        assert_close(fr.bn_add_relu(x)[0], stock, exact)


def check_models(wanted: str) -> None:
    import fused_resnet as fr
    from fused_resnet.kernels import registry
    from fused_resnet.testing import assert_parity, matched_models

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        images = torch.randn(2, 3, 96, 96)
        model, stock = matched_models("resnet18", images)
        assert_parity(model, stock, images, dtype=dtype)
    serving = registry.choose("conv_bn_relu", "cpu")
    print("ResNet-18: parity in float32 and bfloat16, convolutions by", serving)
    if wanted == "yes" and platform.machine() == "x86_64":
        assert serving == "native", serving
    model = fr.resnet18(num_classes=4).train()
    before = threads()
    torch.set_num_threads(1)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert threads() <= before + 1, "torch.set_num_threads(1) is not honoured"  # autograd's own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", choices=["yes", "no"], required=True)
    wanted = parser.parse_args().kernels
    compilers = [
        name for name in ("cc", "gcc", "g++", "c++", "clang", "nvcc") if shutil.which(name)
    ]
    assert not compilers, f"on PATH: {compilers}"
    import fused_resnet

    place = Path(fused_resnet.__file__).parent
    assert sys.prefix in str(place), f"not the installed package, but {place}"
    vision = importlib.util.find_spec("torchvision") is not None
    print(f"Python {platform.python_version()}, torch {torch.__version__}, torchvision: {vision}")
    start = time.perf_counter()
    check_import()
    check_library(wanted)
    check_ops()
    check_models(wanted)
    print(f"passed in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
