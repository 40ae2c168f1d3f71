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
    """Inside, the dispatch reads the sizes of messages and products of a routing that is random and balanced, as that
    of the memory model and of the volumes.

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


def balanced_choices(ranks: int, tokens: int, num_experts: int, topk: int) -> torch.Tensor:
    """[ranks, tokens, topk] different experts of each token, every set of them with equal chance; of as many tokens in
    a row as there are experts, each expert gets ``topk``."""
    blocks = -(-tokens // num_experts)
    generator = torch.Generator().manual_seed(SEED)

    def orders() -> torch.Tensor:
        return torch.rand(ranks, blocks, num_experts, generator=generator).argsort(dim=-1)

    # In an order of the experts that is drawn for each block, a token takes those at its own place plus some steps.
    experts, steps = orders(), orders()[..., :topk]
    places = (torch.arange(num_experts)[:, None] + steps[:, :, None, :]) % num_experts
    chosen = experts.gather(-1, places.flatten(2)).view(ranks, blocks * num_experts, topk)
    return chosen[:, :tokens]


def _laid_out(layout: Layout) -> list[int]:
    """The sizes of the layout, of real choices on the host."""
    ranks, tokens, topk = layout.choices.experts.shape
    experts = balanced_choices(ranks, tokens, layout.num_experts, topk).to(layout.choices.experts.dtype)
    chunks = torch.full((ranks,), layout.chunks, dtype=torch.int32)
    read: list[int] = []

    def sizes_on_host(sizes: torch.Tensor, _: Layout) -> list[int]:
        read[:] = sizes.tolist()
        return read

    with patch.object(dispatch, "sizes_on_host", sizes_on_host):
        Layout(Choices(experts, chunks, layout.num_experts), layout.groups, layout.ranges, layout.row_format)
    return read
