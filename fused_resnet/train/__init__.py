"""Training of the package's ResNets: `fused-resnet train` as a function.

    result = run(Config(model="resnet18", data="digits", epochs=10), print)

Requires the train extra (torchvision, torchmetrics, scikit-learn, matplotlib). `import
fused_resnet` requires none of them and does not import this package.
"""

from .loop import Config, NonFinite, OutOfMemory, Result, run

__all__ = ["Config", "NonFinite", "OutOfMemory", "Result", "run"]
