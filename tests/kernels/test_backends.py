"""The choice of a backend: preference, forcing, and messages about unavailable backends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import fused_resnet as fr
from fused_resnet.bench.report import info_tables
from fused_resnet.kernels import native, registry, target


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: all tests ran on the CPU"
)
def test_gpu_is_available():
    assert fr.add_relu(torch.ones(1, 1, 1, 1, device="cuda"), torch.ones(1, 1, 1, 1, device="cuda"))


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        capture_output=True, text=True, env={**os.environ, **environment}, timeout=120,
    )  # fmt: skip


def test_forcing_nests_and_is_reverted_after_errors():
    assert registry.forced() is None
    with fr.use_backend("reference"):
        assert registry.choose("add_relu", "cpu") == "reference"
        with pytest.raises(KeyError), fr.use_backend("reference"):
            raise KeyError
        assert registry.forced() == "reference"
    assert registry.forced() is None


def test_forcing_is_local_to_the_thread():
    seen = []
    with fr.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(registry.forced()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_unknown_names_raise():
    words = "one of native, triton, vendor, reference(, emulated)?, got 'cudnn'"
    with pytest.raises(ValueError, match=words), fr.use_backend("cudnn"):
        pass
    run = python("import fused_resnet as fr; fr.info()", FUSED_RESNET_BACKEND="cudnn")
    assert run.returncode != 0 and "cudnn" in run.stderr


def test_the_environment_forces_a_backend():
    code = (
        "import torch, fused_resnet as fr\n"
        "from fused_resnet.kernels import registry\n"
        "x = torch.ones(1, 1, 1, 1)\n"
        "print(registry.choose('add_relu', 'cpu'), fr.add_relu(x, x).item())"
    )
    run = python(code, FUSED_RESNET_BACKEND="reference")
    assert run.stdout.split() == ["reference", "2.0"], run.stderr


@pytest.mark.filterwarnings("error")  # the table reports missing backends in its cells
def test_every_op_has_one_provider_on_every_device():
    for device in ("cpu", "cuda", "mps"):
        rows = registry.table(device)
        for op in registry.OPS:
            assert [r["serves"] for r in rows if r["op"] == op].count("yes") == 1
        for row in rows:
            assert row["serves"] == "no" or row["missing"] is None


WITHOUT_LIBRARY = """
import pathlib
exists = pathlib.Path.exists
pathlib.Path.exists = lambda path: path.name != "libfused_resnet.so" and exists(path)
import torch, fused_resnet as fr
from fused_resnet.kernels import native, registry
"""


def test_without_the_library_results_match_with_one_warning():
    code = WITHOUT_LIBRARY + """
assert "pip install --no-build-isolation" in native.load()
x = torch.randn(2, 8, 6, 6)
for _ in range(3):
    torch.testing.assert_close(fr.add_relu(x, x), torch.relu(2 * x))
    want = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(fr.bn_add_relu(x)[0], torch.relu(want))
model = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=4).eval()
x = torch.randn(2, 3, 40, 40)
with torch.no_grad():
    got = model(x)
    with fr.use_backend("reference"):
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)
    try:
        with fr.use_backend("native"):
            raise SystemExit("native is unavailable, but use_backend did not raise")
    except RuntimeError as error:
        assert "not available" in str(error) and "pip install" in str(error)
model.train()(x).sum().backward()
print(registry.choose("conv_bn_relu", "cpu"))
"""  # fmt: skip
    run = python(code)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(lines) == 1 and "not built" in lines[0], run.stderr
    assert run.stdout.strip() == "vendor"


def test_import_is_light_and_does_not_initialise_cuda():
    code = (
        "import sys, torch, fused_resnet\n"
        "heavy = {'torchvision', 'rich', 'typer', 'matplotlib', 'PIL', 'skimage', 'triton'}\n"
        "print(sorted(heavy & set(sys.modules)), torch.cuda.is_initialized())"
    )
    before = python("import sys, torch; print(sorted({'triton', 'PIL'} & set(sys.modules)))")
    run = python(code)
    already = before.stdout.strip()
    assert run.stdout.strip() == f"{already} False", run.stdout + run.stderr


def test_warnings_are_given_once():
    registry.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            registry.warn_once("fused_resnet: a message")
    assert [str(w.message) for w in caught] == ["fused_resnet: a message"]


def test_info():
    info = fr.info()
    text = str(info)
    assert torch.__version__ in text
    assert (native.load() is None) == bool(native.build_info())


@pytest.mark.parametrize(
    ("archs", "words"),
    [(None, "none: built with FUSED_RESNET_CUDA=0"),
     ("8.0+PTX", "not Hopper's own (TMA, wgmma): built without 9.0"),
     ("8.0;9.0+PTX;9.0a", "and Hopper's own")],
)  # fmt: skip
def test_info_says_which_cuda_kernels_were_built(monkeypatch, archs, words):
    if native.load() is not None:
        pytest.skip(str(native.load()))
    built = {**native._ask("build_info", {}), "cuda_archs": archs}
    monkeypatch.setattr(native._loaded()[0], "build_info", lambda: built)
    info = fr.info()
    assert words in info["native build"]["cuda_kernels"]
    (text,) = [t for t in info_tables(info) if t.title == "native build"]
    assert words in "".join(map(str, text.columns[1].cells))


class Initialised(Exception):
    pass


@pytest.fixture
def unused_gpu(monkeypatch):
    """A machine with a GPU that this process has not used: whoever asks for its properties, which
    initialises CUDA, raises `Initialised`."""

    def initialise(*_):
        raise Initialised

    target.target_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("get_device_properties", "init", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, initialise)
    yield
    target.target_of.cache_clear()


def test_info_does_not_initialise_cuda(unused_gpu, monkeypatch):
    assert "not initialised" in fr.info()["cuda"]["missing"]
    with pytest.raises(Initialised):
        fr.info(initialise_cuda=True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(Initialised):
        fr.info()


def test_forcing_a_backend_of_the_cpu_does_not_initialise_cuda(unused_gpu):
    for name in ("native", "vendor", "reference"):
        if registry.missing("conv_bn_relu", name, "cpu") is None:
            with fr.use_backend(name):
                assert registry.choose("conv_bn_relu", "cpu") == name
