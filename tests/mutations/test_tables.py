"""The tables of tests/mutations name code that is there: others would never be tried."""

from __future__ import annotations

import pytest

from tests import ROOT
from tests.mutations.cuda import CUDA
from tests.mutations.gpu import GPU_PYTHON
from tests.mutations.native import AVX2, AVX512, CPP
from tests.mutations.python import PYTHON


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
