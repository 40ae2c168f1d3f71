"""What context-parallel ranks exchange for the attention of a layer, in bytes and in seconds; rows of one document.

A ring of R ranks holds a row in zigzag order: rank r has chunks r and 2R - 1 - r of 2R. The keys and values that its
queries see come straight from the ranks that hold them (`parallel.context.plan`): of another rank its first chunk, and
the second one too where that rank stands behind. Where an all-to-all of U ranks comes before (Ulysses), each of the U
has all tokens of its place in the ring, and 1/U of the heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.activations import BYTES, context_pieces, tokens_of
from megatron_telechat.costs.communication import Links


@dataclass(frozen=True)
class ContextExchange:
    """The exchange of one layer and micro-batch, seen from one rank.

    Attributes:
        heads, ring: ranks of the all-to-all (U), and of the ring (R).
        tensor: tensor-parallel size: ranks of a group lie so far apart.
        inputs, output: bytes of queries, keys and values of a rank, and of its attention output.
        chunk: bytes of keys and values of half of a rank's tokens.
        keeps: whether what was received is kept for the backward.
        pieces: of each transfer.
    """

    heads: int
    ring: int
    tensor: int
    inputs: float
    output: float
    chunk: float
    keeps: bool
    pieces: int

    @classmethod
    def of(cls, run: RunConfig) -> ContextExchange:
        """That of a run; the layers do not differ."""
        model, parallel, tokens = run.model, run.parallel, tokens_of(run)
        heads, ring = parallel.context_sizes
        element = BYTES[run.training.precision] * tokens.whole / tokens.tensor
        output, keys_values = element * model.output_width, element * (model.key_width + model.value_width)
        pieces, keeps = context_pieces(run), parallel.keeps_received
        return cls(heads, ring, tokens.tensor, output + keys_values, output, keys_values / 2, keeps, pieces)

    def exchanged_heads(self) -> float:
        """Bytes that a rank brings to the all-to-alls of one forward, itself included; a backward has as many."""
        return (self.inputs + self.output) * (self.heads > 1)

    def sent(self, context_rank: int) -> float:
        """Bytes of keys and values that a rank sends in one forward."""
        return self.chunk * sum(there for _, there, _ in _peers(self.ring, context_rank // self.heads))

    def received(self, context_rank: int) -> float:
        """Bytes of keys and values that a rank receives in one forward."""
        return self.chunk * sum(here for _, _, here in _peers(self.ring, context_rank // self.heads))

    # ---- seconds ----------------------------------------------------------------------------

    def forward_seconds(self, links: Links, core: float) -> float:
        """Seconds of a forward whose products take `core` seconds in all.

        Products of the own tokens, 1/R of all, run while the first piece arrives. When the last piece has arrived, its
        products are left.
        """
        if self.ring == 1:
            return core + self._heads_seconds(links)
        transfers = self._seconds(links, fetches=1, homes=0)
        last = core / (self.ring * self.pieces)
        return max(core, transfers + last) + self._heads_seconds(links)

    def backward_seconds(self, links: Links, core: float) -> float:
        """Seconds of a backward whose products take `core` seconds in all.

        Keys and values travel again, unless they were kept; their gradients go home. One half of the products of the
        own tokens runs while the first piece arrives, the other one beside the last gradients; what these two transfers
        take longer is lost.
        """
        if self.ring == 1:
            return core + self._heads_seconds(links)
        fetches = 0 if self.keeps else 1
        transfers = self._seconds(links, fetches=fetches, homes=1)
        messages = (self.ring - 1) * self.pieces
        late = max(0.0, self._seconds(links, fetches=0, homes=1) / messages - core / (2 * self.ring))
        last = core / (self.ring * self.pieces)
        return max(core + (1 + fetches) * late, transfers + last) + self._heads_seconds(links)

    def _heads_seconds(self, links: Links) -> float:
        """The two all-to-alls of one pass, which nothing hides."""
        return sum(links.all_to_all(size, self.heads, self.tensor) for size in (self.inputs, self.output))

    def _seconds(self, links: Links, fetches: int, homes: int) -> float:
        """The transfers of the busiest rank, both directions and both kinds of link at once."""
        stride = self.tensor * self.heads
        near, far = zip(*_busiest(self.ring, stride, links.ranks_per_node, fetches, homes), strict=True)
        inside = (self.chunk * chunks / links.intra for chunks in near)
        outside = (self.chunk * chunks / links.inter for chunks in far)
        busiest = max(max(pair) for pair in zip(inside, outside, strict=True))
        return busiest + (self.ring - 1) * links.latency


@lru_cache
def _peers(ring: int, rank: int) -> tuple[tuple[int, int, int], ...]:
    """For each other rank of the ring: its number, chunks that go there and chunks that come from there, in one
    forward."""
    return tuple((peer, 1 + (rank > peer), 1 + (peer > rank)) for peer in range(ring) if peer != rank)


@lru_cache
def _busiest(ring: int, stride: int, node: int, fetches: int, homes: int) -> tuple[tuple[int, int], ...]:
    """For each rank: chunks over the links inside its node and over those to others, in the direction that has more.

    Args:
        stride: ranks of the ring lie so far apart; the first one is the first of its node.
        node: ranks of a node.
        fetches: how often keys and values travel to those that need them.
        homes: how often as much travels back to those that hold them.
    """
    out = []
    for rank in range(ring):
        chunks = {True: [0, 0], False: [0, 0]}
        for peer, there, here in _peers(ring, rank):
            near = peer * stride // node == rank * stride // node
            chunks[near][0] += fetches * there + homes * here
            chunks[near][1] += fetches * here + homes * there
        out.append((max(chunks[True]), max(chunks[False])))
    return tuple(out)
