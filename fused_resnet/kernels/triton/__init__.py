"""Triton kernels for every op: any GPU that Triton serves, no compiler at install.

support.py says whether they are there; elementwise.py, batch_norm.py and convolution.py hold the
kernels, each beside its launcher; configs.py the convolution's tiles. Nothing here is imported
before an op asks for it, so that importing fused_resnet imports no Triton.
"""
