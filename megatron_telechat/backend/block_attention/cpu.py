"""Blocks on the CPU: torch's FlashAttention, one call a block.

It aligns causal blocks to the top left, so it is causal on squares only. It takes query groups, strided rows and the
LSE and output of all keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_telechat.backend.block_attention import Block, Grads, Saved
from megatron_telechat.backend.block_attention.running import Running
from megatron_telechat.backend.cpu_types import widened

_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CpuBlocks:
    """`BlockAttention` by ``_scaled_dot_product_flash_attention_for_cpu``."""

    def takes(self, query: Tensor) -> bool:
        """See `BlockAttention`."""
        return query.dtype in _TYPES

    def prepared(self, rows: Tensor) -> Tensor:
        """See `BlockAttention`."""
        return rows.to(widened(rows.dtype))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], causal: bool, total: Running
    ) -> None:
        """See `BlockAttention`."""
        for (q0, q1, k0, k1), diagonal in _parts(blocks, causal):
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _heads(query[q0:q1]), _heads(key[k0:k1]), _heads(value[k0:k1]), 0.0, diagonal
            )
            take = total.begin if diagonal else total.add
            take(slice(q0, q1), out[0].transpose(0, 1), lse[0])

    def backward(
        self, saved: Saved, key: Tensor, value: Tensor, blocks: Sequence[Block], causal: bool, grads: Grads
    ) -> None:
        """See `BlockAttention`."""
        for (q0, q1, k0, k1), diagonal in _parts(blocks, causal):
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads(saved.grad[q0:q1]),
                _heads(saved.query[q0:q1]),
                _heads(key[k0:k1]),
                _heads(value[k0:k1]),
                _heads(saved.out[q0:q1]),
                saved.lse[None, :, q0:q1],
                0.0,
                diagonal,
            )
            grads.query[q0:q1] += dq[0].transpose(0, 1)
            grads.key[k0:k1] += dk[0].transpose(0, 1)
            grads.value[k0:k1] += dv[0].transpose(0, 1)


def _parts(blocks: Sequence[Block], causal: bool) -> Iterator[tuple[Block, bool]]:
    """Squares on the diagonal, which begin the total of their queries, and rectangles."""
    for q0, q1, k0, k1 in blocks:
        if not causal:
            yield (q0, q1, k0, k1), False
            continue
        edge = k1 - (q1 - q0)
        yield (q0, q1, edge, k1), True
        if k0 < edge:
            yield (q0, q1, k0, edge), False


def _heads(rows: Tensor) -> Tensor:
    """[n, heads, d] as [1, heads, n, d], the same memory."""
    return rows.transpose(0, 1).unsqueeze(0)
