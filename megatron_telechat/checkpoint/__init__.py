"""Checkpoints: sharded safetensors with a manifest, committed by a rename.

Every name is loaded at its first use, so that ``tools/`` answer ``--help`` without torch.
"""

from __future__ import annotations

from megatron_telechat.lazy import lazy_names

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
__getattr__ = lazy_names(__name__, _HOME)
