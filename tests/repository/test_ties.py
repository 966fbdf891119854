"""Ties between the tiers that no import statement shows. What imports show, import-linter checks
(`make lint`, contracts in pyproject.toml)."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import fused_resnet

PACKAGE = Path(fused_resnet.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# The ops are defined there; kernels and the bottom know of this package's native ops alone.
ABOVE_KERNELS = ("cli", "depth", "train", "bench", "parity", "models", "graphs", "fusion", "layers")


def strings(path: Path) -> list[str]:
    """The string constants of a file that are no docstrings."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    ]


def test_kernels_call_no_registered_op():
    below = [f for f in FILES if f.relative_to(PACKAGE).parts[0] not in (*ABOVE_KERNELS, "ops")]
    assert len(below) > 25
    calling = [f.name for f in below if re.search(r"ops\.fused_resnet\b", f.read_text())]
    assert not calling


def test_no_module_is_named_in_a_string():
    """But by a file that starts itself as a process."""
    named = {}
    for path in FILES:
        own = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        found = [s for s in strings(path) if re.fullmatch(r"fused_resnet(\.\w+)+", s)]
        named[own] = [s for s in found if s != own]
    assert not {k: v for k, v in named.items() if v}


def test_product_code_does_not_name_what_tests_run_kernels_in():
    words = re.compile("emulat|interpreter")
    naming = [str(f) for f in FILES if any(map(words.search, strings(f)))]
    assert not naming


def test_importing_the_package_imports_the_floors_once():
    """A module found under two names would have two caches and two registries."""
    by_file: dict[str, set[int]] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("fused_resnet") and getattr(module, "__file__", None):
            by_file.setdefault(str(module.__file__), set()).add(id(module))
    assert by_file and all(len(modules) == 1 for modules in by_file.values())
