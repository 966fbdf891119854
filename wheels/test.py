"""Installs the wheels of dist/ into fresh environments and runs check.py there, with no compiler on
PATH.

    python wheels/test.py --borrow .venv  # an environment that has torch: nothing is downloaded
    python wheels/test.py --all    # Pythons and torches of pyenv and the registry: gigabytes
"""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TORCH_2_11 = ("torch==2.11.0", "torchvision==0.26.0")


class Environment(NamedTuple):
    """packages: what pip installs; borrowed: an environment whose packages are used instead."""

    python: str
    packages: tuple[str, ...] = ()
    borrowed: str = ""
    pure: bool = False  # the wheel without kernels

    def __str__(self) -> str:
        return f"{self.python}, {' '.join(self.packages) or self.borrowed}" + (
            ", pure" if self.pure else ""
        )


# In the order of what they tell: the oldest torch, CPU-only torch, the newest.
DOWNLOADED = (
    Environment("3.10", TORCH_2_11),
    Environment("3.12", ("torch==2.11.0",)),
    Environment("3.11", ("torch==2.13.0+cpu",)),
    Environment("3.12", ("torch", "torchvision")),
    Environment("3.13", ("torch", "torchvision")),
    Environment("3.13", ("torch",), pure=True),
)


def interpreter(version: str) -> str | None:
    """The path of a Python of this version."""
    if version == ".".join(map(str, sys.version_info[:2])):
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = sorted(glob.glob(str(pyenv / "versions" / f"{version}.*" / "bin" / "python")))
    return found[-1] if found else shutil.which(f"python{version}")


def site_packages(environment: str) -> str:
    (folder,) = glob.glob(f"{environment}/lib/python*/site-packages")
    return os.path.abspath(folder)


def borrow(environment: str, target: str) -> None:
    """Shows the packages of another environment, but not a fused_resnet that is installed there:
    lines of .pth files in the added folder are not read."""
    Path(site_packages(target), "borrowed.pth").write_text(f"{site_packages(environment)}\n")


def test(environment: Environment, wheel: str, folder: str) -> None:
    python = interpreter(environment.python)
    assert python is not None
    subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [f"{folder}/bin/python", "-m", "pip", "install", "--quiet"]
    if environment.borrowed:
        borrow(environment.borrowed, folder)
    else:
        subprocess.run([*pip, *environment.packages, "numpy", "rich", "typer"], check=True)
    # Another version may lie in the borrowed packages.
    subprocess.run([*pip, "--no-deps", "--ignore-installed", wheel], check=True)
    kernels = "no" if environment.pure else "yes"
    subprocess.run(
        [f"{folder}/bin/python", str(ROOT / "wheels/check.py"), "--kernels", kernels],
        check=True, cwd=folder, env={"PATH": f"{folder}/bin", "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip


def wheel_of(platform: str) -> str:
    found = glob.glob(str(ROOT / f"dist/*{platform}*.whl"))
    if len(found) != 1:
        sys.exit(f"dist/ must hold one wheel for {platform}, it holds {found}: make wheel")
    return found[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="download Pythons' torches")
    parser.add_argument("--borrow", nargs="*", default=[], help="environments that have torch")
    parser.add_argument("--packages", nargs="*", default=[], help="what pip installs, beside it")
    arguments = parser.parse_args()
    wheels = {False: wheel_of("manylinux"), True: wheel_of("py3-none-any")}
    version = ".".join(map(str, sys.version_info[:2]))
    local = [Environment(version, borrowed=e) for e in arguments.borrow]
    local += [Environment(version, borrowed=e, pure=True) for e in arguments.borrow[:1]]
    if arguments.packages:
        local.append(Environment(version, tuple(arguments.packages)))
    outcomes = []
    for environment in DOWNLOADED if arguments.all else local:
        if interpreter(environment.python) is None:
            outcomes.append((environment, "not run: no such Python here"))
            continue
        print(f"\n== {environment}", flush=True)
        start = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
                test(environment, wheels[environment.pure], folder)
            outcomes.append((environment, f"passed, {time.perf_counter() - start:.0f} s"))
        except subprocess.CalledProcessError as error:
            outcomes.append((environment, f"FAILED: {error}"))
    print()
    for environment, outcome in outcomes:
        print(f"{environment}: {outcome}")
    passed = sum(outcome.startswith("passed") for _, outcome in outcomes)
    failed = sum(outcome.startswith("FAILED") for _, outcome in outcomes)
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0 or passed == 0)


if __name__ == "__main__":
    sys.exit(main())
