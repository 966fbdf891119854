"""Runs modules on fused kernels: the entry points that models call."""

from .description import Names, register
from .explain import Explanation, explain
from .network import NetworkNames
from .regions.export import export
from .regions.region import fuse, unfuse, verified
from .run import run_block, run_network
from .store import refresh
from .training.activation_memory import set_activation_memory
from .training.units import run_norm, run_projection

__all__ = [
    "Explanation",
    "Names",
    "NetworkNames",
    "explain",
    "export",
    "fuse",
    "refresh",
    "register",
    "run_block",
    "run_network",
    "run_norm",
    "run_projection",
    "set_activation_memory",
    "unfuse",
    "verified",
]
