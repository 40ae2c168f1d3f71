"""Blocks of the attention over ranks by ``npu_fusion_attention`` and its gradient, many blocks in one call.

The kernel gives maximum and sum of a softmax in place of the logarithm of the sum of the exponentials (LSE), 8 equal
fp32 numbers each, [t, heads, 8]. Its gradient takes them back: the LSE of all keys stands for the maximum, beside a sum
of one. Its causal mask for blocks is aligned to the bottom right (``sparse_mode`` 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# torch_npu is installed on Ascend machines only.
# pyright: reportMissingImports=false
import torch
import torch_npu
from torch import Tensor

from megatron_telechat.backend.block_attention import Block, Grads, Saved
from megatron_telechat.backend.block_attention.calls import calls
from megatron_telechat.backend.block_attention.plain import PlainBlocks
from megatron_telechat.backend.block_attention.running import Running
from megatron_telechat.backend.kernels import require_close
from megatron_telechat.backend.kernels.ascend.attention import MOST_STRETCHES, TYPES, causal_mask

ALL, CAUSAL = 0, 3
"""``sparse_mode``: every key is seen; key j is seen by query i if j <= i, both counted from the end of the block."""
REPEATED = 8
"""Each number of the softmax stands so many times."""


def _mask(device: torch.device, causal: bool) -> tuple[Tensor | None, int]:
    """The mask of blocks, and its ``sparse_mode``."""
    return (causal_mask(device), CAUSAL) if causal else (None, ALL)


def _cut(blocks: Sequence[Block]) -> list[tuple[Block, ...]]:
    return [tuple(blocks[start : start + MOST_STRETCHES]) for start in range(0, len(blocks), MOST_STRETCHES)]


class AscendBlocks:
    """`BlockAttention` in the layout TND: tokens of all blocks one after another."""

    def takes(self, query: Tensor) -> bool:
        """See `BlockAttention`."""
        return query.dtype in TYPES

    def prepared(self, rows: Tensor) -> Tensor:
        """See `BlockAttention`."""
        return rows

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], causal: bool, total: Running
    ) -> None:
        """See `BlockAttention`."""
        for call in (call for cut in _cut(blocks) for call in calls(cut, query.device)):
            q = query[call.queries]
            mask, mode = _mask(q.device, causal)
            out, largest, summed, *_ = torch_npu.npu_fusion_attention(
                q,
                key[call.keys],
                value[call.keys],
                head_num=q.shape[1],
                input_layout="TND",
                atten_mask=mask,
                scale=1.0 / math.sqrt(q.shape[2]),
                actual_seq_qlen=list(call.query_ends),
                actual_seq_kvlen=list(call.key_ends),
                sparse_mode=mode,
            )
            lse = (largest[..., 0] + summed[..., 0].log()).t()
            (total.begin if causal else total.add)(call.queries, out, lse)

    def backward(
        self, saved: Saved, key: Tensor, value: Tensor, blocks: Sequence[Block], causal: bool, grads: Grads
    ) -> None:
        """See `BlockAttention`."""
        for call in (call for cut in _cut(blocks) for call in calls(cut, key.device)):
            q = saved.query[call.queries]
            lse = saved.lse[:, call.queries].t().unsqueeze(-1).expand(-1, -1, REPEATED).contiguous()
            mask, mode = _mask(q.device, causal)
            dq, dk, dv, *_ = torch_npu.npu_fusion_attention_grad(
                q,
                key[call.keys],
                value[call.keys],
                saved.grad[call.queries],
                head_num=q.shape[1],
                input_layout="TND",
                atten_mask=mask,
                softmax_max=lse,
                softmax_sum=torch.ones_like(lse),
                attention_in=saved.out[call.queries],
                scale_value=1.0 / math.sqrt(q.shape[2]),
                actual_seq_qlen=list(call.query_ends),
                actual_seq_kvlen=list(call.key_ends),
                sparse_mode=mode,
            )
            grads.query[call.queries] += dq
            grads.key[call.keys] += dk
            grads.value[call.keys] += dv


BLOCKS = AscendBlocks()


def check(device: torch.device) -> None:
    """Two causal blocks and two others of one document against plain products, with gradients. Raises
    ArithmeticError."""
    rows, heads, groups, width = 48, 4, 2, 64
    own, others = ((0, 20, 0, 20), (20, 48, 0, 48)), ((4, 20, 0, 10), (20, 48, 10, 48))
    for dtype in TYPES:
        generator = torch.Generator().manual_seed(1)
        shapes = [(rows, count, width) for count in (heads, groups, groups, groups, groups, heads)]
        parts = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        wanted = _attention(PlainBlocks(), parts, own, others)
        found = _attention(BLOCKS, [part.to(device) for part in parts], own, others)
        for one, other in zip(found, wanted, strict=True):
            require_close(one.to(dtype).cpu(), other, "attention of blocks")


def _attention(kernel: Any, parts: Sequence[Tensor], own: Sequence[Block], others: Sequence[Block]) -> list[Tensor]:
    """Output and gradients of queries with their own keys and with those of another rank."""
    query, key, value, far_key, far_value, grad = parts
    ready = [kernel.prepared(part) for part in parts]
    total = Running(query)
    kernel.forward(*ready[:3], own, True, total)
    kernel.forward(ready[0], *ready[3:5], others, False, total)
    saved = Saved(kernel, grad, query, total.out.to(query.dtype), total.lse)
    near = Grads(*(torch.zeros_like(part, dtype=torch.float32) for part in (query, key, value)))
    far = near.with_keys(*(torch.zeros_like(part, dtype=torch.float32) for part in (far_key, far_value)))
    kernel.backward(saved, *ready[1:3], own, True, near)
    kernel.backward(saved, *ready[3:5], others, False, far)
    return [total.out, near.query, near.key, near.value, far.key, far.value]
