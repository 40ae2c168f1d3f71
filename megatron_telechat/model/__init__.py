"""TeleChat2 (and Mixtral) on megatron-core: layers, chunks, shards, initial weights."""

from __future__ import annotations

from megatron_telechat.model.build import build_model
from megatron_telechat.model.gpt import TeleChatModel
from megatron_telechat.model.initialize import initialize_weights
from megatron_telechat.model.shards import LocalParameter, parameter_shards, verify_tiling
from megatron_telechat.model.transformer_config import compute_dtype, transformer_config

__all__ = [
    "LocalParameter",
    "TeleChatModel",
    "build_model",
    "compute_dtype",
    "initialize_weights",
    "parameter_shards",
    "transformer_config",
    "verify_tiling",
]
