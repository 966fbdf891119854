"""What is for a machine with a GPU, as far as it goes without one: the benchmark of the ops, on
emulated and interpreted kernels, and gpu_day.sh, which says what it would run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_resnet as fr
from fused_resnet.kernels import native, tuning
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
def kernels_on_the_cpu(quick_interpreter, monkeypatch):
    if emulation.unavailable() is not None:
        pytest.skip(str(emulation.unavailable()))
    support = pytest.importorskip("fused_resnet.kernels.triton.support")
    if support.unavailable("cpu") is not None:
        pytest.skip(support.unavailable("cpu"))
    emulation.load()
    emulation.seed(0)
    monkeypatch.setattr(native, "built_for", lambda arch: True)  # as the emulator is


def test_all_ops_and_contenders(bench, kernels_on_the_cpu, tmp_path):
    """compile by itself below: it takes seconds for each."""
    four = ("fused", "native", "triton", "unfused")
    words = ("--contender", *four, "apart", "cudnn", "--only", "(2, 64, 8, 8)")
    status, found = bench(tmp_path, "--model", "resnet18", *words)
    rows = found["benchmarks"]
    assert status == 0, [row["notes"] for row in rows]
    ops = ("conv_bn_relu", "bn_add_relu", "bn_add_relu with backward", "add_relu")
    some = {
        "conv_backward": ("triton", "unfused"), "conv_bn_train": ("fused", "native", "unfused"),
        "conv_norm_backward": ("fused", "native", "apart", "unfused"),
    }  # fmt: skip
    assert {row["op"] for row in rows} == {*ops, "add_relu with backward", *some}
    for row in rows:
        assert list(row["contenders"]) == list(some.get(row["op"], four)), row
        assert all(figures["share"] > 0 for figures in row["contenders"].values())
        assert row["extra_info"]["share of the limit"] > 0
        assert set(row["notes"]) == ({"cudnn"} if row["op"] == "conv_bn_relu" else set())
    convs = [row for row in rows if row["op"] == "conv_bn_relu"]
    ends = [row["name"].split(" -> ")[1] for row in convs]
    assert ends == ["64, 3x3/1", "64, 3x3/1, residual", "128, 3x3/2", "128, 1x1/2, no relu"]
    assert [row["times"] for row in convs] == [2, 2, 1, 1]
    assert {row["contender"] for row in found["totals"] if row["op"] == ops[0]} == set(four)
    total = next(row for row in found["totals"] if row["contender"] == "native")
    ms = sum(row["contenders"]["native"]["ms"] * row["times"] for row in convs)
    assert total["network ms"] == pytest.approx(ms) and total["layers"] == "4 of 4"


@pytest.mark.parametrize(
    "op, others", [("conv_bn_relu", {"native", "compile"}), ("conv_bn_train", {"native"})]
)
def test_every_tile_and_the_compiler(bench, kernels_on_the_cpu, tmp_path, op, others):
    words = ("--contender", "native", "compile", "--tiles", "--op", op)
    status, found = bench(tmp_path, *words, "--only", "(2, 64, 8, 8) -> 64, 1x1")
    (row,) = found["benchmarks"]
    assert status == 0, row["notes"]
    tiles = [name for name in row["contenders"] if name.startswith("native ")]
    assert len(tiles) == len({*tiles}) >= 10 and {"sm_80", "sm_90"} == {t.split()[1] for t in tiles}
    assert set(row["contenders"]) == {*others, *tiles}


def test_a_prologue_beside_what_it_replaces(bench, kernels_on_the_cpu, tmp_path):
    words = ("--contender", "native", "apart", "cudnn", "unfused", "--op", "norm_conv_train")
    status, found = bench(tmp_path, *words, "--only", "(2, 64, 8, 8) -> 256, 1x1")
    (row,) = found["benchmarks"]
    assert status == 0 and not row["notes"], row["notes"]
    assert set(row["contenders"]) == {"native", "apart", "cudnn", "unfused"}
    assert row["how"]["native"] == row["how"]["apart"] and row["times"] == 3


def test_who_fails_or_is_wrong_is_said_and_stops_nobody(bench, tmp_path, monkeypatch, capsys):
    right = fr.conv_bn_relu

    def off_by_one_pixel(*arguments):
        return right(*arguments).roll(1, 3)

    def out_of_resources(*arguments, **options):
        raise RuntimeError("out of resources\nand more")

    monkeypatch.setattr(fr, "conv_bn_relu", off_by_one_pixel)
    monkeypatch.setattr(torch, "compile", out_of_resources)
    words = ("--op", "conv_bn_relu", "--only", "(2, 64, 8, 8) -> 64, 3x3")
    status, found = bench(tmp_path, *words, "--contender", "fused", "compile", "unfused")
    (row,) = found["benchmarks"]
    assert status == 1 and list(row["contenders"]) == ["unfused"]
    assert row["notes"]["fused"].startswith("wrong: y: largest error")
    assert row["notes"]["compile"] == "failed: RuntimeError: out of resources"
    said = capsys.readouterr().out
    assert "2 failed or wrong" in said and "out of resources" in said


def test_places_of_a_network(monkeypatch):
    """The roles of the convolutions of ResNet-50 and 18: which end a block, which are shortcuts."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "kernels" / "cuda"))
    import gpu_cases

    for model, blocks in (("resnet50", 16), ("resnet18", 8)):
        found = gpu_cases.places(model, 2, 64)
        every = list(found.elements())
        assert len(every) == {"resnet50": 53, "resnet18": 20}[model]
        assert sum(place.residual for place in every) == blocks
        shortcuts = [place for place in every if not place.relu]
        assert len(shortcuts) == {"resnet50": 4, "resnet18": 3}[model]
        assert not any(place.residual for place in shortcuts)


def test_winners_are_kept_one_by_one(monkeypatch, tmp_path):
    """What was measured before a run is cut short is on the disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_winners", {})
    problems = [tuning.Problem(64, 64, c, 1, 1, 1, 1, "bfloat16") for c in (64, 128)]

    def measure(problem, backend, config):
        if problem == problems[1]:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        tuning.tune(problems, torch.device("cpu"), ("triton",), measure)
    assert list(tuning.read(tmp_path / "fused_resnet" / "cpu")) == problems[:1]


def day(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(DAY), *words],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )  # fmt: skip


def test_a_day_lists_its_sections():
    listed = [line.split()[0] for line in day("--list").stdout.splitlines()]
    assert listed[:4] == ["build", "device-tests", "ops", "resnet50"] and len(listed) >= 12
    assert {"tune", "tests", "sanitizer", "train", "ncu"} < set(listed)


def test_a_day_says_what_it_would_run(tmp_path):
    done = day("--dry-run", str(tmp_path / "o u t"))
    assert done.returncode == 0 and not done.stderr, done.stderr
    commands = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert len(commands) > 25
    listed = [line.split()[0] for line in day("--list").stdout.splitlines()]
    said = [line.split()[1].rstrip(",") for line in done.stdout.splitlines() if line[:2] == "=="]
    assert said == listed
    words = " ".join(commands).split()
    for file in {w for w in words if w.startswith(("benchmarks/", "tests/"))}:
        assert (ROOT / file).exists(), file
    # Whatever it would call knows its options.
    for path in ("benchmarks/kernels/cuda/bench_gpu_ops.py", "benchmarks/models/bench_resnet.py"):
        text = subprocess.run(
            [sys.executable, path, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=120
        ).stdout
        used = {w for line in commands if path in line for w in line.split(path)[1].split()}
        options = {w for w in used if w.startswith("--")}
        assert options and all(option in text for option in options), (path, options)
    assert not (tmp_path / "o u t" / "summary.txt").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--dry-run", "OUT", "lunch"), "no section lunch"), (("--eat",), "unknown option --eat"),
     ((), "gpu_day.sh")],
)  # fmt: skip
def test_a_day_refuses_what_it_does_not_know(tmp_path, words, said):
    done = day(*(str(tmp_path) if word == "OUT" else word for word in words))
    assert done.returncode == 2 and said in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_day_says_so(tmp_path):
    done = day(str(tmp_path), PATH="/usr/bin:/bin")
    assert done.returncode == 2 and "a GPU" in done.stderr and not list(tmp_path.iterdir())


def test_a_failing_section_stops_no_other(tmp_path):
    """A GPU by name alone: everything fails, and every section is tried."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("nvidia-smi", "echo 9.0"), ("python", 'echo "python $*"; exit 7')):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    out, path = tmp_path / "out", f"{tools}:/usr/bin:/bin"
    environment = {"PATH": path, "PYTHON": str(tools / "python")}
    names = ("build", "ops", "sanitizer")
    done = day(str(out), *names, **environment)
    assert done.returncode == 1, done.stderr
    lines = [line.split() for line in (out / "summary.txt").read_text().splitlines()]
    assert [line[0] for line in lines] == list(names)
    assert [line[1] for line in lines] == ["1", "1", "0"], lines
    log = (out / "build" / "log.txt").read_text()
    assert "TORCH_CUDA_ARCH_LIST=9.0a" in log and "exit status 7" in log
    assert "no compute-sanitizer" in (out / "sanitizer" / "log.txt").read_text()
    assert "bench_resnet" not in (out / "ops" / "log.txt").read_text()

    (tools / "python").write_text("#!/bin/sh\nexit 0\n")
    again = day("--seconds", "600", str(out), "ops", **environment)
    assert again.returncode == 0 and len((out / "summary.txt").read_text().splitlines()) == 3
    listed = day("--seconds", "0", str(out), **environment)
    assert listed.returncode == 1
    assert "ops: passed before" in listed.stdout and "train: no time left" in listed.stdout
