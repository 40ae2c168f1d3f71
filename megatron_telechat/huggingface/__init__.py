"""Hugging Face weights: both ways, byte for byte, with no process group and no model.

Every name is loaded at its first use, so that ``tools/`` answer ``--help`` without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "HfWeights": "weights",
    "weight_map": "weights",
    "import_hf": "convert",
    "export_hf": "convert",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
