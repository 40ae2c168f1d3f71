"""Blocks by FlashAttention's kernel for rows of several lengths: many blocks in one call.

Its causal mask is aligned to the bottom right, as `Block` is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_telechat.backend.block_attention import Block, Grads, Saved
from megatron_telechat.backend.block_attention.calls import calls
from megatron_telechat.backend.block_attention.running import Running, add_rows

_TYPES = (torch.bfloat16, torch.float16)
_MAX_HEAD, _HEAD_MULTIPLE = 256, 8
"""Head widths that the kernel takes."""


class FlashBlocks:
    """`BlockAttention` by ``aten._flash_attention_forward`` and its backward, 16-bit types."""

    def takes(self, query: Tensor) -> bool:
        """See `BlockAttention`."""
        width = query.shape[-1]
        return query.dtype in _TYPES and width <= _MAX_HEAD and width % _HEAD_MULTIPLE == 0

    def prepared(self, rows: Tensor) -> Tensor:
        """See `BlockAttention`."""
        return rows

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], causal: bool, total: Running
    ) -> None:
        """See `BlockAttention`."""
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
        """See `BlockAttention`."""
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
            # No row is in two blocks of a call.
            add_rows(grads.query, call.queries, dq)
            add_rows(grads.key, call.keys, dk)
            add_rows(grads.value, call.keys, dv)
