"""GPU benchmarks, as far as they run without a GPU: bench_gpu_ops.py on emulated and interpreted
kernels, and gpu_day.sh as a dry run."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fused_resnet as fr
from fused_resnet.kernels import registry, tuning
from fused_resnet.kernels.problem import Problem
from tests import ROOT
from tests.emulator import emulation

DAY = ROOT / "benchmarks" / "gpu_day.sh"

pytestmark = pytest.mark.skipif(not DAY.exists(), reason="not in a checkout")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "kernels" / "cuda"))
    import bench_gpu_ops

    def run(out: Path, *words: str) -> tuple[int, dict]:
        small = ["--batch", "2", "--size", "32", "--rounds", "2", "--out", str(out)]
        status = bench_gpu_ops.main([*small, "--device", "cpu", *words])
        (file,) = out.glob("gpu_ops-cpu-torch*.json")
        assert file.stat().st_size < 1e6
        return status, json.loads(file.read_text())

    return run


@pytest.fixture
def kernels_on_the_cpu(quick_interpreter):
    if emulation.unavailable() is not None:
        pytest.skip(str(emulation.unavailable()))
    reason = registry.missing("conv_bn_relu", "triton", "cpu")
    if reason is not None:
        pytest.skip(reason)
    emulation.load()
    emulation.seed(0)


@pytest.mark.slow
def test_all_ops_and_contenders(bench, kernels_on_the_cpu, tmp_path):
    """Without compile, which takes seconds per case and is tested below."""
    default = ("fused", "native", "triton", "unfused")
    words = ("--contender", *default, "apart", "cudnn", "--only", "(2, 64, 8, 8)")
    status, result = bench(tmp_path, "--model", "resnet18", *words)
    rows = result["benchmarks"]
    assert status == 0, [row["notes"] for row in rows]
    ops = ("conv_bn_relu", "bn_add_relu", "bn_add_relu with backward", "add_relu")
    contenders_of = {
        "conv_backward": ("triton", "unfused"), "conv_bn_train": ("fused", "native", "unfused"),
        "conv_norm_backward": ("fused", "native", "apart", "unfused"),
    }  # fmt: skip
    assert {row["op"] for row in rows} == {*ops, "add_relu with backward", *contenders_of}
    for row in rows:
        assert list(row["contenders"]) == list(contenders_of.get(row["op"], default)), row
        assert all(figures["share"] > 0 for figures in row["contenders"].values())
        assert row["extra_info"]["share of the limit"] > 0
        assert set(row["notes"]) == ({"cudnn"} if row["op"] == "conv_bn_relu" else set())
    convs = [row for row in rows if row["op"] == "conv_bn_relu"]
    ends = [row["name"].split(" -> ")[1] for row in convs]
    assert ends == ["64, 3x3/1", "64, 3x3/1, residual", "128, 3x3/2", "128, 1x1/2, no relu"]
    assert [row["times"] for row in convs] == [2, 2, 1, 1]
    assert {row["contender"] for row in result["totals"] if row["op"] == ops[0]} == set(default)
    total = next(row for row in result["totals"] if row["contender"] == "native")
    ms = sum(row["contenders"]["native"]["ms"] * row["times"] for row in convs)
    assert total["network ms"] == pytest.approx(ms) and total["layers"] == "4 of 4"


@pytest.mark.parametrize(
    "op, others", [("conv_bn_relu", {"native", "compile"}), ("conv_bn_train", {"native"})]
)
def test_every_tile_and_the_compiler(bench, kernels_on_the_cpu, tmp_path, op, others):
    words = ("--contender", "native", "compile", "--tiles", "--op", op)
    status, result = bench(tmp_path, *words, "--only", "(2, 64, 8, 8) -> 64, 1x1")
    (row,) = result["benchmarks"]
    assert status == 0, row["notes"]
    tiles = [name for name in row["contenders"] if name.startswith("native ")]
    assert len(tiles) == len({*tiles}) >= 10 and {"sm_80", "sm_90"} == {t.split()[1] for t in tiles}
    assert set(row["contenders"]) == {*others, *tiles}


def test_prologue_against_separate_kernels(bench, kernels_on_the_cpu, tmp_path):
    words = ("--contender", "native", "apart", "cudnn", "unfused", "--op", "norm_conv_train")
    status, result = bench(tmp_path, *words, "--only", "(2, 64, 8, 8) -> 256, 1x1")
    (row,) = result["benchmarks"]
    assert status == 0 and not row["notes"], row["notes"]
    assert set(row["contenders"]) == {"native", "apart", "cudnn", "unfused"}
    assert row["how"]["native"] == row["how"]["apart"] and row["times"] == 3


def test_failed_and_wrong_contenders_are_reported(bench, tmp_path, monkeypatch, capsys):
    right = fr.conv_bn_relu

    def shifted_by_one_pixel(*arguments):
        return right(*arguments).roll(1, 3)

    def out_of_resources(*arguments, **options):
        raise RuntimeError("out of resources\nand more")

    monkeypatch.setattr(fr, "conv_bn_relu", shifted_by_one_pixel)
    monkeypatch.setattr(torch, "compile", out_of_resources)
    words = ("--op", "conv_bn_relu", "--only", "(2, 64, 8, 8) -> 64, 3x3")
    status, result = bench(tmp_path, *words, "--contender", "fused", "compile", "unfused")
    (row,) = result["benchmarks"]
    assert status == 1 and list(row["contenders"]) == ["unfused"]
    assert row["notes"]["fused"].startswith("wrong: y: largest error")
    assert row["notes"]["compile"] == "failed: RuntimeError: out of resources"
    output = capsys.readouterr().out
    assert "2 failed or wrong" in output and "out of resources" in output


def test_roles_of_convolutions(monkeypatch):
    """In ResNet-50 and ResNet-18: which convolutions end a block, which are shortcuts."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "kernels" / "cuda"))
    import gpu_cases

    for model, blocks in (("resnet50", 16), ("resnet18", 8)):
        places = list(gpu_cases.places(model, 2, 64).elements())
        assert len(places) == {"resnet50": 53, "resnet18": 20}[model]
        assert sum(place.residual for place in places) == blocks
        shortcuts = [place for place in places if not place.relu]
        assert len(shortcuts) == {"resnet50": 4, "resnet18": 3}[model]
        assert not any(place.residual for place in shortcuts)


def test_winners_are_saved_one_by_one(monkeypatch, tmp_path):
    """An interrupted run has saved the winners measured before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_winners", {})
    problems = [
        Problem("conv_bn_relu", torch.bfloat16, (64, c, 1, 1), x_shape=(1, c, 8, 8))
        for c in (64, 128)
    ]

    def measure(problem, backend, config):
        if problem == problems[1]:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        triton = registry.provider("triton", "cpu")
        tuning.tune(problems, torch.device("cpu"), (triton,), measure)
    assert list(tuning.read(tmp_path / "fused_resnet" / "cpu")) == [problems[0].gemm()]


def day(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(DAY), *words],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )  # fmt: skip


def test_list_of_sections():
    listed = [line.split()[0] for line in day("--list").stdout.splitlines()]
    assert listed[:4] == ["build", "device-tests", "ops", "resnet50"] and len(listed) >= 12
    assert {"tune", "tests", "sanitizer", "train", "ncu"} < set(listed)


def test_dry_run_lists_commands(tmp_path):
    done = day("--dry-run", str(tmp_path / "o u t"))
    assert done.returncode == 0 and not done.stderr, done.stderr
    commands = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert len(commands) > 25
    listed = [line.split()[0] for line in day("--list").stdout.splitlines()]
    printed = [line.split()[1].rstrip(",") for line in done.stdout.splitlines() if line[:2] == "=="]
    assert printed == listed
    words = " ".join(commands).split()
    for file in {w for w in words if w.startswith(("benchmarks/", "tests/"))}:
        assert (ROOT / file).exists(), file
    # The options exist.
    for path in ("benchmarks/kernels/cuda/bench_gpu_ops.py", "benchmarks/models/bench_resnet.py"):
        text = subprocess.run(
            [sys.executable, path, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=120
        ).stdout
        used = {w for line in commands if path in line for w in line.split(path)[1].split()}
        options = {w for w in used if w.startswith("--")}
        assert options and all(option in text for option in options), (path, options)
    assert not (tmp_path / "o u t" / "summary.txt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--dry-run", "OUT", "lunch"), "no section lunch"), (("--eat",), "unknown option --eat"),
     ((), "gpu_day.sh")],
)  # fmt: skip
def test_unknown_arguments_of_gpu_day(tmp_path, words, message):
    done = day(*(str(tmp_path) if word == "OUT" else word for word in words))
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")
def test_gpu_day_requires_a_gpu(tmp_path):
    done = day(str(tmp_path), PATH="/usr/bin:/bin")
    assert done.returncode == 2 and "a GPU" in done.stderr and not list(tmp_path.iterdir())


def test_other_sections_run_after_a_failure(tmp_path):
    """With a fake nvidia-smi every section is tried and fails."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("nvidia-smi", "echo 9.0"), ("python", 'echo "python $*"; exit 7')):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    out, path = tmp_path / "out", f"{tools}:/usr/bin:/bin"
    environment = {"PATH": path, "PYTHON": str(tools / "python")}
    names = ("build", "device-tests", "ops", "sanitizer")
    done = day(str(out), *names, **environment)
    assert done.returncode == 1, done.stderr
    lines = [line.split() for line in (out / "summary.txt").read_text().splitlines()]
    assert [line[0] for line in lines] == list(names)
    assert [line[1] for line in lines] == ["1", "1", "1", "0"], lines
    log = (out / "build" / "log.txt").read_text()
    assert "TORCH_CUDA_ARCH_LIST=9.0a" in log and "exit status 7" in log
    assert "below 128 KiB" in (out / "device-tests" / "log.txt").read_text()
    assert "no compute-sanitizer" in (out / "sanitizer" / "log.txt").read_text()
    assert "bench_resnet" not in (out / "ops" / "log.txt").read_text()

    (tools / "python").write_text("#!/bin/sh\nexit 0\n")
    second = day("--seconds", "600", str(out), "ops", **environment)
    assert second.returncode == 0 and len((out / "summary.txt").read_text().splitlines()) == 4
    listed = day("--seconds", "0", str(out), **environment)
    assert listed.returncode == 1
    assert "ops: passed before" in listed.stdout and "train: no time left" in listed.stdout


@pytest.mark.parametrize("stop", ["limit of the section", "signal"])
def test_a_section_leaves_no_process(tmp_path, stop):
    """A checked program outlives timeout's signal, in a process group of its own."""
    tools, pids = tmp_path / "bin", tmp_path / "pids"
    tools.mkdir()
    program = f"trap '' TERM; echo $$ >>{pids}; while :; do sleep 1; done"
    checker = f"#!/bin/bash\nsetsid bash -c {shlex.quote(program)} &\n{program}\n"
    for name, text in (("nvidia-smi", "#!/bin/sh\necho 9.0\n"), ("compute-sanitizer", checker)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    script, seconds = tmp_path / "benchmarks" / DAY.name, "2" if stop != "signal" else "60"
    script.parent.mkdir()
    text, changed = re.subn(r"(?m)^(sanitizer +)\d+", rf"\g<1>{seconds}", DAY.read_text())
    assert changed == 1
    script.write_text(text)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable}
    run = subprocess.Popen(
        ["bash", str(script), str(tmp_path / "out"), "sanitizer"],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    if stop == "signal":
        deadline = time.monotonic() + 60
        while not pids.exists() or len(pids.read_text().split()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.terminate()
    output, _ = run.communicate(timeout=50)
    # A killed process that nobody has waited for has no command line.
    files = [Path("/proc", pid, "cmdline") for pid in pids.read_text().split()]
    left = [file.parent.name for file in files if file.exists() and file.read_bytes()]
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert files and not left
    assert run.returncode == (143 if stop == "signal" else 1)
    assert stop == "signal" or "sanitizer       124" in output


def test_the_profiler_selects_our_kernels_only(tmp_path):
    """By the names of the emulated kernels, and some that run in the same process."""
    if emulation.unavailable() is not None or shutil.which("nm") is None:
        pytest.skip(emulation.unavailable() or "there is no nm")
    emulation.load()
    command = next(
        shlex.split(line) for line in day("--dry-run", str(tmp_path), "ncu").stdout.splitlines()
        if line.startswith("+ ncu")
    )  # fmt: skip
    option = dict(itertools.pairwise(command))
    assert option["--kernel-name-base"] == "demangled"
    kind, _, pattern = option["--kernel-name"].partition(":")
    assert kind == "regex"
    sources = "".join(f.read_text() for f in (ROOT / "csrc/cuda").rglob("*.cu*"))
    kernels = set(re.findall(r"__global__ void [^;{]*?(\w+)\((?:\n? *)const", sources))
    assert sources.count("__global__") - len(kernels) <= 1 < len(kernels)
    library = ROOT / "build/emulated-plain/libemulated.so"
    symbols = subprocess.run(["nm", "-C", str(library)], capture_output=True, text=True).stdout
    names = [line.split(" ", 2)[2] for line in symbols.splitlines() if " U " not in line]
    for kernel in kernels:
        ours = [name for name in names if re.search(rf"::{kernel}[<(]", name.split("(const")[0])]
        assert any(re.fullmatch(pattern, name) for name in ours), kernel
    for other in (
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<float>>(int)",
        "void at::native::batch_norm_collect_statistics_kernel<float, float>(float)",
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, 512, true, 1, true>(float)",
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64",
        "implicit_convolve_sgemm", "stem_kernel", "bn_forward",
    ):  # fmt: skip
        assert not re.search(pattern, other), other
