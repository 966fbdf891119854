"""The ops as PyTorch sees them."""

from .library import add_relu, bn_add_relu, conv_bn_relu

__all__ = ["add_relu", "bn_add_relu", "conv_bn_relu"]
