"""Other ways to exchange keys and values, each as good as its published form: the same kernel, the same sums in fp32.

* `WholeShards`: a ring as ring-flash-attention runs it. Keys and values of a rank travel to its neighbour beside the
  blocks, N - 1 hops in each pass; gradients travel after them in fp32, N hops, home included.
* `ReversedRing`: a ring as TransformerEngine runs it. The backward begins with the shard that arrived last, which was
  kept, and goes the other way: keys, values and gradients travel together, N - 1 hops, in the type of the computation.
* `Gathered`: keys and values of all ranks are gathered beside the own blocks (again in the backward); gradients are
  summed by a reduce-scatter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from context.problem import Inputs, Result
from megatron_telechat.backend.block_attention import Block, BlockAttention, Grads, Running, Saved
from megatron_telechat.parallel.context.layout import Fragments, Layout, fragments


def per_document_zigzag(documents: np.ndarray, ranks: int) -> Layout:
    """Every document cut into twice as many chunks as ranks, rank r with chunks r and 2 ranks - 1 - r (Megatron's THD).

    The length of each document is a multiple of twice the ranks.
    """
    half = np.arange(ranks)
    owners = np.concatenate([half, half[::-1]])
    chunks = np.repeat(np.diff(documents) // owners.size, owners.size)
    bounds = np.concatenate([[0], np.cumsum(chunks)])
    return Layout.of_stretches("per document", bounds, np.tile(owners, documents.size - 1), ranks)


def blocks_with_shard(parts: Fragments, rank: int, other: int) -> list[Block]:
    """Blocks of the queries of a rank with all rows of another; with its own they are causal."""
    mine, theirs = np.flatnonzero(parts.owners == rank), np.flatnonzero(parts.owners == other)
    sizes = parts.stops - parts.starts
    queries = np.concatenate([[0], np.cumsum(sizes[mine])])
    keys = np.concatenate([[0], np.cumsum(sizes[theirs])])
    blocks: list[Block] = []
    for number, part in enumerate(mine):
        seen = np.flatnonzero((parts.documents[theirs] == parts.documents[part]) & (theirs <= part))
        if not seen.size:
            continue
        block = (int(queries[number]), int(queries[number + 1]), int(keys[seen[0]]), int(keys[seen[-1] + 1]))
        if rank != other and blocks and blocks[-1][1] == block[0] and blocks[-1][2:] == block[2:]:
            block = (blocks.pop()[0], *block[1:])
        blocks.append(block)
    return blocks


class Neighbours:
    """Messages along a ring of the ranks of a group.

    Receives are posted first: gloo tells the sender so over the same connection, and behind a message that leaves the
    other direction would stand still until it is through.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def pass_on(self, sent: Tensor, received: Tensor, places: int = 1) -> Callable[[], None]:
        """Send to the rank so many places behind, receive from the one so many before; returns the wait."""
        peers = [dist.get_global_rank(self.group, (self.rank + step) % self.size) for step in (places, -places)]
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.irecv, received, peers[1], self.group),
                dist.P2POp(dist.isend, sent, peers[0], self.group),
            ]
        )

        def wait() -> None:
            for work in works:
                work.wait()

        return wait


class Peer(ABC):
    """A way to exchange whole shards.

    Args:
        layout: of the row.
        documents: 0, and where each document of the row ends.
        kernel: of the blocks.
        group: the ranks.
    """

    def __init__(self, layout: Layout, documents: np.ndarray, kernel: BlockAttention, group: dist.ProcessGroup):
        self.layout, self.kernel = layout, kernel
        self.ring = Neighbours(group)
        self.size, self.rank = self.ring.size, self.ring.rank
        parts = fragments(layout, documents)
        self.blocks = [blocks_with_shard(parts, self.rank, other) for other in range(self.size)]
        self.kept: tuple[Tensor, ...] = ()

    def forward(self, inputs: Inputs) -> Tensor:
        """Attention of this rank's tokens, [t, heads, d]; what the backward needs is kept."""
        total = Running(self.kernel.prepared(inputs.query))
        shard = self._forward(inputs, torch.stack([inputs.key, inputs.value]), total)
        out = total.out.to(inputs.query.dtype)
        self.kept = (out, total.lse, shard)
        return out

    def backward(self, inputs: Inputs) -> Result:
        """Gradients for that of the output; ends a step."""
        out, lse, shard = self.kept
        self.kept = ()
        saved = Saved(self.kernel, inputs.grad, inputs.query, out, lse)
        query = torch.zeros(inputs.query.shape)
        grads = self._backward(saved, shard, query)
        return Result(out, *(each.to(out.dtype) for each in (query, grads[0], grads[1])))

    @abstractmethod
    def _forward(self, inputs: Inputs, shard: Tensor, total: Running) -> Tensor:
        """Add all blocks; returns the keys and values that are kept, [2, t, groups, d]."""

    @abstractmethod
    def _backward(self, saved: Saved, shard: Tensor, query: Tensor) -> Tensor:
        """Add the gradients of queries to ``query``; returns those of keys and values, [2, t, groups, d]."""

    def _add(self, query: Tensor, shard: Tensor, other: int, total: Running) -> None:
        key, value = self.kernel.prepared(shard)
        self.kernel.forward(query, key, value, self.blocks[other], other == self.rank, total)

    def _gradients(self, saved: Saved, shard: Tensor, other: int, query: Tensor, into: Tensor) -> None:
        key, value = self.kernel.prepared(shard)
        grads = Grads(query, into[0], into[1])
        self.kernel.backward(saved, key, value, self.blocks[other], other == self.rank, grads)


class WholeShards(Peer):
    """The ring of ring-flash-attention."""

    keeps_last = False
    """Whether the backward begins with the shard that arrived last, instead of the own one."""

    def _forward(self, inputs: Inputs, shard: Tensor, total: Running) -> Tensor:
        own = shard
        query = self.kernel.prepared(inputs.query)
        for step in range(self.size):
            arrived, wait = torch.empty_like(shard), None
            if step + 1 < self.size:
                wait = self.ring.pass_on(shard, arrived)
            self._add(query, shard, (self.rank - step) % self.size, total)
            if wait:
                wait()
                shard = arrived
        return shard if self.keeps_last else own

    def _backward(self, saved: Saved, shard: Tensor, query: Tensor) -> Tensor:
        grads = torch.zeros(shard.shape)
        home, wait_home = grads, None
        for step in range(self.size):
            arrived, wait = torch.empty_like(shard), None
            if step + 1 < self.size:
                wait = self.ring.pass_on(shard, arrived)
            found = torch.zeros(shard.shape)
            self._gradients(saved, shard, (self.rank - step) % self.size, query, found)
            if wait_home:
                wait_home()
                grads = home.add_(found)
            else:
                grads = found
            if wait:
                wait()
                shard = arrived
            home = torch.empty_like(grads)
            wait_home = self.ring.pass_on(grads, home)
        if wait_home:
            wait_home()
        return home


class ReversedRing(WholeShards):
    """The ring of TransformerEngine."""

    keeps_last = True

    def _backward(self, saved: Saved, shard: Tensor, query: Tensor) -> Tensor:
        """Step by step: keys and values and the gradients so far go back to the rank that sent them."""
        dtype, last = shard.dtype, self.size - 1
        grads = torch.zeros(0, dtype=dtype)
        for step in range(self.size):
            # Keys and values at first, gradients at last, both in between.
            leaves = torch.stack([shard, grads.view(shard.shape)]) if 0 < step < last else grads if step else shard
            arrives = torch.empty_like(leaves)
            wait = self.ring.pass_on(leaves.view(-1), arrives.view(-1), -1)
            found = torch.zeros(shard.shape)
            self._gradients(saved, shard, (self.rank + 1 + step) % self.size, query, found)
            wait()
            if step == 0:
                shard, grads = arrives, found.to(dtype)
            else:
                sums = arrives[1] if step < last else arrives
                grads = (sums.float() + found).to(dtype)
                shard = arrives[0] if step < last else shard
        return grads


class Gathered(Peer):
    """All keys and values on every rank."""

    def _forward(self, inputs: Inputs, shard: Tensor, total: Running) -> Tensor:
        query = self.kernel.prepared(inputs.query)
        everything, wait = self._gather(shard)
        self._add(query, shard, self.rank, total)
        wait()
        for other in self._others():
            self._add(query, everything[other], other, total)
        return shard

    def _backward(self, saved: Saved, shard: Tensor, query: Tensor) -> Tensor:
        everything, wait = self._gather(shard)
        found = torch.zeros(everything.shape)
        self._gradients(saved, shard, self.rank, query, found[self.rank])
        wait()
        for other in self._others():
            self._gradients(saved, everything[other], other, query, found[other])
        mine = torch.empty_like(shard)
        dist.reduce_scatter_tensor(mine.view(-1), found.to(shard.dtype).view(-1), group=self.ring.group)
        return mine

    def _gather(self, shard: Tensor) -> tuple[Tensor, Callable[[], object]]:
        everything = shard.new_empty((self.size, *shard.shape))
        work = dist.all_gather_into_tensor(everything.view(-1), shard.view(-1), group=self.ring.group, async_op=True)
        assert work is not None, "this rank is in the group"
        return everything, work.wait

    def _others(self) -> Sequence[int]:
        return [other for other in range(self.size) if other != self.rank and self.blocks[other]]
