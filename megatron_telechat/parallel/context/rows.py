"""Which tokens of a batch a context-parallel rank takes, made in the thread that prepares the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_telechat.parallel.context.layout import (
    CONTIGUOUS,
    DEALT,
    DOCUMENTS,
    ZIGZAG,
    Costs,
    Layout,
    best_layout,
    contiguous,
    dealt,
    whole_documents,
    zigzag,
)
from megatron_telechat.parallel.context.plan import ContextPlan, plan_rows, whole_rows

ROWS = ("tokens", "labels", "loss_mask", "position_ids", "padding")
"""Parts of a batch that have one value a token, [b, s]."""


class RowSplit:
    """Cuts batches to the tokens of one rank.

    Args:
        sizes: ranks of a2a, and ranks of the ring (`ParallelConfig.context_sizes`).
        rank: number of this rank in the context-parallel group; ranks of one a2a group are neighbours.
        layout: ``auto``, or the name of a layout for rows whose documents are kept apart.
        costs: what ``auto`` compares layouts by; the same on all ranks.
    """

    def __init__(self, sizes: tuple[int, int], rank: int, layout: str, costs: Costs):
        self._heads, self._ranks = sizes
        self._ring_rank, self._part = divmod(rank, self._heads)
        self._layout, self._costs = layout, costs

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch of this rank: each of `ROWS` cut to its tokens, ``context``, the `ContextPlan` of its attention,
        in place of ``segment_lengths``, and where there is padding ``real_tokens``, how many tokens of the whole rows
        are none."""
        batch = dict(batch)
        plan = batch["context"] = self._plan(batch["tokens"].shape, batch.pop("segment_lengths", None))
        if "padding" in batch:
            batch["real_tokens"] = int(batch["padding"].numel() - batch["padding"].sum())
        mine = torch.from_numpy(own_positions(plan, self._part, self._heads))
        for name in ROWS:
            if name in batch:
                batch[name] = batch[name].gather(1, mine)
        return batch

    def _plan(self, shape: torch.Size, lengths: torch.Tensor | None) -> ContextPlan:
        batch, length = shape
        if lengths is None or lengths.numel() == batch:
            return whole_rows(length, batch, self._ranks, self._ring_rank)
        ends = np.cumsum(lengths.numpy())
        documents = []
        for row in range(batch):
            inside = ends[(ends > row * length) & (ends <= (row + 1) * length)] - row * length
            documents.append(np.concatenate([[0], inside]))
        return plan_rows([self._laid_out(each) for each in documents], documents, self._ring_rank)

    def _laid_out(self, documents: np.ndarray) -> Layout:
        length = int(documents[-1])
        if documents.size == 2 or self._layout == ZIGZAG:
            return zigzag(length, self._ranks)
        if self._layout == CONTIGUOUS:
            return contiguous(length, self._ranks)
        if self._layout in (DEALT, DOCUMENTS):
            return (dealt if self._layout == DEALT else whole_documents)(documents, self._ranks)
        return best_layout(documents, self._ranks, self._costs)


def own_positions(plan: ContextPlan, part: int, parts: int) -> np.ndarray:
    """int64 [b, s / parts]: the positions of one rank of an a2a group, whose ranks hold the tokens of their place in
    the ring in equal parts, in order."""
    each = plan.positions.shape[1] // parts
    return np.ascontiguousarray(plan.positions[:, part * each : (part + 1) * each])
