"""Which engine multiplies on which device."""

from __future__ import annotations

import torch

from megatron_telechat.backend import traits_of
from megatron_telechat.moe import engine_grouped, engine_loop
from megatron_telechat.moe.engine import Engine


def engine_for(device: torch.device) -> Engine:
    """One expert after another, or all of them step by step, as suits the device."""
    return engine_loop if traits_of(device).expert_engine == "loop" else engine_grouped
