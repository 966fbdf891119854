"""The tables of tests/mutations.py name code that is there: others would never be tried."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_mutations import CUDA
from gpu_mutations import GPU_PYTHON
from native_mutations import AVX2, AVX512, CPP
from python_mutations import PYTHON

ROOT = Path(__file__).parent.parent


def test_every_mutation_has_its_text() -> None:
    if not (ROOT / "csrc").is_dir():
        pytest.skip("no sources beside the tests")
    mutations = [*CUDA, *GPU_PYTHON, *AVX2, *AVX512, *CPP, *PYTHON]
    texts = {file: (ROOT / file).read_text() for _, file, *_ in mutations}
    missing = [name for name, file, old, *_ in mutations if old not in texts[file]]
    assert not missing
    names = [name for name, *_ in mutations]
    assert sorted(names) == sorted(set(names)), "two of one name"
    assert all(old != new for _, _, old, new, _ in mutations)
