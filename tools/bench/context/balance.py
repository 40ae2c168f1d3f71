"""How evenly layouts spread packed rows, and how much travels: arithmetic, no ranks."""

from __future__ import annotations

from statistics import mean
from typing import NamedTuple

import numpy as np

from context.peers import per_document_zigzag
from megatron_telechat.parallel.context.layout import (
    Layout,
    contiguous,
    dealt,
    traffic,
    whole_documents,
    work_of_ranks,
    zigzag,
)

SEED = 1234
MEDIAN_TOKENS, SIGMA = 500.0, 1.4
"""Of a document of the web: logarithms of lengths are about normal, with a long tail."""
ROWS = 32


class Spread(NamedTuple):
    """One layout over all rows.

    Attributes:
        work: work of the busiest rank over the mean, mean of the rows; `worst` of them.
        traffic: rows of keys and values that reach the rank that receives most, over those of a ring of whole shards.
    """

    work: float
    worst: float
    traffic: float


def web_like(length: int, count: int, multiple: int = 1, seed: int = SEED) -> list[np.ndarray]:
    """Rows of documents one after another, cut where a row ends: 0 and the ends of each row.

    Args:
        multiple: every length is a multiple of this.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ends = [0]
        while ends[-1] < length:
            size = int(generator.lognormal(np.log(MEDIAN_TOKENS), SIGMA) // multiple + 1) * multiple
            ends.append(min(length, ends[-1] + size))
        rows.append(np.asarray(ends, np.int64))
    return rows


def spread(length: int, ranks: int) -> dict[str, Spread]:
    """Each layout on the same web-like rows; whole shards travel for `per document`, as Megatron sends them."""
    rows = web_like(length, ROWS, 2 * ranks)
    makers = {
        "zigzag": lambda documents: zigzag(length, ranks),
        "contiguous": lambda documents: contiguous(length, ranks),
        "dealt": lambda documents: dealt(documents, ranks),
        "whole documents": lambda documents: whole_documents(documents, ranks),
        "per document": lambda documents: per_document_zigzag(documents, ranks),
    }
    return {name: _of([make(row) for row in rows], rows, name == "per document") for name, make in makers.items()}


def _of(layouts: list[Layout], rows: list[np.ndarray], whole_shards: bool) -> Spread:
    pairs = list(zip(layouts, rows, strict=True))
    works = [(work.max() / work.mean()) for work in (work_of_ranks(*pair) for pair in pairs)]
    ring = layouts[0].length / layouts[0].ranks * (layouts[0].ranks - 1)
    moved = 1.0 if whole_shards else mean(float(traffic(*pair).max()) / ring for pair in pairs)
    return Spread(mean(map(float, works)), float(max(works)), moved)
