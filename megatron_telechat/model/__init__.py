"""TeleChat2 (and Mixtral) on megatron-core: layers, virtual stages, shards, initial weights."""

from __future__ import annotations

from megatron_telechat.backend.triton_guard import let_core_import_without_triton

# Before the files below import megatron-core.
let_core_import_without_triton()

from megatron_telechat.model.build import build_model  # noqa: E402
from megatron_telechat.model.gpt import TeleChatModel  # noqa: E402
from megatron_telechat.model.initialize import initialize_weights  # noqa: E402
from megatron_telechat.model.shards import LocalParameter, parameter_shards, verify_tiling  # noqa: E402
from megatron_telechat.model.transformer_config import compute_dtype, transformer_config  # noqa: E402

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
