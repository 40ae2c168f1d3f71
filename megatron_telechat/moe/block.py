"""The dropless expert block that takes the place of Megatron-Core's MoE layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, checkpoint
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_telechat.moe.choices import FirstPass
from megatron_telechat.moe.counted import CountedTokens
from megatron_telechat.moe.dispatch import Dispatch, ExpertGroups, RowFormat
from megatron_telechat.moe.engine import Engine
from megatron_telechat.moe.engines import engine_for
from megatron_telechat.moe.experts import GroupedExperts
from megatron_telechat.moe.link import Link
from megatron_telechat.moe.overlap_model import PassCosts
from megatron_telechat.moe.pipeline import ChunkPipeline
from megatron_telechat.moe.router import Router, Routing
from megatron_telechat.parallel.clock import ExchangeClock, PassClock

SHARED_EXPERTS = ModuleSpec(
    module=SharedExpertMLP,
    submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
)


def moe_blocks(virtual_stages: Sequence[torch.nn.Module]) -> list[MoEBlock]:
    """The blocks in these modules, in the order of the layers.

    Args:
        virtual_stages: those of this rank.
    """
    return [module for stage in virtual_stages for module in stage.modules() if isinstance(module, MoEBlock)]


class MoEBlock(BaseMoELayer):
    """Router, dispatch, grouped experts, combine; no token is ever dropped.

    Takes the place of Megatron-Core's ``MoELayer`` as the ``mlp`` of a layer specification.

    Args:
        config: Megatron-Core's TransformerConfig.
        layer_number: one-based; the transformer layer sets it.
        pg_collection: process groups with an ``expert_channel``, as :class:`ParallelState` has them.
        output_bias: a bias on the experts' down projection, weighted by the routing probability.
        num_chunks: pieces of the input whose exchanges and computation overlap; the same on all ranks of an expert
            group.
        recompute_experts: keep the rows that were dispatched, and repeat the experts' first product in the backward; of
            the shared experts, repeat all. No exchange is repeated.

    Attributes:
        num_chunks, recompute_experts: may be changed between steps.
        backward_costs: of a backward, where they were measured; may be set between steps.
        clock: how long the computation waited for the exchange.
        link: carries the exchanges. Measurements and tests put another in its place.
        engine: multiplies the local experts. Measurements put another in its place.

    Raises:
        ConfigError: widths that the exchange or the accelerator's grouped product cannot take.
    """

    router: Router
    experts: GroupedExperts
    link: Link
    engine: Engine

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int | None = None,
        *,
        pg_collection: ProcessGroupCollection,
        output_bias: bool = False,
        num_chunks: int = 1,
        recompute_experts: bool = False,
    ):
        groups = pg_collection
        super().__init__(config=config, layer_number=layer_number, pg_collection=groups)
        self.groups = ExpertGroups(ep=groups.ep, etp=groups.expt_tp, all=groups.tp_ep)
        self.link = groups.expert_channel  # pyright: ignore[reportAttributeAccessIssue] - ours, see ParallelState
        self.clock = ExchangeClock()
        self.num_chunks = num_chunks
        self.recompute_experts = recompute_experts
        self.backward_costs: PassCosts | None = None
        self.router = Router(config, groups)
        self.experts = GroupedExperts(self.num_local_experts, config, groups, output_bias)
        self.engine = engine_for(self.experts.device)
        if self.use_shared_expert:
            self.shared_experts = build_module(SHARED_EXPERTS, config=config, pg_collection=groups, gate=False)

    def forward(
        self,
        hidden_states: Tensor,
        counted: CountedTokens | None = None,
        first_pass: FirstPass | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[s, b, h], with sequence parallelism the own part of the sequence, → the same.

        The second value is Megatron-Core's bias, None: the experts' bias is in the output.

        Args:
            counted: which of these tokens count in the losses and figures of the router; None: all.
            first_pass: a new one for each call that runs inside of a checkpoint, given to both of its passes.
        """
        assert not self.training or self.attn_tp_group.size() == 1 or self.config.sequence_parallel, (
            "tensor-parallel ranks without sequence parallelism would route every token twice"
        )
        routing = self.router(hidden_states, counted, first_pass)
        output = self.run_experts(hidden_states.reshape(-1, hidden_states.shape[-1]), routing).view_as(hidden_states)
        if self.use_shared_expert:
            output = output + self._run_shared_experts(hidden_states)
        return output, None

    def _run_shared_experts(self, hidden_states: Tensor) -> Tensor:
        if self.recompute_experts and self.training and torch.is_grad_enabled():
            return checkpoint(self.shared_experts, False, hidden_states)
        return self.shared_experts(hidden_states)

    def run_experts(self, tokens: Tensor, routing: Routing) -> Tensor:
        """Tokens [n, h] to their experts and back, weighted and summed: [n, h]."""
        return self.experts(tokens, routing.weights, self.pipeline(routing, tokens.dtype))

    def pipeline(self, routing: Routing, dtype: torch.dtype, num_chunks: int | None = None) -> ChunkPipeline:
        """What carries out one call. Collective over the ranks that share the experts.

        Args:
            routing: the router's choice.
            dtype: of the tokens.
            num_chunks: instead of :attr:`num_chunks`.

        Raises:
            ConfigError: on all ranks of the group, if their numbers of chunks differ.
        """
        layer = None if self.layer_number is None else self.layer_number - 1
        clock = PassClock(self.clock, layer, False, routing.experts.device)
        with clock.computing("plan"):
            form = RowFormat(self.config.hidden_size, dtype)
            dispatch = Dispatch(routing, self.groups, num_chunks or self.num_chunks, form, clock.waiting)
        return ChunkPipeline(
            dispatch, self.link, self.engine, self.clock, layer, self.recompute_experts, self.backward_costs
        )
