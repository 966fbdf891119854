"""Residual blocks whose norms, additions and ReLUs are one pass each, on the CPU."""

from . import layers
from .functional import add_relu, norm_add_relu

__all__ = ["add_relu", "layers", "norm_add_relu"]
