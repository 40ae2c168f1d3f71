"""What one rank computes and exchanges for the attention of a micro-batch, from its layouts. Without torch.

The rows of keys and values of a rank go straight to the ranks whose queries see them. In step i a rank sends to the
rank i places behind it and receives from the rank i places before it, so that in every step each sends to one and
receives from one. Only rows that are needed travel.

Every rank makes its own plan, from the same documents and layouts, and the plans fit: what one expects to receive is
what the other sends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from megatron_telechat.parallel.context.layout import Fragments, Layout, fragments, zigzag

LEAST_ROWS = 128
"""A piece of a transfer has at least so many rows: smaller products and messages cost more than they hide."""


class Block(NamedTuple):
    """Queries ``q0 .. q1`` of this rank attend to keys ``k0 .. k1``, all of them.

    Where the keys are those of this rank the block is causal: its last query sees its last key, the one before all but
    that, and so on (aligned to the bottom right).
    """

    q0: int
    q1: int
    k0: int
    k1: int


Range = tuple[int, int]
"""Rows ``start .. stop`` of this rank."""


@dataclass(frozen=True)
class Transfer:
    """Rows of keys and values that leave and arrive together.

    Attributes:
        step: distance of the ranks: sent to the rank so many places behind, received from the one so many before.
        send: rows of this rank that leave, ascending.
        rows_in: number of rows that arrive.
        blocks: of the queries of this rank with the rows that arrive; no query is in two of them.
    """

    step: int
    send: tuple[Range, ...]
    rows_in: int
    blocks: tuple[Block, ...]

    @property
    def rows_out(self) -> int:
        """Number of rows that leave."""
        return sum(stop - start for start, stop in self.send)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key in the blocks."""
        return sum((block.q1 - block.q0) * (block.k1 - block.k0) for block in self.blocks)

    def cut(self, pieces: int) -> list[Transfer]:
        """The same in pieces of nearly equal rows, as sender and receiver both cut it; where rows are few the last
        ones are empty."""
        ins, outs = (_cuts(rows, pieces) for rows in (self.rows_in, self.rows_out))
        return [
            Transfer(self.step, _rows_between(self.send, *outs[n]), ins[n][1] - ins[n][0], self._blocks_of(*ins[n]))
            for n in range(pieces)
        ]

    def _blocks_of(self, start: int, stop: int) -> tuple[Block, ...]:
        clipped = (Block(q0, q1, max(k0, start) - start, min(k1, stop) - start) for q0, q1, k0, k1 in self.blocks)
        return tuple(block for block in clipped if block.k0 < block.k1)


@dataclass(frozen=True)
class ContextPlan:
    """One micro-batch on one rank of the ring of ranks that send keys and values.

    Tokens of the rank are numbered row after row of the micro-batch, ascending within each.

    Attributes:
        ranks: ranks of the ring.
        positions: int64 [b, s / ranks], where in its row each token lies.
        own: blocks of the rank's queries with its own keys, causal (`Block`).
        steps: what is exchanged with the others, one transfer for each of the ranks - 1 steps, perhaps an empty one:
            all ranks go through the same list, which keeps the messages of a pair in one order.
    """

    ranks: int
    positions: np.ndarray
    own: tuple[Block, ...]
    steps: tuple[Transfer, ...]

    @property
    def row_length(self) -> int:
        """Tokens of a whole row, S."""
        return self.positions.shape[1] * self.ranks

    @cached_property
    def _in_pieces(self) -> dict[int, tuple[Transfer, ...]]:
        return {}

    def transfers(self, pieces: int) -> tuple[Transfer, ...]:
        """The transfers in their order, each step in so many pieces; the same order on every rank."""
        if pieces not in self._in_pieces:
            self._in_pieces[pieces] = tuple(piece for step in self.steps for piece in step.cut(pieces))
        return self._in_pieces[pieces]


def _cuts(rows: int, pieces: int) -> list[Range]:
    """Where each piece begins and ends; pieces beyond what `LEAST_ROWS` allows are empty."""
    used = max(1, min(pieces, rows // LEAST_ROWS))
    bounds = [rows * min(n, used) // used for n in range(pieces + 1)]
    return list(zip(bounds, bounds[1:], strict=False))


def _rows_between(ranges: Sequence[Range], start: int, stop: int) -> tuple[Range, ...]:
    """The rows number ``start .. stop`` of these ranges, counted over all of them."""
    out, before = [], 0
    for first, last in ranges:
        low, high = max(start - before, 0), min(stop - before, last - first)
        if low < high:
            out.append((first + low, first + high))
        before += last - first
    return tuple(out)


def plan_rows(layouts: Sequence[Layout], documents: Sequence[np.ndarray], rank: int) -> ContextPlan:
    """The plan of a micro-batch on one rank.

    Args:
        layouts: of each row of the micro-batch; all of the same length and ranks.
        documents: for each row int64 [documents + 1]: 0, and where each document ends.
        rank: place in the ring.
    """
    ranks = layouts[0].ranks
    rows = [_RowPlanner(fragments(layout, ends), rank) for layout, ends in zip(layouts, documents, strict=True)]
    each = layouts[0].length // ranks
    own = [block for number, row in enumerate(rows) for block in row.own(number * each)]
    steps = []
    for step in range(1, ranks):
        send: list[Range] = []
        blocks: list[Block] = []
        arrived = 0
        for number, row in enumerate(rows):
            send += row.needed_by((rank + step) % ranks, number * each)
            found, count = row.with_rows_of((rank - step) % ranks, number * each, arrived)
            blocks += found
            arrived += count
        steps.append(Transfer(step, tuple(send), arrived, tuple(blocks)))
    positions = np.stack([layout.positions(rank) for layout in layouts])
    return ContextPlan(ranks, positions, tuple(own), tuple(steps))


@lru_cache
def whole_rows(length: int, batch: int, ranks: int, rank: int) -> ContextPlan:
    """The plan of rows of one document each, in zigzag order.

    Args:
        length: tokens of a row.
        batch: rows of the micro-batch.
    """
    return plan_rows([zigzag(length, ranks)] * batch, [np.array([0, length])] * batch, rank)


class _RowPlanner:
    """One row, seen from one rank."""

    def __init__(self, parts: Fragments, rank: int):
        self.parts, self.rank = parts, rank
        self.mine = np.flatnonzero(parts.owners == rank)
        self.sizes = (parts.stops - parts.starts)[self.mine]
        self.ends = np.cumsum(self.sizes)
        """Where the own fragments end among the rank's tokens of this row."""
        self.begins = self.ends - self.sizes

    def own(self, base: int) -> list[Block]:
        """Each fragment with all earlier own ones of its document, and itself."""
        documents = self.parts.documents[self.mine]
        first = self.begins[np.searchsorted(documents, documents, side="left")]
        return [
            Block(base + int(q0), base + int(q1), base + int(k0), base + int(q1))
            for q0, q1, k0 in zip(self.begins, self.ends, first, strict=True)
        ]

    def needed_by(self, other: int, base: int) -> list[Range]:
        """Own rows that queries of another rank see, ascending, neighbours joined."""
        seen = self.parts.needed_by(other)[self.mine] > 0
        return _joined((base + self.begins[seen]).tolist(), (base + self.ends[seen]).tolist())

    def with_rows_of(self, other: int, base: int, arrived: int) -> tuple[list[Block], int]:
        """Blocks with the rows that another rank sends, and how many these are.

        Args:
            base: number of the rank's first token of this row.
            arrived: rows of earlier rows of the micro-batch in the same transfer.
        """
        parts = self.parts
        theirs = np.flatnonzero((parts.owners == other) & (parts.needed_by(self.rank) > 0))
        offsets = np.concatenate([[0], np.cumsum((parts.stops - parts.starts)[theirs])])
        documents, starts = parts.documents[self.mine], parts.starts[self.mine]
        low = offsets[np.searchsorted(parts.documents[theirs], documents, side="left")]
        high = offsets[np.searchsorted(parts.starts[theirs], starts, side="left")]
        blocks: list[Block] = []
        for q0, q1, k0, k1 in zip(self.begins, self.ends, low, high, strict=True):
            if k0 >= k1:
                continue
            block = Block(base + int(q0), base + int(q1), arrived + int(k0), arrived + int(k1))
            if blocks and blocks[-1].q1 == block.q0 and blocks[-1][2:] == block[2:]:
                block = Block(blocks.pop().q0, *block[1:])
            blocks.append(block)
        return blocks, int(offsets[-1])


def _joined(starts: list[int], stops: list[int]) -> list[Range]:
    out: list[Range] = []
    for start, stop in zip(starts, stops, strict=True):
        if out and out[-1][1] == start:
            start = out.pop()[0]
        out.append((start, stop))
    return out
