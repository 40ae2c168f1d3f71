"""Where the state of an optimizer rests between two steps, and the way of its buckets through the device.

A shelf holds the state of some parameters in one row for each kind of it (master weight, moments), on the host or on
the device. A bucket is a piece of all rows of a shelf.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_telechat.backend import Backend
from megatron_telechat.checkpoint.optimizer_state import Leaf
from megatron_telechat.costs.optimizer_state import slots

ALIGNMENT = 64
"""Elements: every parameter, and every cut inside of one, begins at a multiple of this. Kernels of the CPU take whole
vectors first and single elements at the end; with such cuts each element is in the same of both as without them."""

Rows = Mapping[str, torch.Tensor]
"""Kind of the state → 1-D tensor."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of what is stepped on for a parameter; ``at``: elements of their bucket before them."""

    leaf: Leaf
    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Bucket:
    """Elements [start, stop) of a shelf."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


class Shelf:
    """The state of some parameters at rest, zeros at first.

    Args:
        leaves: the parameters.
        types: kind of the state → its type.
        on_host: in memory of the host, which ends with the shelf.
        bucket_elements: largest size of a bucket; a multiple of `ALIGNMENT`.
    """

    def __init__(
        self,
        leaves: Sequence[Leaf],
        types: Mapping[str, torch.dtype],
        on_host: bool,
        backend: Backend,
        bucket_elements: int,
    ):
        self.leaves, self.on_host = leaves, on_host
        starts, end = [], 0
        for leaf in leaves:
            starts.append(end)
            end += -(-leaf.stepped.numel() // ALIGNMENT) * ALIGNMENT
        self._starts = {id(leaf.stepped): start for leaf, start in zip(leaves, starts, strict=True)}
        self.rows: Rows
        if on_host:
            nbytes = sum(end * kind.itemsize for kind in types.values())
            self._block = backend.host_memory.take(nbytes, "optimizer state")
            self.rows = dict(_cut(self._block.memory, end, types))
        else:
            self.rows = {name: torch.zeros(end, dtype=kind, device=backend.device) for name, kind in types.items()}
        self.buckets = [
            Bucket(start, min(start + bucket_elements, end), tuple(_pieces(leaves, starts, start, bucket_elements)))
            for start in range(0, end, bucket_elements)
        ]

    def views(self, stepped: torch.Tensor) -> Rows | None:
        """The state of this tensor; None where it is not here."""
        start = self._starts.get(id(stepped))
        if start is None:
            return None
        return {name: row[start : start + stepped.numel()] for name, row in self.rows.items()}

    def rows_of(self, bucket: Bucket) -> Rows:
        """The state of a bucket."""
        return {name: row[bucket.start : bucket.stop] for name, row in self.rows.items()}


def _cut(memory: torch.Tensor, elements: int, types: Mapping[str, torch.dtype]) -> Iterator[tuple[str, torch.Tensor]]:
    start = 0
    for name, kind in types.items():
        stop = start + elements * kind.itemsize
        yield name, memory[start:stop].view(kind)
        start = stop


def _pieces(leaves: Sequence[Leaf], starts: Sequence[int], begin: int, elements: int) -> Iterator[Piece]:
    for leaf, start in zip(leaves, starts, strict=True):
        low, high = max(start, begin), min(start + leaf.stepped.numel(), begin + elements)
        if low < high:
            yield Piece(leaf, low - start, high - start, low - begin)


class Passage:
    """Places on the device through which the buckets of a shelf on the host go: fetched, taken by kernels, put back.

    Everything is queued; the host waits in `settle` only. A place is filled again when its bucket has been put back.

    Args:
        types: kind of the state → its type at rest.
        elements: size of the largest bucket.
        overlap: copy beside the kernels, in both directions.
    """

    def __init__(self, types: Mapping[str, torch.dtype], elements: int, overlap: bool, backend: Backend):
        self._slots = [
            {name: torch.empty(elements, dtype=kind, device=backend.device) for name, kind in types.items()}
            for _ in range(slots(overlap))
        ]
        self._coming, self._going, self._kernels = (
            backend.lane(beside=overlap), backend.lane(beside=overlap), backend.lane(beside=False),
        )  # fmt: skip
        self._there: list[Any] = [None] * len(self._slots)
        self._gone: list[Any] = [None] * len(self._slots)
        self._last: Any = None

    def __len__(self) -> int:
        return len(self._slots)

    def tensors(self) -> Iterator[torch.Tensor]:
        """The places."""
        for slot in self._slots:
            yield from slot.values()

    def fetch(self, number: int, rows: Rows) -> None:
        """Queue the copy of the rows of bucket ``number`` to the device."""
        slot = number % len(self)
        self._coming.wait(self._gone[slot])
        with self._coming.queued():
            for name, row in rows.items():
                self._slots[slot][name][: row.numel()].copy_(row, non_blocking=True)
        self._there[slot] = self._coming.mark()

    def taken(self, number: int, elements: int) -> Rows:
        """The rows of bucket ``number`` on the device, for kernels that are launched from now on."""
        slot = number % len(self)
        self._kernels.wait(self._there[slot])
        return {name: row[:elements] for name, row in self._slots[slot].items()}

    def put(self, number: int, rows: Rows) -> None:
        """Queue the copy back to these rows, behind the kernels launched so far."""
        slot = number % len(self)
        self._going.wait(self._kernels.mark())
        with self._going.queued():
            for name, row in rows.items():
                row.copy_(self._slots[slot][name][: row.numel()], non_blocking=True)
        self._last = self._gone[slot] = self._going.mark()

    def settle(self) -> None:
        """Wait until everything has been put back."""
        if self._last is not None:
            self._last.synchronize()
