"""The tests, in folders named after what they test. ROOT: the folder that holds this one."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
