"""What is installed: the library's symbols, the stand-ins that wheels are linked against, the tags,
and the places that name a version."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fused_resnet.kernels import library, native
from fused_resnet.version import __version__
from tests import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not in a checkout")
MEGABYTE = 1 << 20


def symbols(file: Path | str) -> tuple[set[str], set[str]]:
    """(defined, undefined) dynamic symbols with their versions, "dlsym@GLIBC_2.2.5"."""
    found: tuple[set[str], set[str]] = set(), set()
    command = ["readelf", "--dyn-syms", "--wide", str(file)]
    for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines():
        words = line.split()
        if len(words) >= 8 and words[0].rstrip(":").isdigit():
            found[words[6] == "UND"].add(words[7].replace("@@", "@"))
    return found


needs_binutils = pytest.mark.skipif(shutil.which("readelf") is None, reason="there is no readelf")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@needs_binutils
@pytest.mark.skipif(native.load() is not None, reason=str(native.load()))
def test_the_library_has_nothing_of_python_and_of_torch_the_stable_abi_alone():
    defined, undefined = symbols(library.FILE)
    assert len(undefined) > 50
    assert not [s for s in undefined if s.startswith(("Py", "_Py"))]
    assert not [s for s in undefined if re.match(r"_ZN?K?(2at|3c10|5torch)", s)]
    assert defined and all(s.startswith("fused_resnet_") for s in defined), defined
    assert {f"fused_resnet_{name}" for name in library._SIGNATURES} == defined
    cuda = native.build_info()["cuda_version"] is not None
    assert library.FILE.stat().st_size < (60 if cuda else 5) * MEGABYTE


@pytest.fixture(scope="module")
def old_libc():
    spec = importlib.util.spec_from_file_location("old_libc", ROOT / "wheels/old_libc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SOURCE = """
#include <dlfcn.h>
#include <stdlib.h>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <vector>
extern "C" void* found(const char* name) {
  std::ostringstream text;
  text << name;
  std::vector<std::shared_ptr<int>> shared(text.str().size());
  if (shared.empty()) throw std::runtime_error(text.str());
  return dlsym(RTLD_DEFAULT, std::move(text).str().c_str());
}
char __libc_single_threaded = 0;
int registered = atexit([] {});  // as nvcc's code does
"""


@needs_binutils
@needs_compiler
def test_a_library_linked_to_the_stand_ins_needs_no_newer_glibc(old_libc, tmp_path):
    (tmp_path / "some.cpp").write_text(SOURCE)
    old_libc.make(tmp_path / "libraries")
    command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "some.cpp", "-o"]
    flags = [f"-L{tmp_path}/libraries", "-Wl,--exclude-libs,ALL", "-Wl,-z,defs"]
    subprocess.run([*command, "plain.so"], cwd=tmp_path, check=True)
    subprocess.run([*command, "old.so", *flags], cwd=tmp_path, check=True)

    def newer(file: str) -> list[str]:
        versions = [s.partition("@")[2] for s in symbols(tmp_path / file)[1]]
        parsed = [old_libc.numbers(v) for v in versions if v]
        return [p for p in parsed if p and p[0] in old_libc.NEWEST and p[1] > old_libc.NEWEST[p[0]]]

    assert newer("plain.so"), "this machine is as old as the stand-ins: nothing is tested"
    assert not newer("old.so")
    # dlsym lies where glibc 2.28 has it.
    dynamic = subprocess.run(["readelf", "-d", "old.so"], cwd=tmp_path, capture_output=True)
    assert b"[libdl.so.2]" in dynamic.stdout
    load = "import ctypes; assert ctypes.CDLL('./old.so').found(b'malloc')"
    subprocess.run([sys.executable, "-c", load], cwd=tmp_path, check=True)
    # What an older glibc lacks is an error of the linker, not of whoever loads it.
    (tmp_path / "some.cpp").write_text(
        '#include <stdlib.h>\nextern "C" unsigned some() { return arc4random(); }\n'
    )
    failed = subprocess.run(
        [*command, "new.so", *flags], cwd=tmp_path, capture_output=True, text=True
    )
    assert failed.returncode != 0 and "arc4random" in failed.stderr


def test_the_versions_of_symbols(old_libc):
    assert old_libc.numbers("GLIBCXX_3.4.29") == ("GLIBCXX", (3, 4, 29))
    assert old_libc.numbers("GLIBC_PRIVATE") is None


# Machine -> which of the wheels pip takes there; with none, it takes the sdist.
MACHINES = {
    "manylinux_2_28_x86_64": "manylinux_2_28_x86_64",
    "manylinux_2_41_x86_64": "manylinux_2_28_x86_64",
    "manylinux_2_17_x86_64": "any",  # an older glibc
    "musllinux_1_2_x86_64": "any",
    "manylinux_2_28_aarch64": "any",
    "macosx_15_0_arm64": "any",
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("minor", [10, 12, 14])
def test_every_python_takes_the_same_wheels(machine, minor):
    tags = pytest.importorskip("packaging.tags")
    kind, *version, cpu = re.fullmatch(r"(\w+?)_(\d+)_(\d+)_(\w+)", machine).groups()
    newest = int(version[1])
    minors = range(newest, -1, -1) if kind != "macosx" else [0]
    platforms = [f"{kind}_{version[0]}_{i}_{cpu}" for i in minors]
    fitting = [str(tag) for tag in tags.compatible_tags((3, minor), f"cp3{minor}", platforms)]
    ours = ["py3-none-manylinux_2_28_x86_64", "py3-none-any"]
    taken = min((t for t in ours if t in fitting), key=fitting.index)
    assert taken == f"py3-none-{MACHINES[machine]}"


def test_the_tags_of_what_setup_py_builds(tmp_path):
    """Of a package without a library, of one with it, and of one whose build failed."""
    code = f"""
import runpy, setuptools, sys
from setuptools import Distribution, Extension
setuptools.setup = lambda **options: None
wheel = runpy.run_path("setup.py")["Wheel"]
some = [Extension("fused_resnet.some", ["some.cpp"])]
for asked, built in (([], []), (some, some), (some, [])):
    command = wheel(Distribution({{"ext_modules": asked}}))
    command.bdist_dir = {str(tmp_path)!r}
    command.ensure_finalized()
    command.distribution.ext_modules = built
    print("-".join(command.get_tag()), command.root_is_pure)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "FUSED_RESNET_NATIVE": "0"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    pure, native_tag, failed = run.stdout.splitlines()
    assert pure == failed == "py3-none-any True"
    assert re.fullmatch(r"py3-none-linux_\w+ False", native_tag)


def test_the_version_stands_in_one_place():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    named = [
        f
        for f in files.splitlines()
        if f.endswith((".py", ".toml", ".cff", ".cpp", ".md", ".yml", ".in"))
    ]
    if not named:
        pytest.skip("not a git checkout")
    pattern = re.compile(rf"(?<![\d.]){re.escape(__version__)}(?![\d.])")
    holding = {f for f in named if (ROOT / f).exists() and pattern.search((ROOT / f).read_text())}
    assert holding - {"CHANGELOG.md"} == {"fused_resnet/version.py"}
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    released = [h for h in headings if h != "Unreleased"]
    assert headings[0] == "Unreleased" and released[:1] in ([], [__version__])


def test_yaml_files_are_well_formed():
    yaml = pytest.importorskip("yaml")
    files = {f.name: yaml.safe_load(f.read_text()) for f in (ROOT / ".github").rglob("*.yml")}
    for name in ("tests.yml", "wheels.yml", "release.yml"):
        assert {"name", "permissions", "jobs"} <= set(files[name])
        assert files[name]["permissions"] == {"contents": "read"}
        for job in files[name]["jobs"].values():
            assert "uses" in job or {"runs-on", "steps"} <= set(job)
    for name in ("bug.yml", "request.yml"):
        assert {"name", "description", "body"} <= set(files[name])
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_workflows_run_what_exists():
    """Scripts and targets of make that they name."""
    folder = ROOT / ".github"
    texts = {f.name: f.read_text() for f in folder.rglob("*.yml")}
    assert {"tests.yml", "wheels.yml", "release.yml", "bug.yml"} <= set(texts)
    for text in texts.values():
        assert "\t" not in text
        for path in re.findall(r"(?:python|bash) ((?:wheels|\.ci)/\S+)", text):
            assert (ROOT / path).exists(), path
        for target in re.findall(r"run: make (\S+)", text):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
    assert "id-token: write" in texts["release.yml"] and "password" not in texts["release.yml"]
    assert "./.github/workflows/wheels.yml" in texts["release.yml"]
    oldest = re.search(r"torch==(\d+)\.(\d+)\.0", texts["wheels.yml"])
    assert (int(oldest[1]), int(oldest[2])) == (2, 11)
