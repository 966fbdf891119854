"""Triton kernels for every op, on any GPU that Triton supports; no compiler needed at installation.

support.py determines availability; elementwise.py, batch_norm.py, convolution.py and backward.py
contain the kernels and their launchers; configs.py the convolution's tiles; launchers.py the
functions named after the ops. Modules are imported on first use, so that importing fused_resnet
does not import Triton.
"""
