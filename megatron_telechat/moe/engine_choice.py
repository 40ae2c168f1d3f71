"""Which engine computes the experts of a device."""

from __future__ import annotations

from typing import Any

import torch


def engine_for(device: torch.device) -> Any:
    """The loop on the CPU, ``grouped_mm`` elsewhere."""
    if device.type == "cpu":
        from megatron_telechat.moe import engine_loop

        return engine_loop
    from megatron_telechat.moe import engine_grouped

    return engine_grouped
