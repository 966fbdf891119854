"""Training a ResNet of either family: `fused-resnet train`, as a function.

    from fused_resnet.train import Config, run
    result = run(Config(model="resnet20", data="digits"), print)

Needs the train extra (torchvision, torchmetrics; scikit-learn for the digits). `import
fused_resnet` imports nothing from here.
"""

from .config import Config
from .diagnose import NonFinite
from .loop import OutOfMemory, Result, Trainer, run

__all__ = ["Config", "NonFinite", "OutOfMemory", "Result", "Trainer", "run"]
