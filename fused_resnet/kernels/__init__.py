"""The kernels by provider, and the choice among them; nothing here knows of modules or autograd."""

from . import providers as providers
