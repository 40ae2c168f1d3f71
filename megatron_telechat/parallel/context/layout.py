"""Which tokens of a row each context-parallel rank holds, and how much work and traffic that means. Without torch.

A row is one sample of S tokens. Every rank holds S / ranks of them, in ascending order. Documents that are kept apart
attend to themselves only; a row without them is one document.

*Work* is counted in pairs of a query and a key that it sees, *traffic* in rows of keys and values that arrive in one
forward. The slowest rank decides, so both are maxima over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CHUNKS_PER_RANK = 8
"""A dealt row is cut into so many chunks a rank: finer ones balance no better and mean smaller blocks."""
NEARLY_BALANCED = 1.04
"""A dealt row is good if its busiest rank has at most so much of the mean work; traffic then decides."""

CONTIGUOUS, ZIGZAG, DEALT, DOCUMENTS = "contiguous", "zigzag", "dealt", "documents"


@dataclass(frozen=True)
class Layout:
    """One row over the ranks of a group.

    Attributes:
        name: how it was made.
        starts, stops: stretches of the row, int64 [stretches]; ascending, without gaps: they cover the row.
        owners: rank that holds each stretch, int64 [stretches].
        ranks: size of the group.
    """

    name: str
    starts: np.ndarray
    stops: np.ndarray
    owners: np.ndarray
    ranks: int

    @property
    def length(self) -> int:
        """Tokens of the row, S."""
        return int(self.stops[-1])

    def positions(self, rank: int) -> np.ndarray:
        """int64 [S / ranks]: where in the row the tokens of a rank lie, ascending."""
        mine = self.owners == rank
        return _expand(self.starts[mine], self.stops[mine])

    @classmethod
    def of_chunks(cls, name: str, length: int, owners: Sequence[int] | np.ndarray, ranks: int) -> Layout:
        """Equal chunks, each with its owner; neighbours of one owner are joined."""
        owners = np.asarray(owners, np.int64)
        bounds = np.arange(owners.size + 1, dtype=np.int64) * (length // owners.size)
        return cls.of_stretches(name, bounds, owners, ranks)

    @classmethod
    def of_stretches(cls, name: str, bounds: np.ndarray, owners: np.ndarray, ranks: int) -> Layout:
        """Stretches between consecutive bounds, each with its owner; neighbours of one owner are joined."""
        first = np.flatnonzero(np.diff(owners, prepend=-1))
        stops = np.append(bounds[first[1:]], bounds[-1])
        layout = cls(name, bounds[first], stops, owners[first], ranks)
        held = np.bincount(layout.owners, layout.stops - layout.starts, ranks)
        assert (held == layout.length // ranks).all(), "every rank holds equally many tokens"
        return layout


def contiguous(length: int, ranks: int) -> Layout:
    """One stretch a rank. Least traffic of long documents; the last rank of one document has most work."""
    return Layout.of_chunks(CONTIGUOUS, length, np.arange(ranks), ranks)


@lru_cache
def zigzag(length: int, ranks: int) -> Layout:
    """Chunk r and chunk 2 ranks - 1 - r of 2 ranks chunks: equal work for one document.

    ``length`` is a multiple of twice the ranks.
    """
    half = np.arange(ranks)
    return Layout.of_chunks(ZIGZAG, length, np.concatenate([half, half[::-1]]), ranks)


def chunks_per_rank(length: int, ranks: int) -> int:
    """How finely a row can be dealt: at most `CHUNKS_PER_RANK` equal chunks a rank, an even number."""
    return max(n for n in range(2, CHUNKS_PER_RANK + 1, 2) if length % (n * ranks) == 0)


def dealt(documents: np.ndarray, ranks: int) -> Layout:
    """Equal chunks, dealt so that no rank has much more work than the mean, and little travels.

    From the contiguous and from the zigzag order, chunks of the busiest rank are exchanged with cheaper ones while the
    maximum falls. Of the two results the one with less traffic is taken, if both are nearly balanced.

    Args:
        documents: int64 [documents + 1]: 0, and where each document of the row ends.
    """
    length = int(documents[-1])
    if ranks == 1:
        return contiguous(length, ranks)
    each = chunks_per_rank(length, ranks)
    count = each * ranks
    work = _work_of_stretches(documents, np.arange(count + 1) * (length // count))
    mean = work.sum() / ranks
    order = np.arange(count)
    zigzag_owner = np.minimum(order // (each // 2), 2 * ranks - 1 - order // (each // 2))
    found = []
    for owners in (order // each, zigzag_owner):
        owners = _exchanged(owners.astype(np.int64), work, ranks)
        layout = Layout.of_chunks(DEALT, length, owners, ranks)
        found.append((float(np.bincount(owners, work, ranks).max() / mean), traffic(layout, documents).max(), layout))
    balanced = [one for one in found if one[0] <= NEARLY_BALANCED]
    best = min(balanced, key=lambda one: one[1]) if balanced else min(found, key=lambda one: one[0])
    return best[2]


def _exchanged(owners: np.ndarray, work: np.ndarray, ranks: int) -> np.ndarray:
    """Exchange chunks of the busiest rank with cheaper ones of others while the larger load of the two falls."""
    loads = np.bincount(owners, work, ranks)
    for _ in range(4 * owners.size):
        busiest = int(loads.argmax())
        mine, others = np.flatnonzero(owners == busiest), np.flatnonzero(owners != busiest)
        gain = work[mine][:, None] - work[others][None, :]
        after = np.maximum(loads[busiest] - gain, loads[owners[others]][None, :] + gain)
        after[gain <= 0] = np.inf
        at = np.unravel_index(after.argmin(), after.shape)
        if not after[at] < loads[busiest]:
            return owners
        mine_chunk, other_chunk = mine[at[0]], others[at[1]]
        loads[busiest] -= gain[at]
        loads[owners[other_chunk]] += gain[at]
        owners[mine_chunk], owners[other_chunk] = owners[other_chunk], busiest
    return owners


def whole_documents(documents: np.ndarray, ranks: int) -> Layout:
    """As few documents as possible on more than one rank, and those on neighbours: next to no traffic.

    The largest document goes first, to the rank with least work that has room for it; what has room nowhere fills up
    what is left, cut at the borders of the ranks.
    """
    length, sizes = int(documents[-1]), np.diff(documents)
    room = np.full(ranks, length // ranks, np.int64)
    loads = np.zeros(ranks)
    bounds, owners = [], []
    late = []
    for number in np.argsort(-sizes, kind="stable"):
        size = int(sizes[number])
        fits = np.flatnonzero(room >= size)
        if not fits.size:
            late.append(number)
            continue
        rank = int(fits[loads[fits].argmin()])
        room[rank] -= size
        loads[rank] += size * (size + 1) / 2
        bounds.append(int(documents[number]))
        owners.append(rank)
    for number in late:
        start, stop = int(documents[number]), int(documents[number + 1])
        while start < stop:
            rank = int(room.argmax())
            taken = min(int(room[rank]), stop - start)
            bounds.append(start)
            owners.append(rank)
            room[rank] -= taken
            start += taken
    order = np.argsort(bounds)
    edges = np.append(np.asarray(bounds, np.int64)[order], length)
    return Layout.of_stretches(DOCUMENTS, edges, np.asarray(owners, np.int64)[order], ranks)


@dataclass(frozen=True)
class Costs:
    """What a row costs on a device and a link.

    Attributes:
        seconds_per_pair: of a query and a key that it sees, on one rank.
        seconds_per_row: of keys and values that travel.
        seconds_per_transfer: of a transfer without length: its start, its packing, its kernel calls.
    """

    seconds_per_pair: float
    seconds_per_row: float
    seconds_per_transfer: float

    def of(self, layout: Layout, documents: np.ndarray) -> float:
        """Seconds of the slowest rank: computation and transfers run beside each other."""
        received = rows_received(layout, documents)
        busy = self.seconds_per_pair * work_of_ranks(layout, documents)
        busy += self.seconds_per_transfer * (received > 0).sum(1)
        return float(np.maximum(busy, self.seconds_per_row * received.sum(1)).max())


def best_layout(documents: np.ndarray, ranks: int, costs: Costs) -> Layout:
    """The layout of a row with the least seconds; among equals the first of zigzag, contiguous, dealt, documents.

    No order wins everywhere: where the link is fast, balance decides; where it is slow, what need not travel.

    Args:
        documents: int64 [documents + 1]: 0, and where each document of the row ends.
    """
    length = int(documents[-1])
    if documents.size == 2:
        return zigzag(length, ranks)
    candidates = (
        zigzag(length, ranks),
        contiguous(length, ranks),
        dealt(documents, ranks),
        whole_documents(documents, ranks),
    )
    return min(candidates, key=lambda layout: costs.of(layout, documents))


def work_of_ranks(layout: Layout, documents: np.ndarray) -> np.ndarray:
    """float64 [ranks]: pairs of a query and a key that it sees."""
    bounds = np.append(layout.starts, layout.stops[-1])
    return np.bincount(layout.owners, _work_of_stretches(documents, bounds), layout.ranks)


def rows_received(layout: Layout, documents: np.ndarray) -> np.ndarray:
    """int64 [ranks, ranks]: rows of keys and values that each rank receives from each other in one forward."""
    parts = fragments(layout, documents)
    rows = np.zeros((layout.ranks, layout.ranks), np.int64)
    for rank in range(layout.ranks):
        np.add.at(rows[rank], parts.owners, parts.needed_by(rank))
        rows[rank, rank] = 0
    return rows


def traffic(layout: Layout, documents: np.ndarray) -> np.ndarray:
    """int64 [ranks]: rows of keys and values that each rank receives in one forward."""
    return rows_received(layout, documents).sum(1)


@dataclass(frozen=True)
class Fragments:
    """A row cut at every border of a stretch and of a document.

    Attributes:
        starts, stops, owners: as in `Layout`, int64 [fragments].
        documents: number of the document of each, int64 [fragments].
    """

    starts: np.ndarray
    stops: np.ndarray
    owners: np.ndarray
    documents: np.ndarray

    def needed_by(self, rank: int) -> np.ndarray:
        """int64 [fragments]: rows of each that queries of a rank see, its own ones included."""
        sizes = self.stops - self.starts
        last = np.full(int(self.documents[-1]) + 1, -1, np.int64)
        mine = self.owners == rank
        np.maximum.at(last, self.documents[mine], self.starts[mine])
        # A fragment is seen as a whole, by a later one of its document; fragments of one owner never overlap.
        return np.where(self.starts <= last[self.documents], sizes, 0)


def fragments(layout: Layout, documents: np.ndarray) -> Fragments:
    """Cut a layout at the borders of documents.

    Args:
        documents: int64 [documents + 1]: 0, and where each document of the row ends.
    """
    bounds = np.union1d(np.append(layout.starts, layout.length), documents)
    starts, stops = bounds[:-1], bounds[1:]
    owners = layout.owners[np.searchsorted(layout.starts, starts, side="right") - 1]
    return Fragments(starts, stops, owners, np.searchsorted(documents, starts, side="right") - 1)


def _work_of_stretches(documents: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """float64 [bounds - 1]: pairs of a query and a key that it sees, for the queries between consecutive bounds."""
    sizes = np.diff(documents).astype(np.float64)
    before = np.concatenate([[0.0], np.cumsum(sizes * (sizes + 1) / 2)])
    document = np.minimum(np.searchsorted(documents, bounds, side="right") - 1, sizes.size - 1)
    inside = (bounds - documents[document]).astype(np.float64)
    return np.diff(before[document] + inside * (inside + 1) / 2)


def _expand(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The numbers of all stretches, one after another."""
    sizes = stops - starts
    ends = np.cumsum(sizes)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - sizes), sizes)
