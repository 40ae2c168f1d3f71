"""The router: fp32 logits, softmax over the chosen ones, auxiliary losses, load of the experts."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_telechat.moe.choices import FirstPass, RoutingTape, picked
from megatron_telechat.moe.counted import CountedTokens
from megatron_telechat.moe.pooled import balance_with_all_layers


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

    Attributes:
        tokens_per_expert: [experts] int64, choices of the tokens of this rank that are no padding.
        aux_loss: fp32 [], this rank's shares of the balancing loss, each times the tokens of its micro-batch.
        tokens: those tokens, over the ranks that share the sequences.
    """

    def __init__(self) -> None:
        self.tokens_per_expert: Tensor | None = None
        self.aux_loss: Tensor | None = None
        self.tokens = 0

    def add(self, tokens_per_expert: Tensor, aux_loss: Tensor | None, tokens: int) -> None:
        """Add one micro-batch.

        Args:
            tokens_per_expert: [experts] int64.
            aux_loss: [], this rank's share of the balancing loss; None where there is no such loss, or where it is
                known in the backward only (:meth:`add_aux_loss`).
            tokens: what the share is weighed by.
        """
        if self.tokens_per_expert is None or self.aux_loss is None:
            self.tokens_per_expert = torch.zeros_like(tokens_per_expert)
            self.aux_loss = torch.zeros((), dtype=torch.float32, device=tokens_per_expert.device)
        self.tokens_per_expert += tokens_per_expert
        if aux_loss is not None:
            self.add_aux_loss(aux_loss, tokens)
        self.tokens += tokens

    def add_aux_loss(self, aux_loss: Tensor, tokens: int) -> None:
        """Add this rank's share of the balancing loss of a micro-batch that was counted."""
        assert self.aux_loss is not None, "a micro-batch is counted before its loss is known"
        self.aux_loss += aux_loss * tokens

    def reset(self) -> None:
        """Begin anew, on the same device."""
        if self.tokens_per_expert is not None and self.aux_loss is not None:
            self.tokens_per_expert.zero_()
            self.aux_loss.zero_()
        self.tokens = 0


class Router(TopKRouter):
    """Megatron-Core's router with its own routing: indices and not an [n, experts] map.

    The softmax runs over the chosen logits, which equals TeleChat2's softmax over all with
    renormalisation. ``config.moe_aux_loss_coeff`` weighs the load-balancing loss over the
    whole input of the micro-batch (Switch Transformer, eq. 4), of this layer or, where a `ChoicePool`
    is given, of all layers; ``config.moe_z_loss_coeff`` the z-loss (ST-MoE, eq. 5).

    Attributes:
        tape: of a step whose choices are recorded or replayed; None elsewhere.
    """

    # Set by Megatron-Core: from the configuration, and by whoever builds the layers.
    num_experts: int
    layer_number: int

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None):
        assert config.moe_router_score_function == "softmax" and not config.moe_router_pre_softmax
        assert config.moe_router_load_balancing_type in ("aux_loss", "none")
        assert config.moe_router_dtype in ("fp32", "fp64")
        assert config.moe_expert_capacity_factor is None, "this router never drops a token"
        super().__init__(config=config, pg_collection=pg_collection)
        self.balance_coefficient = self.get_aux_loss_coeff("aux_loss")
        self.z_coefficient = config.moe_z_loss_coeff or 0.0
        self.statistics = RunningStatistics()
        self.tape: RoutingTape | None = None

    def forward(
        self,
        hidden_states: Tensor,
        counted: CountedTokens | None = None,
        first_pass: FirstPass | None = None,
    ) -> Routing:
        """Choose experts for [..., hidden] tokens.

        Args:
            counted: which tokens count in the losses and figures; None: all, and all are learned.
            first_pass: of a call that is repeated in the backward. The repetition takes the experts of the first pass:
                it may round differently, and the gradient must be that of the forward that was.
        """
        logits = self.gating(hidden_states).view(-1, self.num_experts)
        chosen, experts = self._choose(logits, first_pass)
        weights = torch.softmax(chosen, dim=-1)
        one_hot = torch.zeros_like(logits, dtype=torch.int64).scatter_(1, experts, 1)
        tokens_per_expert = one_hot.sum(0)
        pool = counted.pool if counted is not None else None
        # No gradient: the first pass of a checkpointed block, which is repeated. Only the other layers must know of it.
        if self.training and (pool is not None or torch.is_grad_enabled()):
            real = counted.real if counted is not None else None
            counts = tokens_per_expert if real is None else (one_hot * real.unsqueeze(1)).sum(0)
            if pool is not None:
                pool.note(self.layer_number, counts)
            if torch.is_grad_enabled():
                weights = self._add_auxiliary_losses(weights, logits, counts, counted)
        return Routing(weights, experts, tokens_per_expert)

    def _choose(self, logits: Tensor, first_pass: FirstPass | None) -> tuple[Tensor, Tensor]:
        """The chosen logits and their experts, [n, k] each; the logits carry the gradient, whoever chose."""
        if first_pass is not None and (repeated := first_pass.experts) is not None:
            return picked(logits, repeated), repeated
        chosen, experts = torch.topk(logits, k=self.topk, dim=1)
        if self.tape is not None and self.training:
            experts = self.tape.choose(logits, experts)
            chosen = picked(logits, experts)
        if first_pass is not None:
            first_pass.keep(experts, self.num_experts)
        return chosen, experts

    def _add_auxiliary_losses(
        self, weights: Tensor, logits: Tensor, tokens_per_expert: Tensor, counted: CountedTokens | None
    ) -> Tensor:
        """Hang this rank's share of the losses on the weights.

        Ranks of the tensor and context groups hold parts of the same sequences; their shares add up to the
        loss over all of these tokens. Where the training loss is a sum over tokens that is divided by their
        number at the end (``calculate_per_token_loss``), the share is multiplied by the tokens of the
        micro-batch over all those ranks, or by what `CountedTokens` says where tokens are not learned. Megatron-Core
        multiplies by its own tokens alone, learned or not, so that its auxiliary losses shrink with the tensor- and
        context-parallel sizes and grow with every token that is not learned.
        """
        ranks = self.tp_cp_group.size()
        real = counted.real if counted is not None else None
        total = max(counted.total, 1) if counted is not None else logits.shape[0] * ranks
        share, balance = None, None
        pool = counted.pool if counted is not None else None
        if self.balance_coefficient:
            sums = _sum_of_rows(torch.softmax(logits, dim=-1), real)
            if pool is None:
                balance = self._balance(sums, tokens_per_expert, total)
                share = balance * self.balance_coefficient
            else:
                report = partial(self.statistics.add_aux_loss, tokens=total)
                one_of = balance_with_all_layers(sums, pool, total, report)
                share = one_of * (self.balance_coefficient / pool.layers)
        if self.z_coefficient:
            squares = torch.logsumexp(logits, dim=-1).square()
            z_loss = _sum_of_rows(squares, real) * (self.z_coefficient / total)
            share = z_loss if share is None else share + z_loss
        self.statistics.add(tokens_per_expert, None if balance is None else balance.detach(), total)
        if share is None:
            return weights
        if self.calculate_per_token_loss:
            share = share * (counted.weight if counted is not None else total)
        return MoEAuxLossAutoScaler.apply(weights, share)

    def _balance(self, sums: Tensor, tokens_per_expert: Tensor, total: int) -> Tensor:
        """This rank's share of this layer's E * sum_e f_e P_e: f_e = choices of e / (k T), P_e = sum of scores / T.

        Args:
            sums: [experts], the scores, added up over the tokens of this rank.
            tokens_per_expert: [experts] int64, the choices of the same tokens.
            total: T, over all ranks that share the sequences.
        """
        totals = tokens_per_expert
        if self.tp_cp_group.size() > 1:
            totals = tokens_per_expert.clone()
            dist.all_reduce(totals, group=self.tp_cp_group)
        return (sums * totals).sum() * (self.num_experts / (self.topk * total * total))


def _sum_of_rows(values: Tensor, real: Tensor | None) -> Tensor:
    """Sum over the first dimension; where ``real`` is given, of its rows only."""
    # A product, not a choice by index: its size does not depend on the data, so the host waits for nothing.
    return values.sum(0) if real is None else real.to(values.dtype) @ values
