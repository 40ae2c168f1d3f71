"""Reading what the routers counted: the load of the experts and the auxiliary loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_telechat.device_kinds import HOST
from megatron_telechat.moe.router import Router
from megatron_telechat.parallel.state import ParallelState


@dataclass(frozen=True)
class ExpertLoad:
    """What the routers of the whole model did since the last reading.

    Attributes:
        layers: zero-based numbers of the MoE layers.
        tokens_per_expert: [layers, experts] int64, tokens of all ranks, without padding; host memory.
        max_over_mean: [layers] fp32, the busiest expert's load over the mean; 1 is even.
        aux_loss: load-balancing loss without its coefficient, the mean over tokens that are no padding; that of a layer
            (the mean over layers, 1 is even) or that over all layers (top-k is even). None where no auxiliary loss is
            configured.
    """

    layers: tuple[int, ...]
    tokens_per_expert: Tensor
    max_over_mean: Tensor
    aux_loss: float | None


def collect_expert_load(virtual_stages: Sequence[nn.Module], state: ParallelState) -> ExpertLoad | None:
    """Sum the counters over all ranks and start them anew. Collective over the whole world.

    Args:
        virtual_stages: those of this rank.
        state: the process groups.

    Returns:
        The load, the same on every rank; None for a model without MoE layers, and where nothing was routed.
    """
    routers = [module for stage in virtual_stages for module in stage.modules() if isinstance(module, Router)]
    device = next((p.device for stage in virtual_stages for p in stage.parameters()), torch.device(HOST))
    shape = torch.tensor(
        [max((r.layer_number for r in routers), default=0), max((r.num_experts for r in routers), default=0)],
        device=device,
    )
    if state.world_size > 1:
        dist.all_reduce(shape, op=dist.ReduceOp.MAX)
    num_layers, num_experts = shape.tolist()
    if not num_experts:
        return None
    counts = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
    sums = torch.zeros(num_layers, 2, dtype=torch.float32, device=device)  # auxiliary loss x tokens, tokens
    for router in routers:
        statistics = router.statistics
        if statistics.tokens_per_expert is not None and statistics.aux_loss is not None:
            layer = router.layer_number - 1
            counts[layer] += statistics.tokens_per_expert
            # Ranks with parts of the same sequences hold shares of one loss, and each counts the tokens of all of them.
            sums[layer, 0] += statistics.aux_loss
            sums[layer, 1] += statistics.tokens / router.tp_cp_group.size()
        statistics.reset()
    if state.world_size > 1:
        dist.all_reduce(counts)
        dist.all_reduce(sums)
    present = sums[:, 1].cpu() > 0
    if not present.any():
        return None
    counts, (losses, tokens) = counts.cpu()[present], sums.cpu()[present].unbind(1)
    loads = counts.double()
    return ExpertLoad(
        layers=tuple(present.nonzero().flatten().tolist()),
        tokens_per_expert=counts,
        max_over_mean=(loads.max(1).values / loads.mean(1)).float(),
        aux_loss=float((losses / tokens).mean()) if bool((losses > 0).any()) else None,
    )
