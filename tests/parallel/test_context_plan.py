"""Layouts of a row and the plans of ranks: every query sees its keys once, messages fit, work is balanced."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from megatron_telechat.parallel.context import plan as plans
from megatron_telechat.parallel.context.layout import (
    Costs,
    Layout,
    best_layout,
    contiguous,
    dealt,
    rows_received,
    traffic,
    whole_documents,
    work_of_ranks,
    zigzag,
)
from megatron_telechat.parallel.context.plan import ContextPlan, plan_rows, whole_rows

LAYOUTS = {
    "zigzag": lambda documents, ranks: zigzag(int(documents[-1]), ranks),
    "contiguous": lambda documents, ranks: contiguous(int(documents[-1]), ranks),
    "dealt": dealt,
    "documents": whole_documents,
}


def documents_of(length: int, count: int, seed: int, ranks: int = 2) -> np.ndarray:
    """Borders anywhere, and by turns on a border of a chunk, one before and one behind it."""
    rng = np.random.default_rng(seed)
    edge = length // (2 * ranks)
    near = [edge * (1 + n % (2 * ranks - 1)) + (-1, 0, 1)[n % 3] for n in range(count // 2)]
    free = rng.choice(np.arange(1, length), max(count - 1 - len(near), 0), replace=False)
    return np.unique(np.concatenate([[0, length], near, free])).astype(np.int64) if count > 1 else np.array([0, length])


def web_documents(length: int, seed: int = 0) -> np.ndarray:
    """Lengths of web pages: many short ones, few very long ones."""
    sizes = np.random.default_rng(seed).lognormal(7, 1.3, 4096).astype(np.int64) + 1
    return np.unique(np.minimum(np.concatenate([[0], np.cumsum(sizes)]), length))


def seen(by_rank: list[ContextPlan], pieces: int) -> np.ndarray:
    """[b, S, S]: how often the plans let a query see a key. Checks on the way that what arrives is what is sent."""
    batch, each = by_rank[0].positions.shape
    length = each * len(by_rank)
    counts = np.zeros((batch, length, length), int)
    names = [[(row, int(at)) for row in range(batch) for at in plan.positions[row]] for plan in by_rank]
    for rank, plan in enumerate(by_rank):
        for q0, q1, k0, k1 in plan.own:
            for query in range(q0, q1):
                for key in range(k0, k1 - (q1 - 1 - query)):
                    (row, at), (other, to) = names[rank][query], names[rank][key]
                    assert row == other
                    counts[row, at, to] += 1
        for number, transfer in enumerate(plan.transfers(pieces)):
            source = (rank - transfer.step) % len(by_rank)
            sent = by_rank[source].transfers(pieces)[number].send
            rows = [names[source][row] for start, stop in sent for row in range(start, stop)]
            assert len(rows) == transfer.rows_in and by_rank[source].transfers(pieces)[number].step == transfer.step
            for q0, q1, k0, k1 in transfer.blocks:
                for query, key in product(range(q0, q1), range(k0, k1)):
                    (row, at), (other, to) = names[rank][query], rows[key]
                    assert row == other
                    counts[row, at, to] += 1
    return counts


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_query_sees_its_document_up_to_itself_once(monkeypatch, ranks, name):
    monkeypatch.setattr(plans, "LEAST_ROWS", 3)
    length = 16 * ranks
    for seed, count in enumerate((1, 2, 5, 9)):
        rows = [documents_of(length, count + row, seed + 10 * row, ranks) for row in range(2)]
        layouts = [LAYOUTS[name](documents, ranks) for documents in rows]
        by_rank = [plan_rows(layouts, rows, rank) for rank in range(ranks)]
        document = np.stack([np.searchsorted(ends, np.arange(length), side="right") for ends in rows])
        wanted = (document[:, :, None] == document[:, None]) & np.tri(length, dtype=bool)
        for pieces in (1, 3):
            assert (seen(by_rank, pieces) == wanted).all()
        arriving = [sum(step.rows_in for step in plan.steps) for plan in by_rank]
        assert arriving == sum(traffic(*each) for each in zip(layouts, rows, strict=True)).tolist()


def test_no_row_travels_that_nobody_needs():
    documents = np.array([0, 16, 40, 64])
    for layout in (zigzag(64, 4), contiguous(64, 4), dealt(documents, 4)):
        by_rank = [plan_rows([layout], [documents], rank) for rank in range(4)]
        for plan in by_rank:
            for step in plan.steps:
                used = {key for *_, k0, k1 in step.blocks for key in range(k0, k1)}
                assert used == set(range(step.rows_in))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_one_document_in_zigzag_is_balanced_and_sends_three_quarters(ranks):
    length = 64 * ranks
    one = np.array([0, length])
    work = work_of_ranks(zigzag(length, ranks), one)
    assert work.max() == work.min() and work.sum() == length * (length + 1) / 2
    shard = length // ranks
    total = sum(sum(step.rows_in for step in whole_rows(length, 1, ranks, rank).steps) for rank in range(ranks))
    assert total == 0.75 * shard * ranks * (ranks - 1)


def test_web_pages_are_dealt_evenly_where_zigzag_is_not():
    worst_dealt, worst_zigzag = 0.0, 0.0
    for seed in range(8):
        documents = web_documents(65536, seed)
        balance = [work_of_ranks(layout, documents) for layout in (dealt(documents, 8), zigzag(65536, 8))]
        worst_dealt, worst_zigzag = (
            max(worst, float(work.max() / work.mean()))
            for worst, work in zip((worst_dealt, worst_zigzag), balance, strict=True)
        )
        assert traffic(dealt(documents, 8), documents).max() <= 65536 // 8 * 7
    assert worst_dealt <= 1.08 < 1.5 < worst_zigzag


def test_the_chosen_layout_follows_link_and_computation():
    documents = web_documents(65536)
    slow_link = best_layout(documents, 4, Costs(1e-12, 1e-3, 1e-9))
    slow_products = best_layout(documents, 4, Costs(1e-6, 1e-12, 1e-9))
    assert traffic(slow_link, documents).max() == min(
        traffic(build(documents, 4), documents).max() for build in LAYOUTS.values()
    )
    assert slow_products.name == "dealt"
    slow_start = best_layout(documents, 4, Costs(1e-12, 1e-12, 1.0))
    asked = {name: (rows_received(build(documents, 4), documents) > 0).sum(1).max() for name, build in LAYOUTS.items()}
    assert (rows_received(slow_start, documents) > 0).sum(1).max() == min(asked.values()) < asked["dealt"]
    assert best_layout(np.array([0, 64]), 4, Costs(1e-12, 1e-3, 1e-9)).name == "zigzag"


def test_equal_tokens_on_every_rank_or_a_layout_is_none():
    with pytest.raises(AssertionError, match="equally many"):
        Layout.of_chunks("lopsided", 64, [0, 0, 0, 1], 2)
