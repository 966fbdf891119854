"""The Triton implementations of the ops, with the signatures that ops/ uses for every provider."""

from .backward import convolution_dweight, convolution_dx
from .batch_norm import bn_add_relu, bn_add_relu_backward
from .elementwise import add_relu, add_relu_backward, add_relu_out

__all__ = [
    "add_relu",
    "add_relu_backward",
    "add_relu_out",
    "bn_add_relu",
    "bn_add_relu_backward",
    "convolution_dweight",
    "convolution_dx",
]
