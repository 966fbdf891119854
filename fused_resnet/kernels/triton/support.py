"""What every kernel's launcher shares: is Triton there, dtypes, and the device of a launch."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
import threading
import warnings
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
# The interpreter exchanges functions of triton.language while a kernel runs: one thread at a time.
_INTERPRETER = threading.Lock()


def at_most(registers: int) -> dict[str, int]:
    """The launch option that limits a thread's registers; AMD's compiler knows none."""
    return {} if torch.version.hip else {"maxnreg": registers}


if IMPORT_ERROR is None:
    # Triton's interpreter (3.6 to 3.9) truncates float32 to bfloat16, loses bfloat16's subnormal
    # numbers both ways, and multiplies bfloat16 matrices wrongly: there all three are done by hand.
    BY_HAND = tl.constexpr(interpreting())

    @triton.jit
    def widened(v, dtype: tl.constexpr):
        """v, of any floating dtype, in float32 or float64."""
        if BY_HAND and v.dtype == tl.bfloat16:
            bits = v.to(tl.int16, bitcast=True).to(tl.int32) << 16
            return bits.to(tl.float32, bitcast=True)
        else:
            return v.to(dtype)

    @triton.jit
    def rounded(v, dtype: tl.constexpr):
        """v, float32 or float64, to dtype: to the nearest, ties to even."""
        if BY_HAND and dtype == tl.bfloat16:
            bits = v.to(tl.int32, bitcast=True)
            even = bits + 0x7FFF + ((bits >> 16) & 1)
            bits = tl.where(v == v, even, 0x7FC00000) >> 16
            return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
        else:
            return v.to(dtype)

    @triton.jit
    def probe_kernel(y_ptr, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(y_ptr + at, tl.load(y_ptr + at) + 1)


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
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < SMALLEST_CAPABILITY:
        name = "sm_{}{}".format(*capability)
        return f"Triton kernels need a GPU of sm_80 or later, this is {name}"
    return probe(device_type)


def probe(device_type: str) -> str | None:
    """None when a small kernel compiles and runs: Triton knows the GPU, finds the compilers that
    it calls, and a folder to keep what they made; else why not, in one line."""
    try:
        y = torch.zeros(16, device=device_type)
        launch(probe_kernel, (1,), y, BLOCK=16)
        if y.sum().item() == 16:
            return None
        found = f"a kernel gave {y.tolist()} for ones"
    except Exception as error:
        found = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return f"Triton {triton.__version__} does not run here ({found})"


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants), compiled first where it has not been yet."""
    if interpreting():
        with _INTERPRETER:
            kernel[grid](*args, **constants)
        return
    with_other_cache(lambda: kernel[grid](*args, **constants, **OPTIONS))


def with_other_cache(run: Any) -> Any:
    """run(); and again where what failed is the folder that Triton keeps compiled kernels in (no
    place, no permission, files of another make), with a folder of this process's own."""
    try:
        return run()
    except Exception as error:
        broken = isinstance(error, (OSError, ValueError, KeyError)) or "kernel image" in str(error)
        if not broken or _own_cache.cache_info().currsize:
            raise
        usual, own = triton.knobs.cache.dir, _own_cache()
        warnings.warn(
            f"fused_resnet: Triton's cache {usual} failed ({type(error).__name__}: {error}); until "
            f"this process ends its kernels are kept in {own}",
            RuntimeWarning,
            stacklevel=2,
        )
        triton.knobs.cache.dir = own
        return run()


@functools.cache
def _own_cache() -> str:
    folder = tempfile.mkdtemp(prefix="fused_resnet-triton-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


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
