"""The dropless expert block: router, dispatch plan, experts, pipeline of chunks, load of the experts."""

from __future__ import annotations

from megatron_telechat.backend.triton_guard import let_core_import_without_triton

# Before the files below import megatron-core.
let_core_import_without_triton()

from megatron_telechat.moe.block import MoEBlock, moe_blocks  # noqa: E402
from megatron_telechat.moe.counted import CountedTokens  # noqa: E402
from megatron_telechat.moe.experts import GroupedExperts  # noqa: E402
from megatron_telechat.moe.load import ExpertLoad, collect_expert_load  # noqa: E402
from megatron_telechat.moe.router import Router, Routing  # noqa: E402

__all__ = [
    "CountedTokens",
    "ExpertLoad",
    "GroupedExperts",
    "MoEBlock",
    "Router",
    "Routing",
    "collect_expert_load",
    "moe_blocks",
]
