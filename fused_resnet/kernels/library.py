"""The compiled library: its ops, ``torch.ops.fused_resnet_native.*``, and its C functions.

The library links libtorch's stable ABI and no Python: one file serves every Python, and every torch
from 2.11 on. `csrc/facts.cpp` has the other half of this file.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fused_resnet.version import __version__, too_old

FILE = Path(__file__).parents[1] / "libfused_resnet.so"
OPS = "fused_resnet_native"
_HOW_TO_BUILD = (
    "to build them, run `pip install --no-build-isolation .` in an environment that has "
    "torch >= 2.11 and a C++ compiler"
)

_TEXT, _NUMBERS, _COUNT = ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64), ctypes.c_int64
_Two, _Three, _Four, _Seven = (ctypes.c_int64 * n for n in (2, 3, 4, 7))
# The C functions: what they return, and what they take.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "build_info": (_TEXT,),
    "gemm_tiles": (_TEXT,),
    "cuda_kernels": (_TEXT,),
    "memory": (None, _NUMBERS),
    "reset_memory_peak": (None,),
    "release_memory": (_COUNT,),
    "conv_passes": (None, _NUMBERS),
    "convolution_reason": (_TEXT, _NUMBERS, _TEXT, _NUMBERS, _COUNT),
    "training_reason": (_TEXT, _TEXT, _NUMBERS, _TEXT, _NUMBERS),
    "widens_bfloat16": (ctypes.c_bool,),
    "widen_bfloat16": (None, ctypes.c_int),
}


_parsed = functools.lru_cache(4)(json.loads)


class Unavailable(Exception):
    """Why the library is not used, in one line."""


class Library:
    """The loaded library; a method for each C function, which tells the arguments."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        for name, (returned, *taken) in _SIGNATURES.items():
            function = getattr(handle, f"fused_resnet_{name}")
            function.restype, function.argtypes = returned, taken
        self._c = handle

    def _json(self, name: str) -> Any:
        return _parsed(getattr(self._c, f"fused_resnet_{name}")())

    def _three(self, name: str) -> list[int]:
        values = _Three()
        getattr(self._c, f"fused_resnet_{name}")(values)
        return list(values)

    def build_info(self) -> dict[str, object]:
        return dict(self._json("build_info"))

    def gemm_tiles(self) -> list[dict[str, int]]:
        return list(self._json("gemm_tiles"))

    def cuda_kernels(self) -> list[dict[str, object]]:
        """One row per CUDA kernel: name, arch, registers, shared_bytes. On a machine with a GPU
        this initialises the CUDA runtime."""
        return list(self._json("cuda_kernels"))

    def memory(self) -> dict[str, int]:
        names = ("used_bytes", "free_bytes", "peak_bytes")
        return dict(zip(names, self._three("memory"), strict=True))

    def reset_memory_peak(self) -> None:
        self._c.fused_resnet_reset_memory_peak()

    def release_memory(self) -> int:
        return int(self._c.fused_resnet_release_memory())

    def conv_passes(self) -> list[int]:
        """How many convolutions, input gradients and weight gradients the CPU training kernels have
        run in this process."""
        return self._three("conv_passes")

    def convolution_reason(
        self, weight_shape: Sequence[int], dtype: str, dilation: Sequence[int], groups: int
    ) -> str | None:
        found = self._c.fused_resnet_convolution_reason(
            _Four(*weight_shape), dtype.encode(), _Two(*dilation), groups
        )
        return None if found is None else found.decode()

    def training_reason(
        self, work: str, weight_shape: Sequence[int], dtype: str, geometry: Sequence[int]
    ) -> str | None:
        found = self._c.fused_resnet_training_reason(
            work.encode(), _Four(*weight_shape), dtype.encode(), _Seven(*geometry)
        )
        return None if found is None else found.decode()

    def widens_bfloat16(self) -> bool:
        return bool(self._c.fused_resnet_widens_bfloat16())

    def widen_bfloat16(self, choice: bool | None) -> None:
        self._c.fused_resnet_widen_bfloat16(-1 if choice is None else int(choice))


def _loaded_elsewhere(file: Path) -> str | None:
    """The version of another library than this whose ops the process has already."""
    if f"{OPS}::version" not in torch._C._dispatch_get_all_op_names():
        return None
    try:
        ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD)
    except OSError:
        return str(torch.ops.fused_resnet_native.version())
    return None  # this one, which the package loaded before it was imported anew


def load(file: Path = FILE) -> Library:
    """Loads the library and registers its ops, or raises Unavailable."""
    reason = too_old(torch.__version__)
    if reason is not None:
        raise Unavailable(f"the native kernels cannot be loaded: {reason}")
    if not file.exists():
        raise Unavailable(f"the native kernels were not built; {_HOW_TO_BUILD}")
    other = _loaded_elsewhere(file)
    if other is not None:
        # Registering the ops a second time would end the process.
        raise Unavailable(
            f"the native kernels of fused_resnet {__version__} cannot be loaded: this process has "
            f"those of fused_resnet {other} already, from another place"
        )
    try:
        torch.ops.load_library(str(file))
        library = Library(ctypes.CDLL(str(file)))
    except (OSError, RuntimeError, AttributeError) as error:
        found = error.__cause__ or error  # PyTorch's own error names the file alone
        lines = str(found).strip().splitlines()
        cause = lines[0] if lines else type(found).__name__
        raise Unavailable(
            f"the native kernels cannot be loaded ({cause}); {_HOW_TO_BUILD}"
        ) from error
    built = library.build_info()["version"]
    if built != __version__:
        raise Unavailable(
            f"the native kernels in {file} are those of fused_resnet {built}, this is fused_resnet "
            f"{__version__}; {_HOW_TO_BUILD}"
        )
    return library
