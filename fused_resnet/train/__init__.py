"""Training a ResNet of the family: `fused-resnet train`, as a function.

    result = run(Config(model="resnet18", data="digits", epochs=10), print)

Needs the train extra (torchvision, torchmetrics, scikit-learn, matplotlib); importing
`fused_resnet` alone needs none of them and imports nothing from here.
"""

from .loop import Config, NonFinite, OutOfMemory, Result, run

__all__ = ["Config", "NonFinite", "OutOfMemory", "Result", "run"]
