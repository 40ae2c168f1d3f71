"""The dropless expert block that takes the place of Megatron-Core's MoE layer."""

from __future__ import annotations

from typing import Optional

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import BaseMoELayer, MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from megatron_telechat.moe.exchange import exchange_rows, gather_rows, reduce_scatter_rows
from megatron_telechat.moe.experts import GroupedExperts
from megatron_telechat.moe.plan import (
    ExpertGroups,
    gather_tokens,
    plan_dispatch,
    scatter_tokens,
    scatter_weights,
    sort_rows,
    unsort_rows,
)
from megatron_telechat.moe.router import Router


def moe_submodules() -> MoESubmodules:
    """The parts of the block; a specification may replace any of them."""
    shared = ModuleSpec(
        module=SharedExpertMLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    return MoESubmodules(experts=GroupedExperts, shared_experts=shared, router=Router)


class MoEBlock(MoELayer):
    """Router, dispatch, grouped experts, combine; no token is ever dropped.

    It is a ``MoELayer`` because Megatron-Core's transformer layer asks for that class; of it only the signature
    is used. Give it to a layer specification as ``mlp=MoEBlock``.

    Args:
        config: Megatron-Core's TransformerConfig; beyond its fields ``mlp_output_bias`` is read (default False).
        submodules: parts; None takes :func:`moe_submodules`.
        layer_number: one-based; the transformer layer sets it.
        pg_collection: process groups; None takes Megatron-Core's current ones.
    """

    def __init__(self, config, submodules: Optional[MoESubmodules] = None, layer_number=None, pg_collection=None):
        groups = pg_collection if pg_collection is not None else get_default_pg_collection()
        # Not MoELayer's own constructor: it makes a dispatcher with state and CUDA streams.
        BaseMoELayer.__init__(self, config=config, layer_number=layer_number, pg_collection=groups)
        parts = submodules or moe_submodules()
        self.submodules = parts
        self.tp_group = groups.tp
        self.groups = ExpertGroups(ep=groups.ep, etp=groups.expt_tp, all=groups.tp_ep)
        self.router = build_module(parts.router, config=config, pg_collection=groups)
        self.experts = build_module(parts.experts, self.num_local_experts, config, pg_collection=groups)
        if self.use_shared_expert:
            self.shared_experts = build_module(parts.shared_experts, config=config, pg_collection=groups, gate=False)
        self.moe_layer_recompute = config.recompute_granularity == "selective" and "moe" in config.recompute_modules

    def forward(
        self, hidden_states: Tensor, intermediate_tensors=None, padding_mask: Optional[Tensor] = None
    ) -> tuple[Tensor, None]:
        """Apply the block.

        Args:
            hidden_states: [s, b, h]; with sequence parallelism the own part of the sequence.
            intermediate_tensors: of Megatron-Core's CUDA-graph path; never given.
            padding_mask: [b, s], True for padding.

        Returns:
            [s, b, h] and no bias: the experts' bias is in the output.
        """
        assert intermediate_tensors is None
        assert not self.training or self.attn_tp_group.size() == 1 or self.config.sequence_parallel, (
            "tensor-parallel ranks without sequence parallelism would route every token twice"
        )
        mask = None if padding_mask is None else padding_mask.transpose(0, 1).bool()
        if self.moe_layer_recompute and torch.is_grad_enabled():
            return tensor_parallel.checkpoint(self._apply, False, hidden_states, mask), None
        return self._apply(hidden_states, mask), None

    def _apply(self, hidden_states: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        routing = self.router(hidden_states, padding_mask)
        plan = plan_dispatch(routing, self.groups)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])

        rows = exchange_rows(scatter_tokens(tokens, plan), plan.send, plan.receive, self.groups.ep)
        weights = exchange_rows(scatter_weights(routing.weights, plan), plan.send, plan.receive, self.groups.ep)
        rows = sort_rows(gather_rows(rows, plan.etp_rows, self.groups.etp), plan)
        weights = sort_rows(gather_rows(weights, plan.etp_rows, self.groups.etp), plan)

        rows = unsort_rows(self.experts(rows, plan.tokens_per_local_expert, weights), plan)

        rows = reduce_scatter_rows(rows, plan.etp_rows, self.groups.etp)
        rows = exchange_rows(rows, plan.receive, plan.send, self.groups.ep)
        output = gather_tokens(rows, plan).view_as(hidden_states)
        if self.use_shared_expert:
            output = output + self.shared_experts(hidden_states)
        return output
