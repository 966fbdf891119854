"""Compiled Triton kernels and the cache of them, in separate processes that compile for a GPU that
need not be available, because the interpreter does not compile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from fused_resnet.kernels.triton import support

BUILD = """
import json, sys, warnings
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fused_resnet.kernels.triton import support

def build(name="y_ptr"):
    source = ASTSource(support.probe_kernel, {name: "*fp32", "BLOCK": "constexpr"}, {(1,): 16})
    options = {"num_warps": 4, **support.OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
"""


def compile_with_cache(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "always", "-c", BUILD + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.slow
def test_unwritable_cache_is_replaced_with_one_warning(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    run = compile_with_cache(tmp_path / "file", """
for _ in range(2):
    assert len(support.with_fallback_cache(build).asm["cubin"]) > 1000
""")  # fmt: skip
    warnings = [line for line in run.stderr.splitlines() if "Triton's cache" in line]
    assert run.returncode == 0 and len(warnings) == 1, run.stderr
    assert str(tmp_path / "file") in warnings[0] and "fused_resnet-triton-" in warnings[0]
    temporary = Path(warnings[0].split()[-1])
    assert not temporary.exists(), "the temporary cache was not removed at exit"


# Every kind of damage; Triton itself compiles again if the list of files is truncated.
CORRUPT = """
build()
folder = triton.knobs.cache.dir
(data,), (group,), (text,) = (
    list(Path(folder).rglob(name)) for name in ("probe_*.json", "__grp__*", "*.ptx")
)
whole = {path: path.read_bytes() for path in (data, group, text)}
less = {k: v for k, v in json.loads(whole[data]).items() if k != "shared"}
kinds = set()
for path, content in (
    (data, whole[data][:500]), (data, b"\\xff\\xfe"), (data, b"[]"), (data, b"{}"),
    (data, json.dumps(less).encode()), (data, None), (group, b"[]"), (text, b"\\xff\\xfe"),
):
    for file, original in whole.items():
        file.write_bytes(original)
    if content is None:
        path.unlink(), path.mkdir()
    else:
        path.write_bytes(content)
    triton.knobs.cache.dir = folder
    support._temporary_cache.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        assert len(support.with_fallback_cache(build).asm["cubin"]) > 1000
    assert len(caught) == 1, (path, content, caught)
    kinds.add(str(caught[0].message).split(" failed (")[1].split(":")[0])
    if content is None:
        path.rmdir()
print(*sorted(kinds))
"""


@pytest.mark.slow
def test_corrupt_cache_is_rebuilt(tmp_path):
    run = compile_with_cache(tmp_path, CORRUPT)
    assert run.returncode == 0, run.stderr
    kinds = {"JSONDecodeError", "UnicodeDecodeError", "TypeError", "KeyError", "AttributeError"}
    assert set(run.stdout.split()) == kinds | {"IsADirectoryError"}


@pytest.mark.parametrize(
    "error", [ValueError("Pointer argument (at 0) cannot be accessed"), KeyError("num_warp"),
              OSError("no C compiler"), RuntimeError("no kernel image is available")],
    ids=repr,
)  # fmt: skip
def test_other_errors_do_not_replace_the_cache(monkeypatch, error):
    """Wrong arguments and missing tools; a new cache would compile everything again."""

    def run() -> None:
        raise error

    support._temporary_cache.cache_clear()
    monkeypatch.setattr(support.triton.knobs.cache, "dir", "unchanged")
    with pytest.raises(type(error)):
        support.with_fallback_cache(run)
    assert support.triton.knobs.cache.dir == "unchanged"


COMPILE_AHEAD = """
import torch
from concurrent.futures import ThreadPoolExecutor
from fused_resnet.kernels.problem import Geometry, Problem
from fused_resnet.kernels.triton import convolution
from fused_resnet.layout import channels_last, channels_last_empty

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
config = convolution.Config(64, 32, 32, 4, 3)
problems = [
    Problem("conv_bn_relu", torch.bfloat16, (32, 32, k, k), Geometry((1, 1), (k // 2,) * 2, (1, 1)),
            (2, 32, 9, 9))
    for k in (1, 3)
]
with ThreadPoolExecutor(2) as pool:
    cpu = torch.device("cpu")
    list(pool.map(lambda p: convolution.compile_ahead(p, config, cpu), problems))
kernel = convolution.conv_bn_relu_kernel
compiled = kernel.device_caches[0][0]
assert len(compiled) == 2 and all(len(k.asm["cubin"]) > 1000 for k in compiled.values())
# A launch finds them: with memory, here the host's, nothing else is compiled.
convolution.launch = lambda kernel, grid, *args, **constants: kernel.warmup(
    *args, grid=grid, **constants, **support.OPTIONS
)
for p in problems:
    x, weight = (channels_last(torch.ones(s, dtype=p.dtype)) for s in (p.x_shape, p.weight_shape))
    vector, y = torch.ones(32), channels_last_empty(p.y_shape, x)
    relu = convolution.Activation.RELU
    convolution.run(x, weight, vector, vector, None, y, relu, p.geometry, config)
assert len(compiled) == 2
"""


def test_kernels_compiled_ahead_are_those_that_are_launched(tmp_path):
    run = compile_with_cache(tmp_path, COMPILE_AHEAD)
    assert run.returncode == 0, run.stderr
