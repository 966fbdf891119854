"""Fused conv-BN-ReLU and residual-add-ReLU for PyTorch, with a drop-in ResNet family."""

from . import depth
from .activation_memory import set_activation_memory
from .backends import use_backend
from .blocks import Explanation, explain
from .cifar import CifarResNet, PreactResNet, cifar_resnet
from .inference import Inference, inference
from .machine import info
from .native import release_memory
from .ops import add_relu, bn_add_relu, conv_bn_relu
from .resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    get_model,
    list_models,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from .sync_batch_norm import SyncBatchNorm, convert_sync_batchnorm
from .training_step import TrainingStep, training_step

__version__ = "0.1.0"

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "CifarResNet",
    "Explanation",
    "Inference",
    "PreactResNet",
    "ResNet",
    "SyncBatchNorm",
    "TrainingStep",
    "add_relu",
    "bn_add_relu",
    "cifar_resnet",
    "conv_bn_relu",
    "convert_sync_batchnorm",
    "depth",
    "explain",
    "get_model",
    "inference",
    "info",
    "list_models",
    "release_memory",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "set_activation_memory",
    "training_step",
    "use_backend",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
