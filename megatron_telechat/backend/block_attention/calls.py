"""Blocks in as few calls of a kernel as their keys allow.

A kernel for rows of several lengths takes blocks whose queries and whose keys follow each other without overlap; blocks
that share keys go into several calls. Rows that lie side by side are handed over as they are; others are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from megatron_telechat.backend.base import traits_of
from megatron_telechat.backend.block_attention import Block


@dataclass(frozen=True)
class Call:
    """Blocks of one call.

    Attributes:
        queries, keys: which rows: a slice where they lie side by side, else their numbers, int64 on the device.
        query_bounds, key_bounds: int32 [blocks + 1] on the device: 0, and where the rows of each block end.
        query_ends, key_ends: the same on the host, without the 0.
        longest: queries and keys of the largest block.
    """

    queries: slice | Tensor
    keys: slice | Tensor
    query_bounds: Tensor
    key_bounds: Tensor
    query_ends: tuple[int, ...]
    key_ends: tuple[int, ...]
    longest: tuple[int, int]

    @classmethod
    def of(cls, blocks: Sequence[Block], device: torch.device) -> Call:
        """Made once for all layers; no wait of the host."""
        queries, keys = [block[:2] for block in blocks], [block[2:] for block in blocks]
        query_ends, key_ends = (tuple(accumulate(stop - start for start, stop in ranges)) for ranges in (queries, keys))
        return cls(
            _rows(queries, device),
            _rows(keys, device),
            _bounds(query_ends, device),
            _bounds(key_ends, device),
            query_ends,
            key_ends,
            (max(stop - start for start, stop in queries), max(stop - start for start, stop in keys)),
        )


def _uploaded(numbers: Tensor, device: torch.device) -> Tensor:
    if traits_of(device).pins_uploads:
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)


def _rows(ranges: Sequence[tuple[int, int]], device: torch.device) -> slice | Tensor:
    if all(one[1] == other[0] for one, other in zip(ranges, ranges[1:], strict=False)):
        return slice(ranges[0][0], ranges[-1][1])
    return _uploaded(torch.cat([torch.arange(start, stop) for start, stop in ranges]), device)


def _bounds(ends: Sequence[int], device: torch.device) -> Tensor:
    return _uploaded(torch.tensor([0, *ends], dtype=torch.int32), device)


@lru_cache(maxsize=512)
def calls(blocks: tuple[Block, ...], device: torch.device) -> tuple[Call, ...]:
    """The blocks in as few calls as their keys allow: each goes to the first call whose keys end before its own."""
    groups: list[list[Block]] = []
    for block in blocks:
        fitting = next((group for group in groups if group[-1][3] <= block[2]), None)
        if fitting is None:
            groups.append(fitting := [])
        fitting.append(block)
    return tuple(Call.of(group, device) for group in groups)
