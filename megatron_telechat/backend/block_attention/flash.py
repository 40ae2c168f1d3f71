"""Blocks by FlashAttention's kernel for rows of several lengths: many blocks in one call.

A call takes blocks whose queries and whose keys follow each other without overlap; blocks that share keys go into
several calls. Its causal mask is aligned to the bottom right, as `Block` is. Rows that lie side by side are handed over
as they are; others are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from megatron_telechat.backend.base import traits_of
from megatron_telechat.backend.block_attention import Block, Grads, Saved
from megatron_telechat.backend.block_attention.running import Running

_TYPES = (torch.bfloat16, torch.float16)
_MAX_HEAD, _HEAD_MULTIPLE = 256, 8
"""Head widths that the kernel takes."""


@dataclass(frozen=True)
class Call:
    """Blocks of one call.

    Attributes:
        queries, keys: which rows: a slice where they lie side by side, else their numbers, int64 on the device.
        query_bounds, key_bounds: int32 [blocks + 1] on the device: 0, and where the rows of each block end.
        longest: queries and keys of the largest block.
    """

    queries: slice | Tensor
    keys: slice | Tensor
    query_bounds: Tensor
    key_bounds: Tensor
    longest: tuple[int, int]

    @classmethod
    def of(cls, blocks: Sequence[Block], device: torch.device) -> Call:
        """Made once for all layers; no wait of the host."""
        queries, keys = [block[:2] for block in blocks], [block[2:] for block in blocks]
        return cls(
            _rows(queries, device),
            _rows(keys, device),
            _bounds(queries, device),
            _bounds(keys, device),
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


def _bounds(ranges: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    ends = accumulate((stop - start for start, stop in ranges), initial=0)
    return _uploaded(torch.tensor(list(ends), dtype=torch.int32), device)


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


class FlashBlocks:
    """`BlockAttention` by ``aten._flash_attention_forward`` and its backward, 16-bit types."""

    def takes(self, query: Tensor) -> bool:
        width = query.shape[-1]
        return query.dtype in _TYPES and width <= _MAX_HEAD and width % _HEAD_MULTIPLE == 0

    def prepared(self, rows: Tensor) -> Tensor:
        return rows

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], causal: bool, total: Running
    ) -> None:
        for call in calls(tuple(blocks), query.device):
            out, lse, *_ = torch.ops.aten._flash_attention_forward(
                query[call.queries],
                key[call.keys],
                value[call.keys],
                call.query_bounds,
                call.key_bounds,
                *call.longest,
                0.0,
                causal,
                False,
            )
            (total.begin if causal else total.add)(call.queries, out, lse)

    def backward(
        self, saved: Saved, key: Tensor, value: Tensor, blocks: Sequence[Block], causal: bool, grads: Grads
    ) -> None:
        for call in calls(tuple(blocks), key.device):
            state = torch.empty(2, dtype=torch.uint64, device=key.device)  # of dropout, which there is none of
            dq, dk, dv = torch.ops.aten._flash_attention_backward(
                saved.grad[call.queries],
                saved.query[call.queries],
                key[call.keys],
                value[call.keys],
                saved.out[call.queries],
                saved.lse[:, call.queries].contiguous(),
                call.query_bounds,
                call.key_bounds,
                *call.longest,
                0.0,
                causal,
                state,
                torch.empty(0, device=key.device),
            )
            # No row is in two blocks of a call: an indexed sum has one order.
            grads.query[call.queries] += dq
            grads.key[call.keys] += dk
            grads.value[call.keys] += dv
