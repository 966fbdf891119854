"""Fused conv-BN-ReLU and residual-add-ReLU for PyTorch, with a drop-in ResNet family."""

from .backends import use_backend
from .ops import add_relu, bn_add_relu, conv_bn_relu

__version__ = "0.1.0"

__all__ = ["add_relu", "bn_add_relu", "conv_bn_relu", "use_backend"]
