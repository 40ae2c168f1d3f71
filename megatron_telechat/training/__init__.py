"""The training room. ``train(run, origins)`` is its door."""

from .loop import Trainer, train

__all__ = ["Trainer", "train"]
