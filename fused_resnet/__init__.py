"""Fused conv-BN-ReLU and residual-add-ReLU for PyTorch, with a drop-in ResNet family."""

import sys

from .version import __version__ as __version__  # before torch is imported: says which is needed

# isort: split
from . import depth
from .bench.machine import info
from .fusion import Explanation, explain, export, fuse, refresh, set_activation_memory, unfuse
from .graphs.inference import Inference, inference
from .graphs.training_step import TrainingStep, training_step
from .kernels.native import release_memory
from .kernels.registry import use_backend
from .layers import shortcut, sync_batch_norm
from .layers.norms import register_frozen_norm
from .layers.sync_batch_norm import SyncBatchNorm, convert_sync_batchnorm
from .models import cifar, preact, resnet, torchvision_bases  # noqa: F401
from .models.cifar import CifarResNet, PreactResNet, cifar_resnet
from .models.registries import register_with_timm, register_with_torchvision
from .models.resnet import *  # noqa: F403 - its __all__
from .ops import add_relu, bn_add_relu, conv_bn_relu, conv_norm_relu
from .parity.checkpoint import load_checkpoint

# Pickles of whole models and explanations name the modules that held their classes in version 0.1.
for _module in (cifar, preact, resnet, shortcut, sync_batch_norm):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module
sys.modules[f"{__name__}.blocks"] = sys.modules[Explanation.__module__]

__all__ = [
    *resnet.__all__,
    "CifarResNet",
    "Explanation",
    "Inference",
    "PreactResNet",
    "SyncBatchNorm",
    "TrainingStep",
    "add_relu",
    "bn_add_relu",
    "cifar_resnet",
    "conv_bn_relu",
    "conv_norm_relu",
    "convert_sync_batchnorm",
    "depth",
    "explain",
    "export",
    "fuse",
    "inference",
    "load_checkpoint",
    "info",
    "refresh",
    "register_frozen_norm",
    "register_with_timm",
    "register_with_torchvision",
    "release_memory",
    "set_activation_memory",
    "training_step",
    "unfuse",
    "use_backend",
]
