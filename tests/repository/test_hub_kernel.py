"""The layout of Hugging Face's Kernel Hub: build.toml and torch-ext/, by its documented
requirements."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.kernels import native
from fused_resnet.testing import assert_close
from tests import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not in a checkout")
PACKAGE = ROOT / "torch-ext" / "fused_resnet"
LICENCES = {"Apache-2.0", "MIT", "BSD-3-Clause"}
VARIANT = r"torch\d{2,3}-cxx11-cpu-(x86_64|aarch64)-linux"


@pytest.fixture(scope="module")
def settings():
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "build.toml").read_text())


def test_build_toml_says_what_the_builder_asks_for(settings):
    general, (kernel,) = settings["general"], settings["kernel"].values()
    assert {"name", "version", "license", "backends"} <= set(general)
    assert general["license"] in LICENCES and isinstance(general["version"], int)
    assert (
        general["backends"] == ["cpu"] == [kernel["backend"]] == [*settings["torch"]["stable-abi"]]
    )
    assert settings["torch"]["stable-abi"]["cpu"] == "2.11"
    # The Python package has the kernel's name.
    assert PACKAGE.name == general["name"].replace("-", "_") and (PACKAGE / "__init__.py").exists()
    allowed = {"backend", "depends", "src", "include", "cxx-flags"}
    assert {"backend", "depends", "src"} <= set(kernel) <= allowed
    # All sources and headers of the CPU kernels, and nothing that knows of CUDA.
    files = {
        str(f.relative_to(ROOT))
        for pattern in ("csrc/cpu/**/*.cpp", "csrc/cpu/**/*.h", "csrc/*.h")
        for f in ROOT.glob(pattern)
    }
    assert set(kernel["src"]) == files
    assert all((ROOT / f).exists() for f in settings["torch"]["src"])
    included = {
        name
        for f in files
        for name in re.findall(r'^#include "(.+)"', (ROOT / f).read_text(), re.M)
    }
    assert {f"csrc/{name}" for name in included} <= files


def test_the_variants_of_a_build(settings):
    """What the builder calls them; one for each torch, from the oldest on."""
    oldest = settings["torch"]["stable-abi"]["cpu"].replace(".", "")
    for cpu in ("x86_64", "aarch64"):
        assert re.fullmatch(VARIANT, f"torch{oldest}-cxx11-cpu-{cpu}-linux")
    assert not re.fullmatch(VARIANT, "torch211-cxx98-cpu-x86_64-linux")


def test_ops_are_registered_under_the_builds_own_name(settings):
    """Two builds can be in one process: the namespace is a macro, which this flag replaces."""
    (kernel,) = settings["kernel"].values()
    assert "-Dfused_resnet_native=TORCH_EXTENSION_NAME" in kernel["cxx-flags"]
    text = "".join((ROOT / f).read_text() for f in kernel["src"])
    assert set(re.findall(r"STABLE_TORCH_LIBRARY\w*\((\w+)", text)) == {"fused_resnet_native"}
    if shutil.which("g++") is None:
        return
    source = "#define FRAGMENT(ns, m) INNER(ns, m, 1)\n#define INNER(ns, m, uid) #ns\n"
    source += "FRAGMENT(fused_resnet_native, m)\n"
    flags = ["-E", "-P", "-Dfused_resnet_native=TORCH_EXTENSION_NAME", "-DTORCH_EXTENSION_NAME=_a1"]
    run = subprocess.run(
        ["g++", *flags, "-x", "c++", "-"], input=source, capture_output=True, text=True
    )
    assert run.stdout.strip() == '"_a1"', run.stderr


def test_the_python_code_imports_itself_relatively_and_torch_alone():
    standard = sys.stdlib_module_names
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(), feature_version=(3, 9))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            for name in names:
                assert name.split(".")[0] in {"torch", *standard}, (file, name)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """The package as the builder makes it: under a unique name, with its `_ops`."""
    if native.load() is not None:
        pytest.skip(str(native.load()))
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(PACKAGE, folder / "fused_resnet_a1b2c3")
    ops = "import torch\nops = torch.ops.fused_resnet_native\n"
    (folder / "fused_resnet_a1b2c3" / "_ops.py").write_text(ops)
    sys.path.insert(0, str(folder))
    try:
        import fused_resnet_a1b2c3

        yield fused_resnet_a1b2c3
    finally:
        sys.path.remove(str(folder))


def test_layers_are_pure(kernel):
    """No state, no constructor, no method but forward, two class variables at most."""
    layers = [v for v in vars(kernel.layers).values() if isinstance(v, type) and v is not nn.Module]
    layers = [v for v in layers if issubclass(v, nn.Module)]
    assert {layer.__name__ for layer in layers} == {"BasicBlock", "Bottleneck"}
    assert "layers" in kernel.__all__
    for layer in layers:
        own = {name for name in vars(layer) if not name.startswith("__")}
        assert own <= {"forward", "has_backward", "can_torch_compile"}, own
        assert "__init__" not in vars(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("stride", [1, 2])
def test_layers_compute_what_the_blocks_do(kernel, name, stride, dtype, monkeypatch):
    torch.manual_seed(0)
    layer, kind = getattr(kernel.layers, name), getattr(fr, name)
    wide = 16 * kind.expansion
    downsample = nn.Sequential(nn.Conv2d(wide, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))
    block = kind(wide, 16, stride, downsample if stride == 2 else None).eval()
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
    x = torch.randn(2, wide, 9, 9).to(dtype)
    seen = []
    functional = sys.modules[kernel.add_relu.__module__]

    class Ops:
        def __getattr__(self, op):
            seen.append(op)
            return getattr(torch.ops.fused_resnet_native, op)

    monkeypatch.setattr(functional, "ops", Ops())
    block.to(dtype)
    with torch.no_grad(), fr.use_backend("reference"):
        got = layer.forward(block, x)
        exact = block.double()(x.double())
        stock = block.to(dtype)(x)
    assert_close(got, stock, exact)
    assert seen == ["bn_apply"] * (2 if name == "BasicBlock" else 3)
    seen.clear()
    block.train()  # what is not served is PyTorch's
    layer.forward(block, x)
    assert not seen


def test_add_relu(kernel):
    x, residual = torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(kernel.add_relu(x, residual), torch.relu(x + residual))
    double = kernel.add_relu(x.double(), residual)
    torch.testing.assert_close(double, torch.relu(x.double() + residual))
