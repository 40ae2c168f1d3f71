"""The dropless expert block: router, dispatch plan, experts, pipeline of chunks, load of the experts."""

from __future__ import annotations

from megatron_telechat.moe.block import MoEBlock, moe_blocks
from megatron_telechat.moe.counted import CountedTokens
from megatron_telechat.moe.experts import GroupedExperts
from megatron_telechat.moe.load import ExpertLoad, collect_expert_load
from megatron_telechat.moe.router import Router, Routing

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
