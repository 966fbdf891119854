"""The commands in subprocesses: tables, JSON, exit status and one-line error messages."""

from __future__ import annotations

import json

import pytest

from tests.cli.commands import run

pytest.importorskip("typer", reason="the command line needs typer and rich")
pytest.importorskip("rich", reason="the command line needs typer and rich")


def test_info():
    result = run("info", "--json")
    assert result.returncode == 0, result.stderr
    info = json.loads(result.stdout)
    assert {"versions", "machine"} <= set(info)
    table = run("info")
    assert "conv_bn_relu" in table.stdout and "torch" in table.stdout


def test_parity_holds_and_writes_json(tmp_path):
    pytest.importorskip("torchvision")
    out = tmp_path / "parity.json"
    result = run(
        "parity", "--model", "resnet18", "--dtype", "bfloat16", "--batch", "2", "--json", str(out)
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "parity holds" in result.stdout and "layer4.1" in result.stdout
    content = json.loads(out.read_text())
    assert "resnet18" in json.dumps(content) and "bfloat16" in json.dumps(content)


@pytest.mark.slow
def test_parity_in_training_mode():
    pytest.importorskip("torchvision")
    result = run("parity", "--model", "resnet18", "--mode", "train", "--batch", "4")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "gradient" in result.stdout


def test_parity_fails_with_exit_status_1_when_the_code_is_wrong():
    pytest.importorskip("torchvision")
    broken = (
        "from fused_resnet.fusion.inference import plan\n"
        "right = plan.scale_and_shift\n"
        "plan.scale_and_shift = lambda c, b, d: (right(c, b, d)[0], right(c, b, d)[1] * 1.02)"
    )
    result = run("parity", "--model", "resnet18", "--batch", "2", code=broken)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "parity holds" not in result.stdout


def test_bench_writes_json_and_a_plot(tmp_path):
    result = run(
        "bench", "--model=resnet18", "--batch=1", "--dtype=float32", "--contender=eager",
        "--contender=fused,fused-graph", f"--json={tmp_path / 'b.json'}",
        f"--plot={tmp_path / 'b.png'}", "--seconds=1",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    (case,) = json.loads((tmp_path / "b.json").read_text())["cases"]
    fused = case["contenders"]["fused"]
    assert fused["images_per_s"] > 0 and fused["ratio_to_eager"] > 0 and fused["share_of_limit"] > 0
    assert case["skipped"] == {"fused-graph": "fused-graph: CUDA graphs need a GPU"}
    assert "fused_resnet, CUDA graph left out: CUDA graphs need a GPU" in result.stdout
    assert (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("parity", "--model", "resnet19"), "resnet19"),
        (("parity", "--dtype", "int8"), "int8"),
        (("parity", "--batch", "0"), "batch"),
        (("parity", "--images", "/no/such/folder"), "folder"),
        (("parity", "--checkpoint", "/no/such/file.pt", "--model", "resnet18"), "file.pt"),
        (("bench", "--contender", "tensorflow"), "tensorflow"),
        (("bench", "--batch", "-3"), "-3"),
        (("bench", "--mode", "serve"), "serve"),
        (("parity", "--device", "cuda:77", "--model", "resnet18"), "cuda"),
        (("dance",), "dance"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_wrong_arguments_are_named_without_a_traceback(arguments, words):
    """In this process; `test_a_wrong_argument_in_a_process` runs one as users do."""
    from typer.testing import CliRunner

    from fused_resnet.cli import application

    result = CliRunner().invoke(application(), list(arguments))
    assert result.exit_code == 2, result.output
    assert words in result.output and "Traceback" not in result.output


def test_a_wrong_argument_in_a_process():
    result = run("parity", "--model", "resnet19")
    output = result.stdout + result.stderr
    assert result.returncode == 2, output
    assert "resnet19" in output and "Traceback" not in output


def test_missing_libraries_are_named_in_one_line():
    block = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('typer', 'rich'): raise ModuleNotFoundError(name)\n"
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda n, *a: None if n in ('typer', 'rich') else find(n, *a)\n"
        "sys.meta_path.insert(0, Block())"
    )
    result = run("info", code=block)
    output = (result.stdout + result.stderr).strip()
    assert result.returncode != 0 and "pip install" in output, output
    assert len(output.splitlines()) == 1, output
