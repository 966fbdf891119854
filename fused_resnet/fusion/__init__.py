"""Runs modules on fused kernels: the entry points that models call.

The `run_*` functions return a tensor computed by fused kernels, or None: then the module must run
torchvision's path. The decision is made per call, from

    the call     call.py: tracing, transforms, forced backend, device, kind of tensor
    the modules  structure.py: exact types, no hooks, nothing patched
    the tensors  inference/plan_cache.py, training/prepare.py: caches, valid while nothing changed
"""

from .block import run_block
from .explain import Explanation, explain
from .members import register_blocks
from .network import run_resnet
from .structure import STEM, Names
from .training.activation_memory import set_activation_memory
from .training.network import enter_stages, head, run_in_segments
from .training.stem import run_pooled_stem, run_stem
from .training.units import run_norm, run_projection

__all__ = [
    "STEM",
    "Explanation",
    "Names",
    "enter_stages",
    "explain",
    "head",
    "register_blocks",
    "run_block",
    "run_in_segments",
    "run_norm",
    "run_pooled_stem",
    "run_projection",
    "run_resnet",
    "run_stem",
    "set_activation_memory",
]
