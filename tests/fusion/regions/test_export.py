"""`export`: graphs with packed weights against the models they were made from."""

from __future__ import annotations

import copy
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import fused_resnet as fr
from fused_resnet.fusion.description import recipe_of
from fused_resnet.fusion.inference.make import plan_for
from fused_resnet.kernels import library, native
from fused_resnet.kernels.cpu import fakes
from tests import ROOT
from tests.fusion.regions.region_helpers import Residual, calibrated, conv, outputs_agree
from tests.fusion.regions.zoo import MODELS
from tests.models.model_helpers import agree, images, pair, randomise

pytestmark = pytest.mark.skipif(native.load() is not None, reason="no native kernels")
ANY = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}


def targets(program: Any) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "name", [m for m in MODELS if m not in ("data-dependent", "no statistics")]
)
def test_any_model(name: str, dynamic: bool) -> None:
    model = calibrated(MODELS[name]())
    x = torch.randn(3, 16, 12, 10)
    program = fr.export(model, (x,), dynamic_shapes=(ANY,) if dynamic else None)
    assert any("fused_resnet" in t for t in targets(program))
    sizes = [(3, 16, 12, 10)] + [(2, 16, 8, 14)] * (dynamic and name != "keywords")
    for size in sizes:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(size).contiguous(memory_format=layout)
            before = x.clone()
            with torch.no_grad():
                found, want = program.module()(x), model(x)
            if layout == torch.contiguous_format:
                outputs_agree(found, want)
            assert torch.equal(x, before)


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "grouped"])
def test_networks(kind: str, ours: bool) -> None:
    """A residual network is one operation: stem, pooling, all blocks."""
    stock, mine = pair(kind)
    model = mine if ours else stock
    shapes = ({0: Dim("batch", max=8)},)
    program = fr.export(model, (images(),), dynamic_shapes=shapes)
    for count in (1, 2, 5):
        with torch.no_grad():
            agree(program.module()(images(count)), stock(images(count)))
    called = [t for t in targets(program) if "fused_resnet" in t]
    if kind != "grouped":
        assert called == ["fused_resnet_native.block_inference.default"]
        assert not any("convolution" in t or "conv2d" in t for t in targets(program))


def test_large_batches_run_in_parts() -> None:
    """As uncompiled, so that activations stay in the cache."""
    _, model = pair()
    x = images(12, 160)
    program = fr.export(model, (x,))
    assert "aten.split.Tensor" in targets(program)
    with torch.no_grad():
        agree(program.module()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    """By the tolerance rule, against float64."""
    stock, _ = pair("bottleneck")
    exact, model = copy.deepcopy(stock).double(), copy.deepcopy(stock).to(dtype)
    x = images().to(dtype)
    program = fr.export(model, (x,))
    with torch.no_grad():
        want, theirs, found = exact(x.double()), model(x), program.module()(x)
    assert found.dtype == dtype
    allowed = 2 * (theirs - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
    assert (found - want).abs().max() <= allowed


def test_weights_are_constants() -> None:
    model = calibrated(Residual())
    x = torch.randn(1, 16, 8, 8)
    program = fr.export(model, (x,))
    with torch.no_grad():
        want = model(x)
        model.first.weight.zero_()
        agree(program.module()(x), want)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    agree(torch.export.load(file).module()(x), want)


def test_in_another_process(tmp_path: Path) -> None:
    """PyTorch reads the file where the operations are loaded, and raises where they are not."""
    model, x = calibrated(Residual()), torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "x.pt")
    torch.export.save(fr.export(model, (x,)), tmp_path / "model.pt2")
    script = (
        f"import torch; {{}}; x, want = torch.load(r'{tmp_path}/x.pt')\n"
        f"model = torch.export.load(r'{tmp_path}/model.pt2').module()\n"
        "torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)"
    )
    load = "from fused_resnet.kernels import native; assert native.load() is None"
    for prepare, fails in (("pass", True), (load, False)):
        command = [sys.executable, "-c", script.format(prepare)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert (run.returncode != 0) == fails, run.stderr
        assert not fails or "RuntimeError" in run.stderr


def test_what_is_refused() -> None:
    x = torch.randn(1, 16, 8, 8)
    for model, args, reason in (
        (Residual(), (x,), "a norm is in training mode; call model.eval() first"),
        (nn.Linear(4, 4), (torch.randn(2, 4),), "args hold no image (N, C, H, W)"),
        (calibrated(Residual()).double(), (x.double(),), "no fused convolution supports"),
        (
            nn.Sequential(conv(16, 16), nn.BatchNorm2d(16, track_running_stats=False)).eval(),
            (x,),
            "batch norm uses batch statistics",
        ),
    ):
        with pytest.raises(ValueError, match=rf"^export: .*{re.escape(reason)}"):
            fr.export(model, args)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"^export: .*an addition has another dtype"),
    ):
        fr.export(calibrated(Residual()), (x,))
    with (
        fr.use_backend("reference"),
        pytest.raises(ValueError, match=r"^export: the reference backend is forced"),
    ):
        fr.export(calibrated(Residual()), (x,))


class Aliases(nn.Module):
    """Reads values whose memory is written afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(16, 16), conv(16, 16)
        self.norm, self.first = nn.BatchNorm2d(16), Residual()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(self.first(x)))
        view = y.view(y.shape[0], -1)
        y += 1
        z = self.b(y)
        y *= 2  # what the convolution has read
        return F.relu(self.norm(z)).flatten(1) + view


def test_writes_in_place() -> None:
    model, x = calibrated(Aliases()), torch.randn(2, 16, 8, 8)
    program = fr.export(model, (x,))
    with torch.no_grad():
        agree(program.module()(x), model(x))


def test_shapes_without_data() -> None:
    """The ops' fakes say what the ops return."""
    fakes.register()
    ops = torch.ops.fused_resnet_native
    block = randomise(fr.Bottleneck(64, 64, 2, nn.Sequential(
        nn.Conv2d(64, 256, 1, 2, bias=False), nn.BatchNorm2d(256)
    ))).eval()  # fmt: skip
    for conv_, size in ((nn.Conv2d(3, 64, 7, 2, 3), 3), (nn.Conv2d(64, 32, 3, 1, 2, 2), 64)):
        *tensors, geometry = ops.pack_convolution(
            conv_.weight.detach(), torch.ones(conv_.out_channels), torch.zeros(conv_.out_channels),
            conv_.stride, conv_.padding, conv_.dilation, 1,
        )  # fmt: skip
        x = torch.randn(2, size, 21, 17).contiguous(memory_format=torch.channels_last)
        for flag in (0, 1):
            torch.library.opcheck(
                ops.conv_bn_relu.default, (x, *tensors, None, False, flag, geometry),
                test_utils=("test_schema", "test_faketensor"),
            )  # fmt: skip
    plan: Any = plan_for(block, recipe_of(block)[0], torch.float32, torch.device("cpu"))
    x = torch.randn(2, 64, 9, 7).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(
        ops.block_inference.default, (x, *plan._alone._operands, False),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    torch.library.opcheck(
        ops.max_pool2d.default, (x, [3, 3], [2, 2], [1, 1]),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.slow
def test_ahead_of_time(tmp_path: Path) -> None:
    """AOTInductor's package, by Python and by a C++ program without Python."""
    _, model = pair()
    program = fr.export(model, (images(),), dynamic_shapes=({0: Dim("batch", max=8)},))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    run = torch._inductor.aoti_load_package(package)
    for count in (1, 3):
        with torch.no_grad():
            agree(run(images(count)), model(images(count)))
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    torch_at = Path(torch.__file__).parent
    build = tmp_path / "build"
    source = ROOT / "examples" / "cpp"
    for command in (
        ["cmake", "-S", source, "-B", build, f"-DTORCH={torch_at}"],
        ["cmake", "--build", build],
    ):
        subprocess.run(command, check=True, capture_output=True)
    x = images(3)
    (tmp_path / "x").write_bytes(x.numpy().tobytes())
    called = [build / "run", package, library.FILE, tmp_path / "x", *map(str, x.shape)]
    environment = {"PATH": "/nowhere"}
    found = subprocess.run(called, check=True, capture_output=True, text=True, env=environment)
    with torch.no_grad():
        want = model(x)
    agree(torch.tensor([float(v) for v in found.stdout.split()]).view_as(want), want)
    called[2] = tmp_path / "none.so"
    failed = subprocess.run(called, capture_output=True, text=True, env=environment)
    assert failed.returncode == 1 and "none.so" in failed.stderr
