"""Hugging Face weights: both ways, byte for byte, with no process group and no model.

Every name is loaded at its first use, so that ``tools/`` answer ``--help`` without torch.
"""

from __future__ import annotations

from megatron_telechat.lazy import lazy_names

_HOME = {
    "HfWeights": "weights",
    "weight_map": "weights",
    "import_hf": "convert",
    "export_hf": "convert",
}

__all__ = list(_HOME)
__getattr__ = lazy_names(__name__, _HOME)
