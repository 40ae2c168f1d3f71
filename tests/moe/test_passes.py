"""The order in which both passes issue transfers, wait for them and compute, for two ranks of which one is here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_telechat.device_kinds import DEVICE_KINDS
from megatron_telechat.moe import engine_loop
from megatron_telechat.moe.dispatch import Dispatch, ExpertGroups, RowFormat
from megatron_telechat.moe.engine import ExpertWeights, Gradients
from megatron_telechat.moe.overlap_model import PassCosts
from megatron_telechat.moe.pipeline import MAX_PENDING, ChunkPipeline
from megatron_telechat.moe.router import Routing

EXPERTS, HIDDEN, WIDTH, TOKENS, TOPK = 4, 8, 12, 24, 2


class Group:
    """Ranks of which the first is here."""

    def __init__(self, ranks: int):
        self.ranks = ranks

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return 0


class Arrival:
    """A transfer that has arrived when it is asked for or not, as the test wants it."""

    def __init__(self, rows: Tensor, number: int, link: ScriptedLink):
        self.rows, self.number, self.link = rows, number, link

    @property
    def arrived(self) -> bool:
        return self.link.arrives_at_once

    def wait(self) -> Tensor:
        self.link.events.append(f"wait {self.number}")
        return self.rows

    def when_done(self, report: Callable[[], None]) -> None:
        report()

    def wait_beside(self) -> None:
        self.link.events.append(f"beside {self.number}")


class ScriptedLink:
    """Writes down starts and waits; the transfers have one count over both passes."""

    def __init__(self, events: list[str], arrives_at_once: bool):
        self.events, self.arrives_at_once, self.started = events, arrives_at_once, 0

    def start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Arrival:
        number, self.started = self.started, self.started + 1
        self.events.append(f"start {number}")
        return Arrival(rows.new_zeros(sum(receive), *rows.shape[1:]), number, self)


class LoggedEngine:
    """The engine of the CPU; writes down what it is asked for."""

    def __init__(self, events: list[str]):
        self.events = events

    def first_product(self, *operands: Any) -> Tensor:
        self.events.append("R")
        return engine_loop.first_product(*operands)

    def forward(self, *operands: Any) -> tuple[Tensor, Tensor | None]:
        self.events.append("F")
        return engine_loop.forward(*operands)

    def input_gradients(self, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.events.append("B")
        return engine_loop.input_gradients(*operands)

    def weight_gradients(self, *operands: Any) -> None:
        self.events.append("W")
        engine_loop.weight_gradients(*operands)


@pytest.fixture
def run(monkeypatch) -> Callable[..., tuple[list[str], list[str]]]:
    """Events of a forward and of a backward."""

    def gather(output: Tensor, message: Tensor, group: Group) -> None:
        """Every rank holds what this one holds."""
        output.view(group.size(), -1).copy_(message.flatten())

    monkeypatch.setattr(dist, "all_gather_into_tensor", gather)

    def events(
        chunks: int, arrives_at_once: bool = False, recompute: bool = False, costs: PassCosts | None = None
    ) -> tuple[list[str], list[str]]:
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randn(TOKENS, HIDDEN, generator=generator)
        best = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOPK)
        counts = torch.bincount(best.indices.flatten(), minlength=EXPERTS)
        routing = Routing(best.values.softmax(-1), best.indices, counts)
        weights = ExpertWeights(torch.ones(2, 2, WIDTH, HIDDEN), torch.ones(2, HIDDEN, WIDTH), None)
        groups = ExpertGroups(Group(2), Group(1), Group(2))
        seen: list[str] = []
        dispatch = Dispatch(routing, groups, chunks, RowFormat(HIDDEN, tokens.dtype))
        link, engine = ScriptedLink(seen, arrives_at_once), LoggedEngine(seen)
        pipeline = ChunkPipeline(dispatch, link, engine, recompute=recompute, backward_costs=costs)
        _, kept = pipeline.forward(tokens, routing.weights, weights, True)
        forward = seen.copy()
        seen.clear()
        pipeline.backward(tokens, weights, kept, Gradients.of(weights, chunks))
        assert not kept, "what was kept is let go chunk by chunk"
        return forward, seen

    return events


def words(text: str) -> list[str]:
    """ "start 0, F" as a list."""
    return [part.strip() for part in text.split(",")]


def test_forward_issues_all_dispatches_and_each_combine_when_its_chunk_is_computed(run):
    forward, _ = run(3)
    assert forward == words(
        "start 0, start 1, start 2, wait 0, F, start 3, wait 1, F, start 4, wait 2, F, start 5, wait 3, wait 4, wait 5"
    )


def test_weight_gradients_fill_the_waits(run):
    _, backward = run(3)
    assert backward == words(
        "start 6, start 7, start 8, wait 6, B, start 9, W, wait 7, B, start 10, W, wait 8, B, start 11, W, "
        "wait 9, wait 10, wait 11"
    )


def test_weight_gradients_come_last_where_nothing_has_to_be_waited_for(run):
    _, backward = run(3, arrives_at_once=True)
    assert backward == words(
        "start 6, start 7, start 8, wait 6, B, start 9, wait 7, B, start 10, wait 8, B, start 11, W, W, W, "
        "wait 9, wait 10, wait 11"
    )


FAST, SLOW = PassCosts(12.0, 0.0, 1.0, 0.0), PassCosts(12.0, 0.0, 60.0, 0.0)
"""A backward whose link is faster than its computation, and one whose link is slower."""


def test_where_the_host_sees_no_arrival_the_measured_times_place_the_weight_gradients(run, monkeypatch):
    filling, last = run(3)[1], run(3, arrives_at_once=True)[1]
    assert run(3, costs=FAST)[1] == filling, "the CPU goes by what has arrived"
    monkeypatch.setattr("megatron_telechat.moe.pipeline.traits_of", lambda device: DEVICE_KINDS["cuda"])
    assert run(3, arrives_at_once=True, costs=SLOW)[1] == filling
    assert run(3, arrives_at_once=True, costs=FAST)[1] == last
    assert run(3, arrives_at_once=True)[1] == last, "nothing was measured"
    recomputed = run(3, arrives_at_once=True, recompute=True, costs=SLOW)[1]
    assert recomputed == run(3, recompute=True)[1]


def test_recompute_repeats_the_first_product_before_the_wait_and_keeps_one_chunk_pending(run):
    forward, backward = run(3, arrives_at_once=True, recompute=True)
    assert forward == run(3)[0], "recompute repeats no exchange and changes none"
    assert backward == words(
        "start 6, start 7, start 8, R, wait 6, B, start 9, R, wait 7, B, start 10, W, R, wait 8, B, start 11, W, W, "
        "wait 9, wait 10, wait 11"
    )


def test_few_chunks_wait_for_their_weight_gradients(run):
    chunks = MAX_PENDING + 3
    _, backward = run(chunks, arrives_at_once=True)
    waiting = [backward[:at].count("B") - backward[:at].count("W") for at in range(len(backward))]
    assert max(waiting) == MAX_PENDING + 1  # the chunk that was just computed, and those that wait


@pytest.mark.parametrize("arrives_at_once", (True, False))
def test_the_order_of_transfers_is_the_same_whatever_the_timing(run, arrives_at_once):
    passes = run(4, arrives_at_once)
    assert [[e for e in events if e not in "FBW"] for events in passes] == [
        [e for e in events if e not in "FBW"] for events in run(4, True)
    ]
