"""Checkpoints: sharded safetensors with a manifest, committed by a rename.

Every name is loaded at its first use, so that ``tools/`` answer ``--help`` without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "CheckpointReader": "format",
    "CheckpointWriter": "format",
    "TrainState": "train_state",
    "save_checkpoint": "train_state",
    "latest_checkpoint": "find",
    "LoadedInfo": "loading",
    "load_checkpoint": "loading",
    "load_weights": "loading",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
