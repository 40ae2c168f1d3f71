"""Core attention whose tokens are spread over the ranks of a context-parallel group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_telechat.backend.block_attention import BlockAttention, block_attention
from megatron_telechat.parallel.clock import ExchangeClock, PassClock
from megatron_telechat.parallel.context.direct import Clocks, Way, attend
from megatron_telechat.parallel.context.exchange import Alone, Ring, RowLink
from megatron_telechat.parallel.context.heads import to_heads, to_tokens
from megatron_telechat.parallel.context.plan import ContextPlan, whole_rows
from megatron_telechat.parallel.context.rows import own_positions
from megatron_telechat.parallel.groups import ContextGroups


@dataclass(frozen=True)
class ContextPlace:
    """Where a rank stands in its context-parallel group.

    Attributes:
        heads, part: ranks that exchange heads for tokens, and which of them this is.
        ring, ring_rank: ranks that send keys and values, and which of them this is.
    """

    heads: int
    part: int
    ring: int
    ring_rank: int

    @classmethod
    def of(cls, groups: ContextGroups) -> ContextPlace:
        """From the groups of this rank."""
        heads, ring = groups.heads, groups.ring
        return cls(
            heads.size() if heads else 1,
            heads.rank() if heads else 0,
            ring.size() if ring else 1,
            ring.rank() if ring else 0,
        )

    def whole_rows(self, length: int, batch: int) -> ContextPlan:
        """The plan of rows of one document each.

        Args:
            length: tokens of a row on all ranks.
            batch: rows.
        """
        return whole_rows(length, batch, self.ring, self.ring_rank)

    def positions(self, plan: ContextPlan) -> np.ndarray:
        """int64 [b, s]: where in their rows the tokens of this rank lie."""
        return own_positions(plan, self.part, self.heads)


def context_attentions(virtual_stages: Sequence[torch.nn.Module]) -> list[ContextCoreAttention]:
    """The attentions over ranks in these modules, in the order of the layers.

    Args:
        virtual_stages: those of this rank.
    """
    modules = (module for stage in virtual_stages for module in stage.modules())
    return [module for module in modules if isinstance(module, ContextCoreAttention)]


class ContextCoreAttention(torch.nn.Module):
    """Causal attention over all ranks that share the rows of a micro-batch.

    Ranks of one a2a group exchange heads for tokens first; what is left goes over the ring (`context.direct`).

    Attributes:
        pieces: of each step of the ring.
        keep: hold received keys and values for the backward.
        link: of the ring; measurements put others in its place.
        kernel: of the blocks; None: that of the device.
        clock: of the waits for other ranks.
    """

    heads_first = False

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        pieces: int = 1,
        keep: bool = False,
    ):
        super().__init__()
        assert config.attention_dropout == 0.0, "the configuration rules refuse it"
        groups = pg_collection.context  # pyright: ignore[reportAttributeAccessIssue] (`ProcessGroups`)
        self.layer = layer_number - 1
        self.place = ContextPlace.of(groups)
        self._heads_group = groups.heads
        self.link: RowLink = Ring(groups.ring) if groups.ring else Alone()
        self.kernel: BlockAttention | None = None
        self.pieces, self.keep = pieces, keep
        self.clock = ExchangeClock()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, segments: ContextPlan | None = None) -> Tensor:
        """query [s, b, heads, head_dim], key and value [s, b, groups, head_dim] of this rank's tokens
        -> [s, b, heads * head_dim].

        Args:
            segments: the plan of the micro-batch; None: every row is one document, in zigzag order.
        """
        length, batch = query.shape[:2]
        place = self.place
        plan = segments or place.whole_rows(length * place.heads * place.ring, batch)
        parts = tuple(part.transpose(0, 1) for part in (query, key, value))
        clocks = self._clocks(query)
        if self._heads_group is not None:
            parts = to_heads(parts, self._heads_group, clocks)
        rows, tokens = parts[0].shape[:2]
        q, k, v = (part.flatten(0, 1) for part in parts)
        way = Way(self.link, self.kernel_for(q), self.pieces, self.keep, clocks)
        out = attend(q, k, v, plan, way).unflatten(0, (rows, tokens))
        if self._heads_group is not None:
            out = to_tokens(out, self._heads_group, clocks)
        return out.transpose(0, 1).flatten(2)

    def kernel_for(self, query: Tensor) -> BlockAttention:
        """The kernel for heads like these, [t, heads, d]."""
        return self.kernel or block_attention(query)

    def _clocks(self, query: Tensor) -> Clocks:
        forward, backward = (PassClock(self.clock, self.layer, late, query.device) for late in (False, True))
        return forward, backward
