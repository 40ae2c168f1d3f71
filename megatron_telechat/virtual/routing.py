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


@contextmanager
def virtual_routing() -> Iterator[None]:
    """Inside, the dispatch reads the sizes of messages and products of a random routing, every expert with equal
    chance.

    All calls of one shape get the same choices, so that the ranks of a group, each a process of its own, see one
    routing.
    """
    known: dict[Any, list[int]] = {}

    def sizes_on_host(sizes: torch.Tensor, layout: Layout) -> list[int]:
        if not isinstance(sizes, FakeTensor):
            return sizes.tolist()
        sizes.tolist()  # the wait of the host is written down
        shape, ranges, form = layout.choices.experts.shape, layout.ranges, layout.row_format
        key = (shape, layout.num_experts, ranges, layout.ep_rank, layout.etp, form)
        if key not in known:
            with unset_fake_temporarily():
                known[key] = _laid_out(layout)
        return known[key]

    with patch.object(dispatch, "sizes_on_host", sizes_on_host):
        yield


def _laid_out(layout: Layout) -> list[int]:
    """The sizes of the layout, of real choices on the host."""
    ranks, tokens, topk = layout.choices.experts.shape
    draws = torch.rand(ranks, tokens, layout.num_experts, generator=torch.Generator().manual_seed(SEED))
    experts = draws.topk(topk, dim=-1).indices.to(layout.choices.experts.dtype)
    chunks = torch.full((ranks,), layout.chunks, dtype=torch.int32)
    read: list[int] = []

    def sizes_on_host(sizes: torch.Tensor, _: Layout) -> list[int]:
        read[:] = sizes.tolist()
        return read

    with patch.object(dispatch, "sizes_on_host", sizes_on_host):
        Layout(Choices(experts, chunks, layout.num_experts), layout.groups, layout.ranges, layout.row_format)
    return read
