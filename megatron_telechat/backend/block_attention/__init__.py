"""Attention of blocks of queries with blocks of keys, and the sum over blocks: what attention over ranks is made of.

A block gives the output of its queries as if its keys were all there are, and the logarithm of the sum of their
exponentials (LSE). With both, blocks are summed exactly (:class:`Running`); with the LSE of all keys, the gradients of
a block are exact by themselves (FlashAttention-2, section 3.1).

Each kind of device has its kernel: one of `backend.kernels` that passes its check (``blocks``), else
`DeviceTraits.block_attention`. Plain products take the place of one that does not take the type or the width of the
heads.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from torch import Tensor

from megatron_telechat.backend.base import traits_of
from megatron_telechat.backend.block_attention.running import Running
from megatron_telechat.backend.kernels import kernels

PLAIN = "megatron_telechat.backend.block_attention.plain:PlainBlocks"

Block = tuple[int, int, int, int]
"""Queries ``q0 .. q1`` with keys ``k0 .. k1``; where causal, the last query sees the last key, aligned to the bottom
right."""


class BlockAttention(Protocol):
    """A kernel. Queries are [t, heads, d], keys and values [n, groups, d], t and n different in general."""

    def takes(self, query: Tensor) -> bool:
        """Whether the kernel can be used for heads like these."""
        ...

    def prepared(self, rows: Tensor) -> Tensor:
        """Rows in the type that the kernel computes in; the same tensor where that is its own."""
        ...

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], causal: bool, total: Running
    ) -> None:
        """Add the attention of these blocks to a total.

        Args:
            query, key, value: as `prepared` gave them.
            blocks: no query is in two of them. Causal ones begin the total of their queries.
        """
        ...

    def backward(
        self, saved: Saved, key: Tensor, value: Tensor, blocks: Sequence[Block], causal: bool, grads: Grads
    ) -> None:
        """Add the gradients of these blocks."""
        ...


class Saved:
    """What the backward of every block needs of the queries, in the kernel's type.

    Attributes:
        grad: gradient of the output, [t, heads, d].
        query, out: [t, heads, d].
        lse: fp32 [heads, t], of all keys of each query.
    """

    def __init__(self, kernel: BlockAttention, grad: Tensor, query: Tensor, out: Tensor, lse: Tensor):
        self.grad, self.query, self.out = (kernel.prepared(each) for each in (grad, query, out))
        self.lse = lse


class Grads:
    """Where gradients of blocks are added up, in fp32.

    Attributes:
        query: [t, heads, d].
        key, value: [n, groups, d], of the keys that the blocks count.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor):
        self.query, self.key, self.value = query, key, value

    def with_keys(self, key: Tensor, value: Tensor) -> Grads:
        """The same gradients of queries, with other keys and values."""
        return Grads(self.query, key, value)


@lru_cache
def _kernel_of(path: str) -> BlockAttention:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)()


def block_attention(query: Tensor) -> BlockAttention:
    """The kernel for heads like these, [t, heads, d], on their device."""
    fused = kernels("blocks", query)
    if fused is not None:
        return fused.BLOCKS
    kernel = _kernel_of(traits_of(query.device).block_attention)
    if kernel.takes(query):
        return kernel
    return _kernel_of(PLAIN)


__all__ = ["Block", "BlockAttention", "Grads", "Running", "Saved", "block_attention"]
