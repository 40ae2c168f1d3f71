"""Blocks by plain products, for what no fused kernel takes (such as fp32 on an accelerator)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_telechat.backend.block_attention import Block, Grads, Saved
from megatron_telechat.backend.block_attention.running import Running

QUERIES_AT_ONCE = 1024
"""The scores of so many queries are held at a time."""


class PlainBlocks:
    """`BlockAttention` in fp32 products; scores of `QUERIES_AT_ONCE` queries in memory."""

    def takes(self, query: Tensor) -> bool:
        """See `BlockAttention`."""
        return True

    def prepared(self, rows: Tensor) -> Tensor:
        """See `BlockAttention`."""
        return rows.float() if rows.dtype != torch.float64 else rows

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], causal: bool, total: Running
    ) -> None:
        """See `BlockAttention`."""
        for q0, q1, k0, k1 in _parts(blocks, causal):
            scores = _scores(query[q0:q1], key[k0:k1], causal)
            lse = scores.logsumexp(-1).flatten(0, 1)
            weights = (scores - lse.view(*scores.shape[:3], 1)).exp_()
            out = torch.einsum("grqk,kgd->qgrd", weights, value[k0:k1]).flatten(1, 2)
            (total.begin if causal else total.add)(slice(q0, q1), out, lse)

    def backward(
        self, saved: Saved, key: Tensor, value: Tensor, blocks: Sequence[Block], causal: bool, grads: Grads
    ) -> None:
        """See `BlockAttention`."""
        for q0, q1, k0, k1 in _parts(blocks, causal):
            k, v = key[k0:k1], value[k0:k1]
            groups, scale = k.shape[1], 1.0 / math.sqrt(k.shape[2])
            query, grad, out = (each[q0:q1].unflatten(1, (groups, -1)) for each in (saved.query, saved.grad, saved.out))
            scores = _scores(saved.query[q0:q1], k, causal)
            weights = (scores - saved.lse[:, q0:q1].view(*scores.shape[:3], 1)).exp_()
            grads.value[k0:k1] += torch.einsum("grqk,qgrd->kgd", weights, grad)
            delta = (grad * out).sum(-1).permute(1, 2, 0).unsqueeze(-1)
            inner = weights * (torch.einsum("qgrd,kgd->grqk", grad, v) - delta) * scale
            grads.query[q0:q1] += torch.einsum("grqk,kgd->qgrd", inner, k).flatten(1, 2)
            grads.key[k0:k1] += torch.einsum("grqk,qgrd->kgd", inner, query)


def _parts(blocks: Sequence[Block], causal: bool) -> Iterator[Block]:
    """At most `QUERIES_AT_ONCE` queries each."""
    for q0, q1, k0, k1 in blocks:
        for start in range(q0, q1, QUERIES_AT_ONCE):
            stop = min(start + QUERIES_AT_ONCE, q1)
            yield start, stop, k0, k1 - (q1 - stop) if causal else k1


def _scores(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """Scaled products, [groups, heads of a group, queries, keys]; what a query does not see is minus infinity."""
    groups = key.shape[1]
    scores = torch.einsum("qgrd,kgd->grqk", query.unflatten(1, (groups, -1)), key) / math.sqrt(key.shape[2])
    if causal:
        queries, keys = scores.shape[2:]
        seen = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
        scores.masked_fill_(~seen, -math.inf)
    return scores
