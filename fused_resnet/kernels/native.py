"""Loads the compiled extension ``fused_resnet._C``, or says why it is not there.

Importing the extension registers the C++ kernels as ``torch.ops.fused_resnet_native.*``.
Loading it never initialises CUDA.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from types import ModuleType

_HOW_TO_BUILD = (
    "`pip install --no-build-isolation .` in an environment that holds torch >= 2.11 and a "
    "C++ compiler builds them"
)


@functools.cache
def _import_extension() -> tuple[ModuleType | None, str | None]:
    if importlib.util.find_spec("fused_resnet._C") is None:
        return None, f"the native kernels were not built; {_HOW_TO_BUILD}"
    try:
        # The extension links against libtorch, which importing torch brings into the process.
        importlib.import_module("torch")
        return importlib.import_module("fused_resnet._C"), None
    except (ImportError, OSError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        cause = lines[0] if lines else type(error).__name__
        return None, f"the native kernels do not load here ({cause}); {_HOW_TO_BUILD}"


def load() -> str | None:
    """Loads the extension once. Returns None when it is there, else one line that says why not."""
    return _import_extension()[1]


def build_info() -> dict[str, object]:
    """What was built: compiler, flags, torch and CUDA versions, CUDA architectures, and the
    instruction set the CPU kernels use on this machine. Empty when the extension is missing."""
    module = _import_extension()[0]
    return dict(module.build_info()) if module is not None else {}


def gemm_tiles() -> list[dict[str, int]]:
    """The tiles that the CUDA convolutions were built for, in the order of their numbers:
    architecture, block_m, block_n, warps, stages, and whether there are kernels that apply a norm
    and a ReLU to what they read. Empty when the extension is missing."""
    module = _import_extension()[0]
    return list(module.gemm_tiles()) if module is not None else []


@functools.cache
def built_for(architecture: str) -> bool:
    """Whether the CUDA kernels were built for this architecture, as in TORCH_CUDA_ARCH_LIST."""
    return architecture in re.split("[; ]", str(build_info().get("cuda_archs")))


def runs_on(capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability finds code in the build: its own machine code, that
    of an older minor version, or PTX of any older one."""
    for name in re.split("[; ]", str(build_info().get("cuda_archs"))):
        found = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", name)
        if found is None:
            continue
        built = int(found[1]), int(found[2])
        same = built[0] == capability[0] and built <= capability
        if built == capability or (same and not found[3]):
            return True
        if found[4] and not found[3] and built <= capability:
            return True
    return False


def widens_bfloat16() -> bool:
    """Whether convolutions of bfloat16 on the CPU are multiplied in float32: where the processor's
    dot product of bfloat16 is the slower way, or there is none."""
    module = _import_extension()[0]
    return module is not None and bool(module.widens_bfloat16())


def widen_bfloat16(choice: bool | None) -> None:
    """Multiply them so (True), by the dot product where there is one (False), or by whichever is
    faster (None), from now on. Weights that are packed already stay as they are."""
    module = _import_extension()[0]
    if module is not None:
        module.widen_bfloat16(choice)


def kernels() -> list[dict[str, object]]:
    """One entry per kernel: name, device, architecture; for CUDA kernels, on a machine with a
    GPU, registers and shared memory too (asking for those initialises CUDA)."""
    module = _import_extension()[0]
    return list(module.kernels()) if module is not None else []


def memory() -> dict[str, int]:
    """Bytes of the CPU memory that training steps take again and again: `used_bytes` by tensors
    that live, `free_bytes`, and `peak_bytes`, the most used since `reset_memory_peak`. Empty when
    the extension is missing."""
    module = _import_extension()[0]
    return dict(module.memory()) if module is not None else {}


def reset_memory_peak() -> None:
    module = _import_extension()[0]
    if module is not None:
        module.reset_memory_peak()


def release_memory() -> int:
    """Gives the CPU memory that training has used, and no tensor lives in, back to the system.

    A training step on the CPU takes the memory of the step before, instead of fresh memory that
    costs a page fault per 4 KiB; what nobody has taken for some steps goes back by itself. Call
    this when a training is over and the process goes on. Returns the bytes given back.
    """
    module = _import_extension()[0]
    return int(module.release_memory()) if module is not None else 0
