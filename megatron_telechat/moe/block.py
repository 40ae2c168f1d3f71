"""The dropless expert block that takes the place of Megatron-Core's MoE layer."""

from __future__ import annotations

from typing import Any, Optional

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import BaseMoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
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
from megatron_telechat.moe.router import Router, Routing


def moe_submodules() -> MoESubmodules:
    """The parts of the block; a specification may replace any of them."""
    shared = ModuleSpec(
        module=SharedExpertMLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    return MoESubmodules(experts=GroupedExperts, shared_experts=shared, router=Router)


class MoEBlock(BaseMoELayer):
    """Router, dispatch, grouped experts, combine; no token is ever dropped.

    Takes the place of Megatron-Core's ``MoELayer`` as the ``mlp`` of a layer specification.

    Args:
        config: Megatron-Core's TransformerConfig.
        submodules: parts; None takes :func:`moe_submodules`.
        layer_number: one-based; the transformer layer sets it.
        pg_collection: process groups; None takes Megatron-Core's current ones.
        output_bias: a bias on the experts' down projection, weighted by the routing probability.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Optional[MoESubmodules] = None,
        layer_number: Optional[int] = None,
        pg_collection: Optional[ProcessGroupCollection] = None,
        output_bias: bool = False,
    ):
        groups = pg_collection if pg_collection is not None else get_default_pg_collection()
        super().__init__(config=config, layer_number=layer_number, pg_collection=groups)
        parts = submodules or moe_submodules()
        self.groups = ExpertGroups(ep=groups.ep, etp=groups.expt_tp, all=groups.tp_ep)
        self.router = build_module(parts.router, config=config, pg_collection=groups)
        self.experts = build_module(
            parts.experts, self.num_local_experts, config, pg_collection=groups, output_bias=output_bias
        )
        if self.use_shared_expert:
            self.shared_experts = build_module(parts.shared_experts, config=config, pg_collection=groups, gate=False)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """[s, b, h], with sequence parallelism the own part of the sequence, → the same.

        The second value is Megatron-Core's bias, None: the experts' bias is in the output.
        """
        assert not self.training or self.attn_tp_group.size() == 1 or self.config.sequence_parallel, (
            "tensor-parallel ranks without sequence parallelism would route every token twice"
        )
        routing = self.router(hidden_states)
        output = self._experts(hidden_states.reshape(-1, hidden_states.shape[-1]), routing).view_as(hidden_states)
        if self.use_shared_expert:
            output = output + self.shared_experts(hidden_states)
        return output, None

    def _experts(self, tokens: Tensor, routing: Routing) -> Tensor:
        """Tokens [n, h] to their experts and back, weighted and summed: [n, h]."""
        plan = plan_dispatch(routing, self.groups)
        rows = exchange_rows(scatter_tokens(tokens, plan), plan.send, plan.receive, self.groups.ep)
        weights = exchange_rows(scatter_weights(routing.weights, plan), plan.send, plan.receive, self.groups.ep)
        rows = sort_rows(gather_rows(rows, plan.etp_rows, self.groups.etp), plan)
        weights = sort_rows(gather_rows(weights, plan.etp_rows, self.groups.etp), plan)

        rows = unsort_rows(self.experts(rows, plan.tokens_per_local_expert, weights), plan)

        rows = reduce_scatter_rows(rows, plan.etp_rows, self.groups.etp)
        rows = exchange_rows(rows, plan.receive, plan.send, self.groups.ep)
        return gather_tokens(rows, plan)
