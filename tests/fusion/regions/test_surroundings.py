"""What surrounds a model changed by `fuse`: meta and fake tensors, machines without kernels or with
one core, tensors beyond 2^31 elements, checkpoints and images that are damaged."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.kernels import native
from fused_resnet.parity.checkpoint import CheckpointError, load_checkpoint, load_into
from tests.fusion.regions.region_helpers import Residual, calibrated, programs
from tests.models.model_helpers import agree, images, pair, randomise, same_outputs, same_step

needs_kernels = pytest.mark.skipif(native.load() is not None, reason="no native kernels")
tv = pytest.importorskip("torchvision.models")


def fused_pair(kind: str = "basic", **options: Any) -> tuple[nn.Module, nn.Module]:
    """torchvision's network, and the same changed by `fuse`, with weights of its own."""
    stock, _ = pair(kind, **options)
    return stock, fr.fuse(copy.deepcopy(stock), inplace=True)


# --- meta and fake tensors (row 40) ---


def facts(t: Any) -> Any:
    if t is None:
        return None
    strides = [t.stride(d) for d in range(t.dim()) if t.shape[d] > 1]
    return t.shape, t.dtype, strides, t.device, t.requires_grad


def step_facts(model: nn.Module, x: Tensor) -> list[Any]:
    """Of outputs in all modes, gradients and buffers."""
    found = []
    for training in (False, True):
        model.train(training).zero_grad()
        x = x.detach().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        tensors = [y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]
        found += [facts(t) for t in tensors]
        with torch.no_grad():
            found.append(facts(model(x)))
    return found


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("called", [False, True])
def test_meta_tensors(layout, called) -> None:
    """Also of a model that ran before it was moved there."""
    stock, mine = fused_pair()
    x = images(3, 40).contiguous(memory_format=layout)
    if called:
        same_outputs(stock, mine, x)
        same_step(stock.train(), mine.train(), x)
    want, real = step_facts(stock, x), step_facts(mine, x)
    assert real == want
    stock.to("meta"), mine.to("meta")
    x = x.to("meta")
    on_meta = step_facts(mine, x)
    assert on_meta == step_facts(stock, x)
    assert [f and f[:3] for f in on_meta] == [f and f[:3] for f in real]
    assert not programs(mine)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fake_tensors(layout) -> None:
    from torch._subclasses import FakeTensorMode

    stock, mine = fused_pair()
    x = images(3, 40).contiguous(memory_format=layout)
    real = step_facts(copy.deepcopy(mine), x)
    found = []
    with FakeTensorMode() as mode:
        given = mode.from_tensor(x)
        for model in (stock, mine):
            fake = tv.ResNet(tv.resnet.BasicBlock, [1, 2, 1, 1], num_classes=10)
            fake = fr.fuse(fake, inplace=True) if model is mine else fake
            found.append(step_facts(fake, given))
    assert found[0] == found[1] == real
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        y = mine.eval()(mode.from_tensor(x))
    assert y.shape == (3, 10)
    same_outputs(stock.eval(), mine, x)  # nothing fake was kept


# --- more than 2^31 elements (row 27) ---


@needs_kernels
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="zeros take no memory on Linux")
@pytest.mark.parametrize("training", [False, True])
def test_more_than_two_to_the_31_elements(training) -> None:
    """The pixels that a strided convolution reads lie beyond 2^31 elements, too. Of the zeros
    between them only those that are read take memory."""
    numpy = pytest.importorskip("numpy")
    H, W = 2**13 + 64, 2**14
    zeros = torch.from_numpy(numpy.zeros(H * W * 16, dtype=numpy.int16)).view(torch.bfloat16)
    x = zeros.view(1, H, W, 16).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    small = torch.randn(1, 16, H // 64, W // 64).bfloat16()
    x[:, :, ::64, ::64] = small
    strided = nn.Conv2d(16, 16, 1, 64, bias=False)
    stock = calibrated(nn.Sequential(strided, nn.BatchNorm2d(16), nn.ReLU()))
    mine = fr.fuse(copy.deepcopy(stock))
    stock[0].stride = (1, 1)  # on the pixels alone
    found = []
    for model, given in ((mine, x), (stock, small)):
        model.train(training)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
                model.zero_grad()
                y = model(given)
            if training:
                (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
        gradients = [p.grad for p in model.parameters()] if training else []
        found.append([y.detach().float(), *gradients, *model.buffers()])
    assert programs(mine)
    for got, want in zip(*found, strict=True):
        size = float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * size)


# --- machines (rows 42, 61) ---

COMPARED = """
import copy, torch, torchvision, fused_resnet as fr
from fused_resnet.kernels import native, registry
from tests.models.model_helpers import randomise, same_outputs, same_step
torch.manual_seed(0)
resnet = torchvision.models.resnet
stock = randomise(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)).eval()
mine = fr.fuse(copy.deepcopy(stock), inplace=True)
x = torch.randn(4, 3, 40, 40)
def compare():
    for _ in range(2):
        same_outputs(stock.eval(), mine.eval(), x)
        same_step(stock, mine, x)
        same_step(stock.train(), mine.train(), x)
compare()
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always::RuntimeWarning", "-c", code],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def warnings_of(run: subprocess.CompletedProcess[str]) -> list[str]:
    assert run.returncode == 0, run.stderr
    return [line for line in run.stderr.splitlines() if "RuntimeWarning" in line]


def test_without_the_compiled_library() -> None:
    """As where no compiler built it: values as stock's, and one line says why; oneDNN's
    convolutions serve inference."""
    hidden = """
import pathlib
exists = pathlib.Path.exists
pathlib.Path.exists = lambda path: path.name != "libfused_resnet.so" and exists(path)
"""
    reasons = """
assert "pip install" in native.load()
paths = [{e.path for e in fr.explain(mine.train(mode))} for mode in (False, True)]
assert paths == [{"inference"}, {"stock"}], paths
with torch.no_grad(), fr.use_backend("reference"):
    assert {e.path for e in fr.explain(mine.eval(), x)} == {"stock"}
"""
    run = python(hidden + COMPARED + reasons)
    (line,) = warnings_of(run)
    assert "not built" in line


@pytest.mark.slow
@needs_kernels
def test_on_a_processor_without_vectors() -> None:
    run = python(COMPARED + "print(native.build_info()['cpu_isa'])", ATEN_CPU_CAPABILITY="default")
    assert len(warnings_of(run)) <= 1 and run.stdout.strip() in ("generic", "neon")


@pytest.mark.slow
@needs_kernels
def test_without_triton() -> None:
    run = python("import sys\nsys.modules['triton'] = None\n" + COMPARED, TRITON_INTERPRET="")
    assert not warnings_of(run)


@pytest.mark.slow
@needs_kernels
def test_more_threads_than_cores() -> None:
    """The caller computes alone, by no thread that waits for a core, beside PyTorch's."""
    one_core = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
"""
    threads = """
import time
torch.set_num_threads(4)
torch.ones(1 << 20).exp().sum()
compare()
time.sleep(0.1)
count = lambda: len(os.listdir("/proc/self/task"))
if os.path.isdir("/proc/self/task"):
    tasks = count()
    with torch.no_grad():
        y = mine.eval()(x)
        for _ in range(3):
            assert torch.equal(mine(x), y)
        torch.set_num_threads(1)
        assert torch.equal(mine(x), y)
    assert count() == tasks, (count(), tasks)
print("one core")
"""
    run = python(one_core + COMPARED + threads)
    assert run.stdout.strip() == "one core", run.stderr


# --- checkpoints (row 47) ---


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.slow
@needs_kernels
def test_checkpoints(tmp_path: Path) -> None:
    """One that is refused changes nothing of a model that ran; a whole one takes effect."""
    stock, mine = fused_pair()
    x, path, executed = images(), tmp_path / "weights.pt", tmp_path / "executed"
    same_outputs(stock, mine, x)
    same_step(stock.train(), mine.train(), x)
    stock.eval(), mine.eval()
    other, _ = pair("basic")
    randomise(other, seed=7)
    state = other.state_dict()

    def cut(fraction: float) -> None:
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])

    refused = {
        "cut short": lambda: cut(0.6),
        "empty": lambda: path.write_bytes(b""),
        "payload": lambda: torch.save({**state, "more": Payload(executed)}, path),
        "other classes": lambda: torch.save(pair("basic", num_classes=7)[0].state_dict(), path),
        "another network": lambda: torch.save(pair("bottleneck")[0].state_dict(), path),
        "a whole model": lambda: torch.save(mine, path),
    }
    for name, write in refused.items():
        write()
        with pytest.raises(CheckpointError, match=r"weights\.pt"):
            load_into(mine, load_checkpoint(path), "resnet", path)
        assert not executed.exists(), name
        for a, b in zip(mine.state_dict().values(), stock.state_dict().values(), strict=True):
            agree(b, a, 1e-4) if a.is_floating_point() else None
        same_outputs(stock, mine, x)
    for wrapped in (state, {"model": {f"module.{k}": v for k, v in state.items()}}):
        torch.save(wrapped, path)
        load_into(mine, load_checkpoint(path), "resnet", path)
        same_outputs(other.eval(), mine, x)
        same_step(other.train(), mine.train(), x)
        other.load_state_dict(load_checkpoint(path))
        mine.eval()
    # A model that torch.save wrote whole runs as before.
    torch.save(mine, path)
    other.load_state_dict(mine.state_dict())
    same_outputs(other.eval(), torch.load(path, weights_only=False), x)


# --- images (row 48) ---


@needs_kernels
def test_images_of_a_folder(tmp_path: Path) -> None:
    """`predict` with a fused model: images of every kind are converted, damaged files are named,
    and the probabilities are stock's."""
    image = pytest.importorskip("PIL.Image")
    testing = pytest.importorskip("typer.testing", reason="the command line needs typer and rich")
    from torchvision.transforms._presets import ImageClassification

    from fused_resnet.cli import application

    folder = tmp_path / "images"
    folder.mkdir()
    pixels = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8).numpy()
    whole = image.fromarray(pixels)
    for name, mode in {"rgb.png": "RGB", "grey.png": "L", "clear.png": "RGBA", "four.jpg": "CMYK",
                       "deep.png": "I;16", "point.png": "RGB"}.items():  # fmt: skip
        given = whole.resize((1, 1)) if name == "point.png" else whole
        given = given.convert("L").convert("I;16") if mode == "I;16" else given.convert(mode)
        given.save(folder / name)
    data = (folder / "rgb.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "text.jpg").write_text("not an image")
    stock = randomise(tv.resnet18(num_classes=3)).eval()
    torch.save(stock.state_dict(), tmp_path / "weights.pt")
    arguments = ["predict", str(folder), "--model", "torchvision:resnet18", "--json", "-",
                 "--checkpoint", str(tmp_path / "weights.pt"), "--top", "3"]  # fmt: skip
    result = testing.CliRunner().invoke(application(), arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.stderr
    rows = {Path(r["image"]).name: r for r in map(json.loads, result.stdout.splitlines())}
    assert set(rows) == {"rgb.png", "grey.png", "clear.png", "four.jpg", "deep.png", "point.png"}
    skipped = [line for line in result.stderr.splitlines() if "skipped" in line]
    assert all(any(name in line for line in skipped) for name in ("cut.png", "text.jpg"))
    for name in ("rgb.png", "grey.png", "four.jpg", "point.png"):
        with image.open(folder / name) as opened, torch.no_grad():
            x = ImageClassification(crop_size=224)(opened.convert("RGB"))[None]
            want = stock(x).softmax(1)[0].tolist()
        for entry in rows[name]["top"]:
            assert entry["probability"] == pytest.approx(want[entry["class"]], abs=1e-4)


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (2, 16, 1, 9), (1, 16, 3, 224)], ids=str)
def test_small_images(shape) -> None:
    stock = calibrated(nn.Sequential(Residual(), Residual()))
    mine, x = fr.fuse(copy.deepcopy(stock)), torch.randn(shape)
    for _ in range(2):
        same_outputs(stock, mine, x)
