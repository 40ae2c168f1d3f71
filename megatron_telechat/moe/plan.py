"""The way of the tokens to their experts and back, as a value.

A plan belongs to one call of the block: nothing is kept on a module, so calls of different
micro-batches may interleave and a part of the input may have a plan of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_telechat.moe.router import Routing


@dataclass(frozen=True)
class ExpertGroups:
    """The ranks that share the experts of a layer.

    Attributes:
        ep: ranks with different experts.
        etp: ranks that each hold a slice of the same experts.
        all: their product, expert-tensor-parallel rank fastest.
    """

    ep: dist.ProcessGroup
    etp: dist.ProcessGroup
    all: dist.ProcessGroup


@dataclass(frozen=True)
class DispatchPlan:
    """Where each row goes; a row is one token on its way to one of its experts.

    Attributes:
        row_tokens: [n * k], the token of every row sent, rows sorted by expert.
        token_rows: [n, k], the rows of every token; the inverse of ``row_tokens``.
        tokens_per_local_expert: [local experts], rows that the experts here receive, from all ranks.
        send, receive: rows to and from every rank of the expert-parallel group.
        etp_rows: rows that each rank of the expert-tensor-parallel group brings in.
        sort, unsort: permutation of the received rows by local expert, and its inverse;
            None where they arrive sorted.
    """

    row_tokens: Tensor
    token_rows: Tensor
    tokens_per_local_expert: Tensor
    send: tuple[int, ...]
    receive: tuple[int, ...]
    etp_rows: tuple[int, ...]
    sort: Optional[Tensor]
    unsort: Optional[Tensor]


def _inverse(permutation: Tensor) -> Tensor:
    positions = torch.arange(permutation.numel(), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, positions)


def _sort_by_expert(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Permutation that turns [source, expert] runs of rows into [expert, source] runs, and its inverse."""
    starts = counts.flatten().cumsum(0).view_as(counts) - counts
    sizes = counts.t().flatten()
    new_starts = sizes.cumsum(0) - sizes
    total = int(sizes.sum())
    shift = torch.repeat_interleave(starts.t().flatten() - new_starts, sizes, output_size=total)
    sort = torch.arange(total) + shift
    return sort, _inverse(sort)


def plan_dispatch(routing: Routing, groups: ExpertGroups) -> DispatchPlan:
    """Exchange the counts and lay out the rows.

    One all-gather of the counts and one device-to-host copy where ranks share the experts;
    neither where one rank has them all.
    """
    num_tokens, topk = routing.experts.shape
    order = routing.experts.flatten().argsort(stable=True)
    row_tokens = order // topk
    token_rows = _inverse(order).view(num_tokens, topk)
    num_experts = routing.tokens_per_expert.numel()
    ep_size, etp_size = groups.ep.size(), groups.etp.size()
    if ep_size * etp_size == 1:
        return DispatchPlan(row_tokens, token_rows, routing.tokens_per_expert, (), (), (), None, None)

    gathered = routing.tokens_per_expert.new_empty(ep_size * etp_size * num_experts)
    dist.all_gather_into_tensor(gathered, routing.tokens_per_expert, group=groups.all)
    local = num_experts // ep_size
    # [EP source, ETP source, EP destination, local expert]
    counts = gathered.cpu().view(ep_size, etp_size, ep_size, local)
    ep_rank, etp_rank = groups.ep.rank(), groups.etp.rank()
    here = counts[:, :, ep_rank].transpose(0, 1)  # [ETP source, EP source, local expert]: the order of arrival
    device = order.device
    sort = unsort = None
    if local > 1:
        sort, unsort = (index.to(device) for index in _sort_by_expert(here.reshape(-1, local)))
    return DispatchPlan(
        row_tokens=row_tokens,
        token_rows=token_rows,
        tokens_per_local_expert=here.sum((0, 1)).to(device),
        send=tuple(counts[ep_rank, etp_rank].sum(1).tolist()),
        receive=tuple(here[etp_rank].sum(1).tolist()),
        etp_rows=tuple(here.sum((1, 2)).tolist()),
        sort=sort,
        unsort=unsort,
    )


def _sum_rows(rows: Tensor, token_rows: Tensor) -> Tensor:
    # Each token gathers its k rows: no atomics, so the result is the same in every run, which a
    # scatter-add on an accelerator is not. embedding_bag is the fused form, on the CPU four times
    # as fast as gather and sum; it takes no double and no empty input.
    if rows.device.type == "cpu" and rows.dtype != torch.float64 and rows.numel():
        return F.embedding_bag(token_rows, rows, mode="sum")
    num_tokens, topk = token_rows.shape
    return rows.index_select(0, token_rows.flatten()).view(num_tokens, topk, -1).sum(1)


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, row_tokens, token_rows):
        ctx.save_for_backward(token_rows)
        return tokens.index_select(0, row_tokens)

    @staticmethod
    def backward(ctx, grad):
        (token_rows,) = ctx.saved_tensors
        return _sum_rows(grad.contiguous(), token_rows), None, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, row_tokens, token_rows):
        ctx.save_for_backward(row_tokens)
        return _sum_rows(rows, token_rows)

    @staticmethod
    def backward(ctx, grad):
        (row_tokens,) = ctx.saved_tensors
        return grad.index_select(0, row_tokens), None, None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def scatter_tokens(tokens: Tensor, plan: DispatchPlan) -> Tensor:
    """[n, h] → [n * k, h]: a copy of every token for each of its experts, sorted by expert."""
    return _ScatterTokens.apply(tokens, plan.row_tokens, plan.token_rows)


def gather_tokens(rows: Tensor, plan: DispatchPlan) -> Tensor:
    """[n * k, h] → [n, h]: the sum of each token's rows; the inverse way of :func:`scatter_tokens`."""
    return _GatherTokens.apply(rows, plan.row_tokens, plan.token_rows)


def scatter_weights(weights: Tensor, plan: DispatchPlan) -> Tensor:
    """[n, k] → [n * k]: the routing probability of every row sent."""
    inverse = plan.token_rows.flatten()
    return _Reorder.apply(weights.flatten(), _inverse(inverse), inverse)


def sort_rows(rows: Tensor, plan: DispatchPlan) -> Tensor:
    """Received rows in the order of the local experts."""
    return rows if plan.sort is None else _Reorder.apply(rows, plan.sort, plan.unsort)


def unsort_rows(rows: Tensor, plan: DispatchPlan) -> Tensor:
    """Rows in the order of the local experts, back in the order they came."""
    return rows if plan.sort is None else _Reorder.apply(rows, plan.unsort, plan.sort)
