"""Fusion in models of any class: `fuse` traces a module's forward and runs what it finds fused."""
