"""Sums that do not depend on the order of their terms, and tensors in pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from megatron_telechat.tensors.boxes import Box, Shape

PIECE = 1 << 22
"""Elements that are read at a time."""
CHUNK = 1 << 17
"""Elements that are computed at a time: 1 MiB for each fp64 term, so that all terms stay in a core's cache."""
_ROW = 1 << 12


def ordered_sum(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Element by element the sum of fp64 tensors of one shape.

    The terms of an element are sorted, then added with Neumaier's compensation (ZAMM 54, 1974): the result is a
    function of the set of terms, bit for bit, and its error is that of one rounding unless terms cancel. The terms may
    be overwritten.
    """
    if len(terms) == 1:
        return terms[0]
    if len(terms) == 2:
        return terms[0] + terms[1]  # commutes, and is rounded once
    rows = _sorted([term + 0.0 for term in terms])  # + 0.0: minimum and maximum do not tell -0 from 0
    total, lost = rows[0], torch.zeros_like(rows[0])
    for row in rows[1:]:
        added = total + row
        back = added - total
        lost += (total - (added - back)) + (row - back)
        total = added
    return total + lost


def _sorted(rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Ascending over the rows, by odd-even transposition: rows are few and long."""
    for turn in range(len(rows)):
        for at in range(turn % 2, len(rows) - 1, 2):
            a, b = rows[at], rows[at + 1]
            rows[at], rows[at + 1] = torch.minimum(a, b), torch.maximum(a, b)
    return rows


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """Inner product of fp64 vectors, the same for any number of threads."""
    products = a * b
    whole = products.numel() // _ROW * _ROW
    rows = products[:whole].view(-1, _ROW).sum(dim=1)
    return math.fsum([*rows.tolist(), float(products[whole:].sum())])


def pieces(shape: Shape, limit: int = PIECE) -> Iterator[Box]:
    """Cut a row-major tensor into boxes of at most so many elements, in order; each is contiguous in the tensor."""
    if not shape or math.prod(shape) <= limit:
        yield Box((0,) * len(shape), shape)
        return
    row = math.prod(shape[1:])
    if row > limit:
        for index in range(shape[0]):
            for box in pieces(shape[1:], limit):
                yield Box((index, *box.offset), (1, *box.shape))
        return
    step = limit // row
    for index in range(0, shape[0], step):
        yield Box((index, *(0,) * (len(shape) - 1)), (min(step, shape[0] - index), *shape[1:]))


def chunks(count: int) -> Iterator[slice]:
    """Cut a flat piece into what is computed at a time."""
    for start in range(0, count, CHUNK):
        yield slice(start, min(start + CHUNK, count))


def flat_start(offset: Sequence[int], shape: Sequence[int]) -> int:
    """Row-major number of the element at ``offset``."""
    at = 0
    for position, extent in zip(offset, shape, strict=True):
        at = at * extent + position
    return at
