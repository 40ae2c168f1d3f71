"""Choices of experts for ranks that hold no numbers: drawn on the host, laid out by the program's own code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from megatron_telechat.moe import dispatch
from megatron_telechat.moe.dispatch import Choices, Layout

SEED = 20_260


class VirtualRouting:
    """The sizes of messages and products under a random routing that all virtual ranks of a group agree on.

    Every token chooses k different experts, each with equal chance, or with a chance that is skewed. All calls of one
    shape get the same choices, so that the ranks of a group, each a process of its own, see one routing.

    Args:
        skew: the busiest expert is chosen so many times as often as the mean; 1 is even.
    """

    def __init__(self, skew: float = 1.0):
        self.skew = skew
        self._sizes: dict[Any, list[int]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the dispatch reads its sizes here."""
        with patch.object(dispatch, "sizes_on_host", self._of):
            yield

    def _of(self, sizes: torch.Tensor, layout: Layout) -> list[int]:
        if not isinstance(sizes, FakeTensor):
            return sizes.tolist()
        sizes.tolist()  # the wait of the host is written down
        ranks, tokens, topk = layout.choices.experts.shape
        key = (ranks, tokens, topk, layout.num_experts, layout.ranges, layout.ep_rank, layout.etp, layout.per_row)
        if key not in self._sizes:
            with unset_fake_temporarily():
                self._sizes[key] = self._laid_out(layout, ranks, tokens, topk)
        return self._sizes[key]

    def _laid_out(self, layout: Layout, ranks: int, tokens: int, topk: int) -> list[int]:
        """The layout once more, of real choices on the host."""
        generator = torch.Generator().manual_seed(SEED)
        weights = torch.ones(layout.num_experts)
        weights[0] = self.skew
        # The k largest of E exponential clocks: a draw without replacement in proportion to the weights.
        clocks = torch.empty(ranks, tokens, layout.num_experts).exponential_(generator=generator) / weights
        experts = clocks.topk(topk, dim=-1, largest=False).indices
        chunks = torch.full((ranks,), layout.chunks, dtype=torch.int32)
        choices = Choices(experts.to(layout.choices.experts.dtype), chunks, layout.num_experts)
        read: list[int] = []
        with patch.object(dispatch, "sizes_on_host", lambda sizes, _: read.extend(sizes.tolist()) or read):
            Layout(choices, layout.groups, layout.ranges, layout.row_format)
        return read
