"""Collectives that move rows between the ranks that share the experts, with their gradients.

All of them accept a different number of rows for every rank, also none, and rest on
``all_to_all_single`` alone: NCCL, HCCL and gloo offer it with uneven splits, which is not
so for an uneven all-gather. A group of one rank costs nothing.
"""

from __future__ import annotations

from typing import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def _all_to_all(rows: Tensor, send: Sequence[int], receive: Sequence[int], group) -> Tensor:
    received = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), list(receive), list(send), group=group)
    return received


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, send, receive, group):
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx, grad):
        return _all_to_all(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def exchange_rows(rows: Tensor, send: Sequence[int], receive: Sequence[int], group) -> Tensor:
    """Send consecutive runs of rows to the ranks of a group and return what they sent here.

    Args:
        rows: [sum(send), ...], in the order of the receiving ranks.
        send: rows for each rank of the group.
        receive: rows from each rank of the group.
        group: the process group.

    Returns:
        [sum(receive), ...], in the order of the sending ranks.
    """
    if group.size() == 1:
        return rows
    return _ExchangeRows.apply(rows, tuple(send), tuple(receive), group)


def _gather(rows: Tensor, counts: Sequence[int], group) -> Tensor:
    size = group.size()
    copies = rows.expand(size, *rows.shape).reshape(-1, *rows.shape[1:])
    return _all_to_all(copies, [rows.shape[0]] * size, counts, group)


def _reduce_scatter(rows: Tensor, counts: Sequence[int], group) -> Tensor:
    mine = counts[group.rank()]
    parts = _all_to_all(rows, counts, [mine] * group.size(), group)
    # One sum over the rank axis: fp32 accumulation also for bf16, in the same order on every rank.
    return parts.view(group.size(), mine, *rows.shape[1:]).sum(0)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, counts, group):
        ctx.counts, ctx.group = counts, group
        return _gather(rows, counts, group)

    @staticmethod
    def backward(ctx, grad):
        return _reduce_scatter(grad, ctx.counts, ctx.group), None, None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, counts, group):
        ctx.counts, ctx.group = counts, group
        return _reduce_scatter(rows, counts, group)

    @staticmethod
    def backward(ctx, grad):
        return _gather(grad, ctx.counts, ctx.group), None, None


def gather_rows(rows: Tensor, counts: Sequence[int], group) -> Tensor:
    """The rows of all ranks, in rank order; the gradient is summed back over the ranks.

    Args:
        rows: [counts[own rank], ...].
        counts: rows of each rank of the group.
        group: the process group.
    """
    if group.size() == 1:
        return rows
    return _GatherRows.apply(rows, tuple(counts), group)


def reduce_scatter_rows(rows: Tensor, counts: Sequence[int], group) -> Tensor:
    """Sum the ranks' rows and keep the own part; the inverse of :func:`gather_rows`.

    Args:
        rows: [sum(counts), ...], partial sums.
        counts: rows of each rank of the group.
        group: the process group.
    """
    if group.size() == 1:
        return rows
    return _ReduceScatterRows.apply(rows, tuple(counts), group)
