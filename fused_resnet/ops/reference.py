"""The specification: the eager function of each op, named after the op.

Every provider is tested against these functions, which are also the fallback of all providers. They
consist of differentiable PyTorch operations, so autograd defines every backward and second
derivative.
"""

from .add_relu import add_relu_backward_reference as add_relu_backward
from .add_relu import add_relu_reference as add_relu
from .bn_add_relu import bn_add_relu_backward_reference as bn_add_relu_backward
from .bn_add_relu import bn_add_relu_reference as bn_add_relu
from .conv_bn_relu import conv_bn_relu_reference as conv_bn_relu
from .conv_norm_relu import conv_norm_relu_reference as conv_norm_relu

__all__ = [
    "add_relu",
    "add_relu_backward",
    "bn_add_relu",
    "bn_add_relu_backward",
    "conv_bn_relu",
    "conv_norm_relu",
]
