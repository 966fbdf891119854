"""Kernels by provider, and the choice among them. Independent of modules and autograd."""

from . import providers as providers
