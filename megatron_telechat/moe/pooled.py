"""The balancing loss over all MoE layers at once (``moe_aux_loss_formula`` hf), whose layers lie on several stages.

transformers' `load_balancing_loss_func` puts the router logits of all L layers together and computes one
``E sum_e f_e P_e``: f_e is the number of choices of expert e in all layers over L T, P_e the mean of its probability
over all layers and the T tokens of the micro-batch. Counts have no gradient, so a layer's probabilities need f_e alone,
and not before their backward. By then every layer of the micro-batch has counted, wherever it lies, because a backward
begins at the last layer.

So the counts go with the micro-batch: a stage adds those of its layers to those that came in, and sends the sums in a
few rows behind its hidden states. The last stage completes them over the ranks that share the rows of the micro-batch,
and the totals come back in the same rows of the gradients. Nothing is looked up by the number of a micro-batch, and
no message is added: every pipeline schedule, interleaved ones too, keeps its order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_telechat.config.schema import RunConfig

_BASE, _DIGITS = 256, 6
"""A count travels as so many digits to this base, each of which bf16 and fp16 hold exactly: up to 2^48 choices."""


def carried_rows(run: RunConfig) -> int:
    """Rows [micro-batch, hidden] of counts behind the hidden states that a pipeline stage sends; 0: none are sent."""
    if not run.balances_over_layers or run.parallel.pipeline_model_parallel_size == 1:
        return 0
    assert run.model.num_experts is not None, "only experts are balanced"
    return -(-run.model.num_experts * _DIGITS // (run.training.micro_batch_size * run.model.hidden_size))


def pools_of(run: RunConfig) -> Callable[[], ChoicePool] | None:
    """Makes the pool of a micro-batch; None: each layer of this run has a balancing loss of its own."""
    if not run.balances_over_layers:
        return None
    model = run.model
    layers = sum(model.layer_is_moe(layer) for layer in range(model.num_layers))
    assert model.num_experts is not None, "only experts are balanced"
    return partial(ChoicePool, layers, model.num_experts, carried_rows(run))


class ChoicePool:
    """How often each expert was chosen in one micro-batch, over all MoE layers.

    It belongs to one call of one virtual stage: several micro-batches are under way at once.

    Args:
        layers: MoE layers of the whole model.
        num_experts: of a layer.
        rows: of counts behind the hidden states between two stages (`carried_rows`).

    Attributes:
        totals: int64 [experts], over all layers and all ranks that hold parts of these rows; known before the first
            backward of a layer.
    """

    def __init__(self, layers: int, num_experts: int, rows: int):
        self.layers = layers
        self.num_experts = num_experts
        self.rows = rows
        self.totals: Tensor | None = None
        self._before: Tensor | None = None
        self._own: dict[int, Tensor] = {}

    def note(self, layer: int, counts: Tensor) -> None:
        """Add the choices of one layer, int64 [experts]. The second pass of a recomputed layer changes nothing."""
        self._own.setdefault(layer, counts)

    def complete(self, group: dist.ProcessGroup) -> None:
        """On the last stage, behind its layers. Collective over the ranks that share the rows of the micro-batch."""
        self.totals = self._so_far(None)
        if group.size() > 1:
            dist.all_reduce(self.totals, group=group)

    def receive(self, arrived: Tensor) -> Tensor:
        """What the stage before sent, [s + rows, b, hidden] → its hidden states, [s, b, hidden]."""
        return _Receive.apply(arrived, self)

    def hand_on(self, hidden: Tensor) -> Tensor:
        """[s, b, hidden] → [s + rows, b, hidden], with the counts of all layers up to here."""
        return _HandOn.apply(hidden, self)

    def _so_far(self, device: torch.device | None) -> Tensor:
        counted = [*self._own.values(), *([] if self._before is None else [self._before])]
        return sum(counted[1:], counted[0].clone()) if counted else torch.zeros(self.num_experts, device=device).long()

    def _encoded(self, counts: Tensor, like: Tensor) -> Tensor:
        """Counts as [rows, b, hidden] of the type of the hidden states."""
        places = _BASE ** torch.arange(_DIGITS, device=counts.device)
        digits = counts.unsqueeze(1).div(places, rounding_mode="floor").remainder(_BASE)
        sent = like.new_zeros(self.rows, *like.shape[1:])
        sent.view(-1)[: digits.numel()] = digits.flatten().to(like.dtype)
        return sent

    def _decoded(self, sent: Tensor) -> Tensor:
        digits = sent.reshape(-1)[: self.num_experts * _DIGITS].long().view(self.num_experts, _DIGITS)
        return (digits * _BASE ** torch.arange(_DIGITS, device=sent.device)).sum(1)


class _Receive(torch.autograd.Function):
    """Forward: counts in. Backward: totals out, behind the gradients for the stage before."""

    @staticmethod
    def forward(ctx: Any, arrived: Tensor, pool: ChoicePool) -> Tensor:
        ctx.pool = pool
        hidden, counts = arrived.split([arrived.shape[0] - pool.rows, pool.rows])
        pool._before = pool._decoded(counts)
        return hidden

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        assert ctx.pool.totals is not None, "they came in with the gradients"
        return torch.cat([grad, ctx.pool._encoded(ctx.pool.totals, grad)]), None


class _HandOn(torch.autograd.Function):
    """Forward: counts out, behind the hidden states for the next stage. Backward: totals in."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, pool: ChoicePool) -> Tensor:
        ctx.pool = pool
        return torch.cat([hidden, pool._encoded(pool._so_far(hidden.device), hidden)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad, totals = grad.split([grad.shape[0] - ctx.pool.rows, ctx.pool.rows])
        ctx.pool.totals = ctx.pool._decoded(totals)
        return grad, None


class _WithAllLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor, pool: ChoicePool, scale: float, report: Callable[[Tensor], None]) -> Tensor:
        ctx.save_for_backward(sums)
        ctx.pool, ctx.scale, ctx.report = pool, scale, report
        return sums.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (sums,) = ctx.saved_tensors
        assert ctx.pool.totals is not None, "every layer has counted before the first backward"
        slopes = ctx.pool.totals.to(sums.dtype) * ctx.scale
        ctx.report((sums * slopes).sum())
        return grad * slopes, None, None, None


def balance_with_all_layers(sums: Tensor, pool: ChoicePool, total: int, report: Callable[[Tensor], None]) -> Tensor:
    """One layer's share of the loss, times the number of layers: the mean over layers is the loss.

    Args:
        sums: [experts], the layer's probabilities, added up over the tokens of this rank.
        pool: the choices of all layers.
        total: tokens T of the micro-batch that count, over all ranks that share its rows.
        report: called in the backward with this rank's part of the value, fp32 [].

    Returns:
        [] a tensor with the right gradient. Its value is not known yet, and is 0.
    """
    return _WithAllLayers.apply(sums, pool, pool.num_experts / (pool.layers * total * total), report)
