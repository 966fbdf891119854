"""Every mutation's old text exists in its file; others could not be applied."""

from __future__ import annotations

import pytest

from tests import ROOT
from tests.mutations.compilers import COMPILERS
from tests.mutations.cuda import CUDA
from tests.mutations.gpu import GPU_PYTHON
from tests.mutations.memory import MEMORY
from tests.mutations.native import AVX2, AVX512, CPP
from tests.mutations.packages import PACKAGES
from tests.mutations.python import PYTHON


def test_every_mutation_has_its_text() -> None:
    if not (ROOT / "csrc").is_dir():
        pytest.skip("the C++ sources are not available")
    mutations = [*CUDA, *GPU_PYTHON, *AVX2, *AVX512, *CPP, *PYTHON, *PACKAGES, *COMPILERS, *MEMORY]
    texts = {file: (ROOT / file).read_text() for _, file, *_ in mutations}
    missing = [name for name, file, old, *_ in mutations if old not in texts[file]]
    assert not missing
    names = [name for name, *_ in mutations]
    assert sorted(names) == sorted(set(names)), "duplicate names"
    assert all(old != new for _, _, old, new, _ in mutations)
