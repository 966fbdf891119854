"""Entry point of `python -m fused_resnet.cli`."""

from . import main

main()
