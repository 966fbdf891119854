"""What breaks silently when files move: sources that are not compiled, headers that trigger no
rebuild, files that are not shipped."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from setuptools import Distribution
from torch.utils import cpp_extension

from fused_resnet.kernels import native, tuning
from tests import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not in a checkout")

SOURCES = {str(f.relative_to(ROOT)) for f in (ROOT / "csrc").rglob("*") if f.is_file()}


def endings(*wanted: str) -> set[str]:
    return {f for f in SOURCES if f.endswith(wanted)}


def setup_py(monkeypatch, **environment: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The names that setup.py defines, and the options that it passes to setup()."""
    captured: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: captured.update(options))
    for name in ("FUSED_RESNET_NATIVE", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py"), captured


@pytest.fixture
def options(monkeypatch) -> dict[str, Any]:
    """What setup.py would build, without CUDA code."""
    _, captured = setup_py(monkeypatch, FUSED_RESNET_CUDA="0")
    if not captured:
        pytest.skip("there is no C++ compiler")
    return captured


@pytest.fixture
def extension(options) -> Any:
    (found,) = options["ext_modules"]
    return found


def test_every_source_is_compiled_and_every_header_triggers_a_rebuild(extension):
    assert set(extension.sources) == endings(".cpp")
    assert set(extension.depends) == endings(".h", ".cuh")
    assert C_FILES | endings(".map") == SOURCES


@pytest.mark.parametrize("file", ["csrc/cpu/isa/vec.h", "csrc/cuda/convolution/sm90/kernel.cuh"])
def test_make_builds_anew_where_a_header_in_a_folder_changed(file, tmp_path):
    assert file in SOURCES
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    (tmp_path / "requirements.stamp").touch()
    settings = {"FUSED_RESNET_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0"}

    def built() -> None:
        line = " ".join(f"{name}={value}" for name, value in settings.items())
        (tmp_path / "build.stamp").write_text(f"{line}\n")

    def commands(*words: str) -> str:
        make = ["make", "--dry-run", f"VENV={tmp_path}", *words, "build"]
        environment = {**os.environ, **settings}
        done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    built()
    assert "build_ext" in commands("--what-if", file)
    assert "build_ext" not in commands()
    for name in settings:  # for other GPUs, or without CUDA code
        settings[name] = "0"
        assert "build_ext" in commands()
        built()
        assert "build_ext" not in commands()


C_FILES = endings(".cpp", ".cu", ".h", ".cuh")

# Spelling of TORCH_CUDA_ARCH_LIST -> architectures, and flags of nvcc without "-gencode=arch=".
SM_80, SM_90A = "compute_80,code=sm_80", "compute_90a,code=sm_90a"
PTX_80, PTX_90 = "compute_80,code=compute_80", "compute_90,code=compute_90"
ARCH_LISTS = {
    "": ("8.0+PTX;9.0a", {SM_80, PTX_80, SM_90A}),
    "9.0": ("9.0a", {SM_90A}),
    "9.0a": ("9.0a", {SM_90A}),
    "9.0 9.0a": ("9.0a", {SM_90A}),
    "9.0+PTX": ("9.0+PTX;9.0a", {SM_90A, PTX_90}),
    "9.0a+PTX": ("9.0+PTX;9.0a", {SM_90A, PTX_90}),
    "Hopper": ("9.0+PTX;9.0a", {SM_90A, PTX_90}),
    "8.0;9.0": ("8.0;9.0a", {SM_80, SM_90A}),
    " 8.0  9.0; ": ("8.0;9.0a", {SM_80, SM_90A}),
    "8.0+PTX": ("8.0+PTX", {SM_80, PTX_80}),
    "Ampere;Hopper": (
        "8.0;8.6+PTX;9.0+PTX;9.0a",
        {SM_80, "compute_86,code=sm_86", "compute_86,code=compute_86", SM_90A, PTX_90},
    ),
    "Volta;Turing;Ada": ("8.9+PTX", {"compute_89,code=sm_89", "compute_89,code=compute_89"}),
    "Pascal 7.5+PTX": ("8.0+PTX;9.0a", {SM_80, PTX_80, SM_90A}),
    "7.5 8.0 9.0 10.0 12.0+PTX": (
        "8.0;9.0a;10.0;12.0+PTX",
        {SM_80, SM_90A, "compute_100,code=sm_100"}
        | {"compute_120,code=sm_120", "compute_120,code=compute_120"},
    ),
    "10.0a": ("10.0a", {"compute_100a,code=sm_100a"}),
}


@pytest.mark.parametrize("spelling", ARCH_LISTS)
def test_spellings_of_the_architectures(monkeypatch, spelling):
    """Those that PyTorch accepts. 9.0 is machine code for sm_90a, which alone has Hopper's kernels,
    and PTX of compute_90, which alone runs on later GPUs."""
    names, _ = setup_py(monkeypatch, FUSED_RESNET_NATIVE="0", TORCH_CUDA_ARCH_LIST=spelling)
    archs, flags = names["cuda_archs"](cpp_extension)
    wanted, targets = ARCH_LISTS[spelling]
    assert archs == wanted
    hopper = {"-DFUSED_RESNET_SM_90A"} if SM_90A in targets else set()
    assert set(flags) == {f"-gencode=arch={target}" for target in targets} | hopper
    assert cpp_extension._get_cuda_arch_flags(flags) == []  # PyTorch adds no others
    # And the package knows what was built.
    native.built_for.cache_clear()
    monkeypatch.setattr(native, "_ask", lambda name, otherwise: {"cuda_archs": archs})
    assert native.built_for("9.0a") == bool(hopper)
    assert ("not Hopper's" in str(native.build_info()["cuda_kernels"])) != bool(hopper)
    for capability in ((8, 0), (9, 0), (10, 3), (12, 0)):
        code = re.findall(r"code=(sm|compute)_(\d+)(\d)(a?)", " ".join(flags))
        runs = {
            kind == "compute" or (int(major) == capability[0] and not exact)
            for kind, major, minor, exact in code
            if (int(major), int(minor)) < capability
        } | {(int(major), int(minor)) == capability for _, major, minor, _ in code}
        assert (native.code_for(capability) is not None) == (True in runs), capability
    native.built_for.cache_clear()


@pytest.mark.parametrize("spelling", ["Common", "All", "8.0,9.0", "sm_90", "hopper"])
def test_unknown_architectures_are_named(monkeypatch, spelling):
    names, _ = setup_py(monkeypatch, FUSED_RESNET_NATIVE="0", TORCH_CUDA_ARCH_LIST=spelling)
    with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST='{spelling}' is not"):
        names["cuda_archs"](cpp_extension)


def test_the_architectures_reach_the_extension(monkeypatch):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/cuda")
    names, _ = setup_py(monkeypatch, FUSED_RESNET_NATIVE="0", TORCH_CUDA_ARCH_LIST="9.0+PTX")
    if shutil.which(cpp_extension.get_cxx_compiler().split()[0]) is None:
        pytest.skip("there is no C++ compiler")
    build = names["native_build"]
    build.__globals__.update(NATIVE="", cuda_root_for=lambda torch: "/cuda")
    (found,) = build()["ext_modules"]
    flags = found.extra_compile_args
    assert set(found.sources) == endings(".cpp", ".cu")
    assert '-DFUSED_RESNET_CUDA_ARCHS="9.0+PTX;9.0a"' in flags["cxx"]
    assert {f"-gencode=arch={SM_90A}", "-DFUSED_RESNET_SM_90A"} < set(flags["nvcc"])


def test_other_flags_build_anew_without_ninja(options, extension, tmp_path):
    """distutils itself compares the times of files only."""
    source = tmp_path / "some.cpp"
    source.write_text('extern "C" const char* some() { return SOME; }\n')
    extension.sources = extension.depends = [str(source)]
    extension.libraries, built = [], []
    command = options["cmdclass"]["build_ext"].with_options(use_ninja=False)
    for value in ("one", "one", "two", "two"):
        extension.extra_compile_args = {"cxx": [f'-DSOME="value {value}"']}
        build = command(Distribution({"ext_modules": [extension]}))
        build.build_lib, build.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
        build.ensure_finalized()
        build.run()
        (library,) = (tmp_path / "lib").rglob("*.so")
        assert f"value {value}".encode() in library.read_bytes()
        built.append(library.stat().st_mtime_ns)
    assert built[0] == built[1] < built[2] == built[3]


def test_lint_sees_every_c_file():
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    done = subprocess.run(
        ["make", "--dry-run", "lint"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (line,) = [line for line in done.stdout.splitlines() if "clang-format" in line]
    emulator = {str(f.relative_to(ROOT)) for f in (ROOT / "tests").rglob("*.cpp")}
    assert emulator and C_FILES | emulator <= set(line.split())


def test_scripts_that_make_and_ci_run_exist(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    for stamp in ("requirements.stamp", "build.stamp"):
        (tmp_path / stamp).touch()
    words = ["make", "--dry-run", f"VENV={tmp_path}", "bench", "tables", "quick", "test"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    loop = re.search(r"for op in (.+); do", done.stdout)
    assert loop is not None
    text = done.stdout + (ROOT / ".ci" / "run").read_text()
    named = set(re.findall(r"\b((?:tests|benchmarks)/[\w/$]+(?:\.py)?)", text))
    paths = {p.replace("$op", op) for p in named for op in loop[1].split()}
    kernels = ("hopper", "implicit_gemm", "stem")
    paths = {p.replace("$name", name) for p in paths for name in kernels}
    paths = {p for p in paths if not p.startswith("benchmarks/results/")}  # written by them
    assert len(paths) > 20 and not [p for p in paths if not (ROOT / p).exists()]


def test_the_sdist_holds_every_source_and_every_module_and_tuned_results(tmp_path):
    """From a copy, in which a tuned result is shipped."""
    copy = tmp_path / "copy"
    hidden = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("fused_resnet", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=hidden)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    package = Path(tuning.__file__).parents[1]
    tuned = copy / "fused_resnet" / tuning.SHIPPED.relative_to(package) / "a-gpu.json"
    tuned.parent.mkdir(exist_ok=True)
    tuned.write_text("{}")
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    modules = {str(f.relative_to(copy)) for f in (copy / "fused_resnet").rglob("*.py")}
    assert len(modules) > 100
    assert not (SOURCES | modules | {str(tuned.relative_to(copy))}) - inside
    # And a wheel has them too.
    wheel = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path)]
    environment = {**os.environ, "FUSED_RESNET_NATIVE": "0"}
    done = subprocess.run(wheel, cwd=copy, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(archive).namelist())
    assert not (modules | {str(tuned.relative_to(copy)), "fused_resnet/py.typed"}) - inside
