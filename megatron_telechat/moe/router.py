"""The router: fp32 logits, softmax over the chosen ones, auxiliary losses, load of the experts."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, switch_load_balancing_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Routing(NamedTuple):
    """Where the tokens of one call go.

    Attributes:
        weights: [n, k] fp32, the routing probabilities; a row sums to one.
        experts: [n, k] int64, the chosen experts.
        tokens_per_expert: [experts] int64, how often each was chosen on this rank.
    """

    weights: Tensor
    experts: Tensor
    tokens_per_expert: Tensor


class RunningStatistics:
    """Sums since the last reading, kept on the device so that no step waits for the host.

    Plain tensors and not buffers: a cast of the module to bf16 must not touch them, and no
    checkpoint holds them.
    """

    def __init__(self) -> None:
        self.tokens_per_expert: Optional[Tensor] = None
        self.aux_loss: Optional[Tensor] = None
        self.calls = 0

    def add(self, tokens_per_expert: Tensor, aux_loss: Optional[Tensor]) -> None:
        if self.tokens_per_expert is None:
            self.tokens_per_expert = torch.zeros_like(tokens_per_expert)
            self.aux_loss = torch.zeros((), dtype=torch.float32, device=tokens_per_expert.device)
        self.tokens_per_expert += tokens_per_expert
        if aux_loss is not None:
            self.aux_loss += aux_loss
        self.calls += 1

    def reset(self) -> None:
        if self.tokens_per_expert is not None:
            self.tokens_per_expert.zero_()
            self.aux_loss.zero_()
        self.calls = 0


class Router(TopKRouter):
    """Megatron-Core's top-k router, returning indices and not an [n, experts] map.

    The softmax runs over the chosen logits, which equals TeleChat2's softmax over all with
    renormalisation. ``config.moe_aux_loss_coeff`` weighs the load-balancing loss over the
    whole input of the micro-batch (Switch Transformer, eq. 4), ``config.moe_z_loss_coeff`` the
    z-loss (ST-MoE, eq. 5).
    """

    def __init__(self, config, pg_collection=None):
        assert config.moe_router_score_function == "softmax" and not config.moe_router_pre_softmax
        assert config.moe_router_load_balancing_type in ("aux_loss", "none")
        assert config.moe_expert_capacity_factor is None, "this router never drops a token"
        super().__init__(config=config, pg_collection=pg_collection)
        self.statistics = RunningStatistics()

    def routing(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """Choose the experts.

        Args:
            logits: [s, b, experts] or [n, experts].
            padding_mask: [s, b], True for tokens that the auxiliary losses leave out.
        """
        if padding_mask is not None:
            padding_mask = padding_mask.reshape(-1)
        logits = logits.view(-1, self.num_experts)
        logits = self.apply_z_loss(logits, padding_mask=padding_mask)
        chosen, experts = torch.topk(logits, k=self.topk, dim=1)
        weights = torch.softmax(chosen, dim=-1, dtype=torch.float32).to(logits.dtype)
        one_hot = torch.zeros_like(logits, dtype=torch.int64).scatter_(1, experts, 1)
        tokens_per_expert = one_hot.sum(0)
        # No gradient: evaluation, or the first pass of a checkpointed block, which is repeated.
        if self.training and torch.is_grad_enabled():
            aux_loss = None
            if self.get_aux_loss_coeff("aux_loss") > 0:
                weights, aux_loss = self._add_aux_loss(weights, logits, one_hot, padding_mask)
            self.statistics.add(tokens_per_expert, aux_loss)
        return Routing(weights, experts, tokens_per_expert)

    def _add_aux_loss(
        self, weights: Tensor, logits: Tensor, one_hot: Tensor, padding_mask: Optional[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Hang the load-balancing loss on the weights.

        Returns the weights and this rank's share of the loss, without its coefficient. The
        share of every rank that holds tokens of the same sequences adds up to the loss.
        """
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
        valid_tokens = torch.full((), logits.shape[0], dtype=torch.int64, device=logits.device)
        if padding_mask is not None:
            scores = scores.masked_fill(padding_mask.unsqueeze(-1), 0.0)
            one_hot = one_hot.masked_fill(padding_mask.unsqueeze(-1), 0)
            valid_tokens = (~padding_mask).sum()
        totals = torch.cat((one_hot.sum(0), valid_tokens.view(1)))
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(totals, group=self.tp_cp_group)
        coefficient = self.get_aux_loss_coeff("aux_loss")
        loss = switch_load_balancing_loss_func(
            probs=scores,
            tokens_per_expert=totals[:-1],
            total_num_tokens=totals[-1],
            topk=self.topk,
            num_experts=self.num_experts,
            moe_aux_loss_coeff=coefficient,
        )
        scaled = loss * valid_tokens if self.calculate_per_token_loss else loss
        return MoEAuxLossAutoScaler.apply(weights, scaled), loss.detach() / coefficient
