"""Helpers of all launchers: availability of Triton, dtype conversion, and kernel launches."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
import threading
import traceback
import warnings
from typing import Any

import torch
from torch import Tensor

from fused_resnet.kernels.cache import refuse_capture
from fused_resnet.kernels.target import Target, current, target_of

MIN_VERSION = (3, 6)  # of Triton
MIN_CAPABILITY = (8, 0)  # bfloat16 and asynchronous copies; Triton's own minimum for both

try:
    import triton
    import triton.language as tl

    IMPORT_ERROR: str | None = None
except Exception as error:  # not installed, or incompatible with this torch
    IMPORT_ERROR = f"{type(error).__name__}: {error}"


def on_host() -> bool:
    """Whether Triton runs kernels on the host (triton.knobs.runtime.interpret)."""
    return IMPORT_ERROR is None and bool(triton.knobs.runtime.interpret)


# Options of every launch. As everywhere in this package, a product and a sum may be fused into one
# rounding. Without the option, Triton 3.9 warns, and 3.10 will not fuse.
OPTIONS = {"enable_fp_fusion": True}
# On the host Triton patches its own functions while a kernel runs: one thread at a time.
_HOST_LOCK = threading.Lock()


def at_most(registers: int) -> dict[str, int]:
    """The launch option that limits a thread's registers; AMD's compiler has none."""
    amd = target_of(torch.device("cuda")).vendor == "amd"
    return {} if amd else {"maxnreg": registers}


if IMPORT_ERROR is None:
    # On the host Triton (3.6 to 3.9) truncates float32 to bfloat16, loses bfloat16's subnormal
    # values in both directions, and multiplies bfloat16 matrices wrongly. The kernels work around
    # all three there.
    ON_HOST = tl.constexpr(on_host())

    @triton.jit
    def widened(v, dtype: tl.constexpr):
        """v, of any floating dtype, converted to float32 or float64."""
        if ON_HOST and v.dtype == tl.bfloat16:
            bits = v.to(tl.int16, bitcast=True).to(tl.int32) << 16
            return bits.to(tl.float32, bitcast=True)
        else:
            return v.to(dtype)

    @triton.jit
    def activated(v, ACTIVATION: tl.constexpr):
        """activation(v), by the numbers of `Activation`."""
        if ACTIVATION == 1:
            v = tl.where(v < 0, 0.0, v)
        return v

    @triton.jit
    def rounded(v, dtype: tl.constexpr):
        """v, float32 or float64, rounded to dtype: to nearest, ties to even."""
        if ON_HOST and dtype == tl.bfloat16:
            bits = v.to(tl.int32, bitcast=True)
            even = bits + 0x7FFF + ((bits >> 16) & 1)
            bits = tl.where(v == v, even, 0x7FC00000) >> 16
            return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
        else:
            return v.to(dtype)

    @triton.jit
    def divided(a, b):
        """a / b, rounded to nearest. Of float32, Triton's own operator is off by up to 2 ulp."""
        if b.dtype == tl.float32:
            return tl.div_rn(a, b)
        else:
            return a / b

    @triton.jit
    def square_root(v):
        """The square root, rounded to nearest. Triton's own one of float32 is an approximation."""
        if v.dtype == tl.float32:
            return tl.sqrt_rn(v)
        else:
            return tl.sqrt(v)

    @triton.jit
    def to_tf32(v):
        """v, float32, rounded to TF32: to nearest, ties away from zero, as cvt.rna.tf32 does it.
        Tensor cores truncate their operands instead: twice the error, and biased towards zero."""
        bits = v.to(tl.int32, bitcast=True)
        bits += tl.where(tl.abs(v) < float("inf"), 0x1000, 0)  # a NaN could become zero
        return (bits & ~0x1FFF).to(tl.float32, bitcast=True)

    @triton.jit
    def probe_kernel(y_ptr, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(y_ptr + at, tl.load(y_ptr + at) + 1)


@functools.cache
def unavailable(target: Target, device_type: str) -> str | None:
    """None if Triton compiles for the target and its kernels run on tensors on `device_type`, else
    the reason in one line."""
    if IMPORT_ERROR is not None:
        return f"Triton cannot be imported ({IMPORT_ERROR}): pip install triton"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MIN_VERSION:
        required = ".".join(map(str, MIN_VERSION))
        return f"Triton {triton.__version__} is too old: {required} or later is required"
    if target.vendor not in ("nvidia", "amd"):
        return "Triton kernels need a GPU"
    if target.architecture == "none":
        return "no CUDA device is available"
    if target.vendor == "nvidia" and target.capability < MIN_CAPABILITY:
        return f"Triton kernels need a GPU of sm_80 or later, this is {target.architecture}"
    return probe(device_type)


def probe(device_type: str) -> str | None:
    """None if a small kernel compiles and runs, else the reason in one line. Checks that Triton
    supports the GPU, and finds its compilers and a writable cache folder."""
    refuse_capture("Triton")
    try:
        y = torch.zeros(16, device=device_type)
        launch(probe_kernel, (1,), y, BLOCK=16)
        if y.sum().item() == 16:
            return None
        cause = f"a kernel returned {y.tolist()} for ones"
    except Exception as error:
        cause = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return f"Triton {triton.__version__} does not work ({cause})"


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Runs kernel[grid](*args, **constants), which compiles the kernel at the first launch. With a
    first argument on "meta" only compiles, what a launch with such tensors on a GPU would."""
    if args[0].is_meta:
        if not on_host():
            with_fallback_cache(lambda: kernel.warmup(*args, grid=grid, **constants, **OPTIONS))
    elif on_host():
        with _HOST_LOCK:
            kernel[grid](*args, **constants)
    else:
        with_fallback_cache(lambda: kernel[grid](*args, **constants, **OPTIONS))


def with_fallback_cache(run: Any) -> Any:
    """run(). If Triton's cache of compiled kernels fails (no space, no permission, incompatible
    files), retries with a temporary folder of this process."""
    try:
        return run()
    except Exception as error:
        if not _of_cache(error) or _temporary_cache.cache_info().currsize:
            raise
        folder, temporary = triton.knobs.cache.dir, _temporary_cache()
        warnings.warn(
            f"fused_resnet: Triton's cache {folder} failed ({type(error).__name__}: {error}); this "
            f"process caches kernels in {temporary} instead",
            RuntimeWarning,
            stacklevel=2,
        )
        triton.knobs.cache.dir = temporary
        return run()


def _of_cache(error: Exception) -> bool:
    """Whether Triton's cache of compiled kernels is the cause of an error.

    Broken files raise whatever reading them raises (of JSONDecodeError, UnicodeDecodeError,
    KeyError, TypeError, AttributeError and OSError each was seen), and so do wrong arguments of a
    kernel. So the place decides: where Triton reads and writes files, or the GPU's driver, which
    refuses a truncated binary."""
    reading = triton.compiler.CompiledKernel.__init__.__code__
    places = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return "kernel image is invalid" in str(error) or any(
        f.f_code is reading or f.f_globals.get("__name__") == "triton.runtime.cache" for f in places
    )


@functools.cache
def _temporary_cache() -> str:
    folder = tempfile.mkdtemp(prefix="fused_resnet-triton-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def accumulate(dtype: torch.dtype) -> Any:
    """The Triton dtype in which sums over tensors of `dtype` are accumulated."""
    return tl.float64 if dtype == torch.float64 else tl.float32


# Indices from here on need 64 bits: those of a tile that extends past the end must fit as well.
LARGE = 2**31 - 2**20


def index_type(*tensors: Tensor | None) -> Any:
    """The integer type that can hold the offsets into all of these tensors, of any strides."""

    def reach(t: Tensor) -> int:
        last = [(size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)]
        return 1 + sum(last)

    large = any(t is not None and reach(t) >= LARGE for t in tensors)
    return tl.int64 if large else tl.int32


def launch_on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes x's device current, since Triton launches on the current device and its stream."""
    return current(x.device)
