"""Which engine multiplies on which device."""

from __future__ import annotations

import torch

from megatron_telechat.moe import engine_grouped, engine_loop
from megatron_telechat.moe.engine import Engine


def engine_for(device: torch.device) -> Engine:
    """The loop on the CPU, ``grouped_mm`` elsewhere."""
    return engine_loop if device.type == "cpu" else engine_grouped
