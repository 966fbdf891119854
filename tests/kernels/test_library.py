"""How the compiled library is loaded, and what is said where it cannot be: the package works
without it, and the line names what is there and what is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from fused_resnet import version as versions
from fused_resnet.kernels import library, native
from fused_resnet.version import __version__

needs_library = pytest.mark.skipif(native.load() is not None, reason=str(native.load()))
IMPORT_CALLS = 24_000  # of Python functions, over torch's own; measured: 21,698


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always::RuntimeWarning", "-c", code],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


# The path without kernels: an op, and a model in both modes.
PURE = """
import fused_resnet as fr
from fused_resnet.kernels import native
print(native.load())
x = torch.randn(2, 3, 40, 40)
torch.testing.assert_close(fr.add_relu(x, x), torch.relu(2 * x))
model = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=4)
model(x).sum().backward()
assert model.eval()(x).isfinite().all()
"""


def reason_of(code: str, **environment: str) -> str:
    """What native.load() says after `code`, where the path without kernels works."""
    run = python(f"import torch\n{code}\n{PURE}", **environment)
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()
    return line


def test_without_torch_the_error_says_which_is_needed():
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"  # as if not installed
        "import fused_resnet\n"
    )
    run = python(code)
    assert run.returncode == 1
    line = run.stderr.splitlines()[-1]
    assert line.startswith(
        "ImportError: fused_resnet: torch >= 2.11 is needed, and importing torch"
    )


def test_an_older_torch_is_named_and_does_without_the_kernels():
    old = "torch.__version__ = '2.9.1+cu128'"
    line = reason_of(old)
    assert line.endswith("torch >= 2.11 is needed, this is torch 2.9.1+cu128")
    run = python(f"import torch\n{old}\nimport fused_resnet")
    assert run.stderr.count("RuntimeWarning: fused_resnet: torch >= 2.11 is needed, this is") == 1


def test_the_import_takes_little_starts_no_thread_and_leaves_cuda_alone():
    code = (
        "import os, sys, torch\n"
        "tasks, modules = len(os.listdir('/proc/self/task')), set(sys.modules)\n"
        "calls = []\n"
        "sys.setprofile(lambda frame, event, argument: event == 'call' and calls.append(1))\n"
        "import fused_resnet\n"
        "sys.setprofile(None)\n"
        "print(len(calls))\n"
        "assert len(os.listdir('/proc/self/task')) == tasks\n"
        "assert not torch.cuda.is_initialized()\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules) - modules}\n"
        "assert roots <= {'fused_resnet', 'torch', *sys.stdlib_module_names}, roots\n"
    )
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("threads are counted where there is /proc")
    run = python(code)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < IMPORT_CALLS


@pytest.mark.parametrize(
    ("version", "fits"),
    [("2.10.1", False), ("1.13.0", False), ("2.11.0+cu130", True), ("2.11.0a0", True),
     ("2.15.0", True), ("3.0.0", True), ("unknown", True)],
)  # fmt: skip
def test_versions_of_torch(version, fits):
    reason = versions.too_old(version)
    assert (reason is None) == fits
    assert fits or (version in reason and "2.11" in reason)


def test_a_file_that_is_no_library_is_named(monkeypatch, tmp_path):
    file = tmp_path / "libfused_resnet.so"
    file.write_text("not a library")
    monkeypatch.setattr(library, "_loaded_elsewhere", lambda file: None)
    with pytest.raises(library.Unavailable, match=r"libfused_resnet\.so: .*; to build") as caught:
        library.load(file)
    assert "\n" not in str(caught.value)


@needs_library
def test_a_library_of_another_version_is_refused():
    code = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("fused_resnet.version", FILE)
sys.modules[spec.name] = module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
sys.modules[spec.name].__version__ = "9.8.7"
"""
    line = reason_of(f"FILE = {versions.__file__!r}\n{code}")
    assert f"are those of fused_resnet {__version__}, this is fused_resnet 9.8.7" in line


@needs_library
def test_a_second_copy_is_refused(tmp_path):
    copy = shutil.copy(library.FILE, tmp_path / "libother.so")
    line = reason_of(f"torch.ops.load_library({str(copy)!r})")
    assert f"those of fused_resnet {__version__} already, from another place" in line
    # Of another version too: its ops tell which.
    code = """
other = torch.library.Library("fused_resnet_native", "DEF")
other.define("version() -> str")
other.impl("version", lambda: "0.0.9", "CompositeExplicitAutograd")
"""
    line = reason_of(code)
    assert f"kernels of fused_resnet {__version__} cannot be loaded" in line
    assert "those of fused_resnet 0.0.9" in line


@needs_library
def test_the_package_imported_anew_uses_the_library_that_is_loaded():
    code = """
import sys, torch
for _ in range(2):
    import fused_resnet
    from fused_resnet.kernels import native
    assert native.load() is None, native.load()
    for name in [n for n in sys.modules if n.startswith("fused_resnet.kernels")]:
        del sys.modules[name]
"""
    run = python(code)
    assert run.returncode == 0, run.stderr


@needs_library
def test_without_avx2_the_line_says_so():
    code = """
import torch, fused_resnet as fr
from fused_resnet.kernels import native, registry
print(native.build_info()["cpu_isa"], "|", registry.missing("conv_bn_relu", "native", "cpu"))
x = torch.randn(2, 3, 40, 40)
model = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=4).eval()
with torch.no_grad():
    got = model(x)
    with fr.use_backend("reference"):
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)
"""
    run = python(code, ATEN_CPU_CAPABILITY="default")
    assert run.returncode == 0, run.stderr
    isa, _, reason = run.stdout.strip().partition(" | ")
    assert isa in ("generic", "neon") and "needs a processor with AVX2" in reason


@needs_library
def test_the_answers_pass_no_dispatcher():
    loaded = native._loaded()[0]
    calls = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with Seen():
        assert loaded.convolution_reason((32, 32, 3, 3), "float64", (1, 1), 1) is not None
        assert loaded.memory()["used_bytes"] >= 0
    assert not calls
    with pytest.raises(IndexError):
        loaded.convolution_reason((32, 32, 3, 3, 1), "float32", (1, 1), 1)
    # An exception of the C++ code is a reason, not the end of the process.
    broken = loaded.training_reason("convolution", (32, 32, 3, 3), "float32", (0,) * 7)
    assert broken is None or isinstance(broken, str)


@needs_library
def test_a_version_for_users_of_the_ops():
    assert torch.ops.fused_resnet_native.version() == __version__
    assert native.build_info()["version"] == __version__


# --- CUDA code, a torch and a driver of other versions --------------------------------------------

CAPABILITIES = {"8.0": (8, 0), "9.0": (9, 0), "12.0": (12, 0)}


@pytest.mark.parametrize(
    ("theirs", "driver", "gpu", "words"),
    [
        ("13.2", "13.0", "8.0", None),
        ("13.2", None, "8.0", None),
        (None, "13.0", "9.0", None),
        ("12.6", "13.0", "8.0", ("built for CUDA 13.1", "this torch is for CUDA 12.6")),
        ("13.2", "12.8", "8.0", ("a driver for CUDA 13.1", "this driver is for CUDA 12.8")),
        # PTX, which a driver of the older minor version cannot compile
        ("13.2", "13.0", "12.0", ("a driver for CUDA 13.1 on sm_120", "for CUDA 13.0")),
        ("13.2", "13.1", "12.0", None),
    ],
)  # fmt: skip
def test_cuda_code_of_another_release(monkeypatch, theirs, driver, gpu, words):
    build = {"cuda_version": "13.1", "cuda_archs": "8.0+PTX;9.0a"}
    monkeypatch.setattr(native, "build_info", lambda: build)
    monkeypatch.setattr(native, "driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", theirs)
    capability = CAPABILITIES[gpu]
    reason = native.cuda_reason(capability, f"sm_{gpu.replace('.', '')}")
    assert reason is None if words is None else all(word in reason for word in words)


def test_a_gpu_without_code(monkeypatch):
    build = {"cuda_version": "13.1", "cuda_archs": "9.0a"}
    monkeypatch.setattr(native, "build_info", lambda: build)
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    assert native.cuda_reason((8, 0), "sm_80") == "the native build (9.0a) has no code for sm_80"
