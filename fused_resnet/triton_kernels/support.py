"""What every kernel's launcher shares: is Triton there, dtypes, and the device of a launch."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

OLDEST = (3, 6)  # of Triton
SMALLEST_CAPABILITY = (8, 0)  # bfloat16 and asynchronous copies; Triton's own floor for both

try:
    import triton
    import triton.language as tl

    IMPORT_ERROR: str | None = None
except Exception as error:  # absent, or broken beside this torch
    IMPORT_ERROR = f"{type(error).__name__}: {error}"


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when it was imported)."""
    return IMPORT_ERROR is None and bool(triton.knobs.runtime.interpret)


# Of every launch. Products and sums may fuse into one rounding, as everywhere in this package;
# unsaid, Triton 3.9 warns, and 3.10 will not fuse.
OPTIONS = {"enable_fp_fusion": True}

if IMPORT_ERROR is None:
    # Triton's interpreter (3.6 to 3.9) truncates float32 to bfloat16, and multiplies bfloat16
    # matrices wrongly: there both are done by hand.
    BY_HAND = tl.constexpr(interpreting())

    @triton.jit
    def rounded(v, dtype: tl.constexpr):
        """v, float32 or float64, to dtype: to the nearest, ties to even."""
        if BY_HAND and dtype == tl.bfloat16:
            bits = v.to(tl.int32, bitcast=True)
            even = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
            v = tl.where(v == v, even.to(tl.float32, bitcast=True), v)
        return v.to(dtype)


@functools.cache
def unavailable(device_type: str) -> str | None:
    """None when the Triton kernels serve tensors of that device, else why not, in one line."""
    if IMPORT_ERROR is not None:
        return f"Triton does not import ({IMPORT_ERROR}): pip install triton"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST:
        return f"Triton {triton.__version__} is too old: {OLDEST[0]}.{OLDEST[1]} is needed"
    if interpreting():
        return None
    if device_type != "cuda":
        return "Triton kernels run on a GPU, or anywhere in its interpreter (TRITON_INTERPRET=1)"
    if torch.version.hip is not None:
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < SMALLEST_CAPABILITY:
        name = "sm_{}{}".format(*capability)
        return f"Triton kernels need a GPU of sm_80 or later, this is {name}"
    return None


def accumulate(dtype: torch.dtype) -> Any:
    """The Triton dtype that sums of tensors of `dtype` are kept in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def index_type(*tensors: Tensor | None) -> Any:
    """The integer type that offsets into all of these tensors fit into."""
    large = any(t is not None and t.numel() >= 2**31 - 2**20 for t in tensors)
    return tl.int64 if large else tl.int32


def launch_on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device and its current stream: make that x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; a small number where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4
