"""The version of the package, of its compiled library and of its distributions: here alone."""

__version__ = "0.1.0"
