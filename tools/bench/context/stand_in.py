"""A stand-in device: the products of a block take ``flops / rate`` of sleep; merging, packing, sums and transfers stay
real.

What sleeps does not compete with the transfers for a core, as an accelerator does not. In place of the products stands
an attention whose scores depend on the key alone, so that sums over keys are enough: far cheaper, and still a softmax
over keys with an LSE, so that the way of every row through exchange and merge can be checked. Its gradient of queries
is zero.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_telechat.backend.block_attention import Block, Grads, Running, Saved

BACKWARD = 2.5
"""Products of a backward over those of a forward: five against two."""


def flops(queries: int, keys: int, causal: bool, heads: int, width: int) -> float:
    """Of a forward: two products for each pair of a query and a key that it sees."""
    pairs = queries * keys - (queries * (queries - 1) / 2 if causal else 0)
    return 4 * pairs * heads * width


class StandIn:
    """A `BlockAttention` that sleeps.

    Args:
        gflops: rate of the device; infinite: it takes the time of the sums.
    """

    def __init__(self, gflops: float):
        self._rate = gflops * 1e9

    def takes(self, query: Tensor) -> bool:
        return True

    def prepared(self, rows: Tensor) -> Tensor:
        return rows.float()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], causal: bool, total: Running
    ) -> None:
        take = total.begin if causal else total.add
        for q0, q1, k0, k1 in blocks:
            take(slice(q0, q1), *self.attention(query[q0:q1], key[k0:k1], value[k0:k1], causal))

    def backward(
        self, saved: Saved, key: Tensor, value: Tensor, blocks: Sequence[Block], causal: bool, grads: Grads
    ) -> None:
        for q0, q1, k0, k1 in blocks:
            grad, query, out = (each[q0:q1] for each in (saved.grad, saved.query, saved.out))
            dq, dk, dv = self.gradients(grad, query, out, saved.lse[:, q0:q1], key[k0:k1], value[k0:k1], causal)
            grads.query[q0:q1] += dq
            grads.key[k0:k1] += dk
            grads.value[k0:k1] += dv

    def attention(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """One block, aligned to the bottom right: out [queries, heads, d], LSE [heads, queries]."""
        begin = time.perf_counter()
        queries, heads, width = query.shape
        weight = _weights(key)
        sums, norms = weight.unsqueeze(-1) * value, weight
        if causal:
            sums, norms = sums.cumsum(0)[-queries:], norms.cumsum(0)[-queries:]
        else:
            sums, norms = sums.sum(0, keepdim=True), norms.sum(0, keepdim=True)
        per_group = (sums / norms.unsqueeze(-1)).repeat_interleave(heads // key.shape[1], 1)
        lse = norms.log().repeat_interleave(heads // key.shape[1], 1)
        out = per_group.expand(queries, heads, width), lse.expand(queries, heads).t()
        self._sleep(begin, flops(queries, len(key), causal, heads, width))
        return out

    def gradients(
        self, grad: Tensor, query: Tensor, out: Tensor, lse: Tensor, key: Tensor, value: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the queries, keys and values of one block.

        Args:
            grad, query, out: [queries, heads, d].
            lse: [heads, queries], of all keys.
            key, value: [keys, groups, d].
        """
        begin = time.perf_counter()
        queries, heads, width = query.shape
        groups = key.shape[1]
        share = lse.t().neg().exp()
        # Summed over the heads of a group; what falls on a key is the sum over the queries that see it.
        grads = (share.unsqueeze(-1) * grad).unflatten(1, (groups, -1)).sum(2)
        deltas = (share * torch.linalg.vecdot(grad, out)).unflatten(1, (groups, -1)).sum(2)
        if causal:
            grads, deltas = (_seen(each, len(key)) for each in (grads, deltas))
        else:
            grads, deltas = grads.sum(0, keepdim=True), deltas.sum(0, keepdim=True)
        weight = _weights(key)
        dv = weight.unsqueeze(-1) * grads
        score = weight * (torch.linalg.vecdot(value, grads.expand(value.shape)) - deltas)
        dk = (score / width**0.5).unsqueeze(-1).expand(key.shape)
        self._sleep(begin, BACKWARD * flops(queries, len(key), causal, heads, width))
        return torch.zeros_like(query), dk, dv

    def _sleep(self, begin: float, work: float) -> None:
        """Until the device would be done."""
        time.sleep(max(0.0, begin + work / self._rate - time.perf_counter()))


def _weights(key: Tensor) -> Tensor:
    """[keys, groups]: the exponential of a key's score, the scaled sum of its entries."""
    return (key.sum(-1) / key.shape[2] ** 0.5).exp()


def _seen(rows: Tensor, keys: int) -> Tensor:
    """For each key of a causal block the sum over the queries that see it."""
    sums = rows.flip(0).cumsum(0).flip(0)
    before = keys - len(rows)
    return torch.cat([sums[:1].expand(before, *sums.shape[1:]), sums]) if before else sums
