"""Shoal: the DeepSeek V3/R1 recipe, whole: train, reason, serve, and see what it cost."""

__version__ = "0.1.0"
