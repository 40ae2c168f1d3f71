"""How uneven the routing of a run may be, where its memory is told."""

from __future__ import annotations

from megatron_telechat.config.schema import RunConfig


def uneven_rows(run: RunConfig) -> float:
    """Rows of the busiest rank's experts over the mean that the memory table adds a column for; 1: no column.

    At most the worst there is: all tokens of the expert group choose the experts of one rank.
    """
    return min(run.logging.moe_memory_imbalance, worst_imbalance(run)) if run.model.is_moe else 1.0


def worst_imbalance(run: RunConfig) -> float:
    """Rows of the busiest rank's experts over the mean where all tokens choose the experts of one rank; 1 where each
    rank holds all experts."""
    experts, model = run.parallel.expert_sizes[0], run.model
    if not model.is_moe:
        return 1.0
    chosen_of_a_rank = min(model.moe_router_topk, (model.num_experts or 0) // experts)
    return experts * chosen_of_a_rank / model.moe_router_topk
