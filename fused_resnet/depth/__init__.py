"""Profiles of a network by layer: gradients, responses and the loss around a solution.

    profile = gradient_profile(model, lambda m: cross_entropy(m(x), y))

The functions work on any model; `fused-resnet depth` runs the whole experiment.
"""

from .profiles import Layer, gradient_profile, loss_along, response_profile

__all__ = ["Layer", "gradient_profile", "loss_along", "response_profile"]
