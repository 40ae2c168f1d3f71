"""Paths through the op graph: the makespan is at least the length of each, which is linear in the stage times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_telechat.planner.op_graph import OpGraph, end_times


@dataclass(frozen=True)
class PathCut:
    """makespan >= lags * p2p + visits . stage times, for every assignment. `visits`: ops of each kind on the path."""

    lags: int
    visits: tuple[int, ...]


class Separator:
    """Finds the longest path at a (fractional) point, and more long ones."""

    def __init__(self, graph: OpGraph, p2p: float):
        self.graph, self.p2p = graph, p2p
        self.last = graph.last_ops()
        size = len(graph.kind)
        self._after = [0] * size
        self._feeds = [0] * size
        for op in range(1, size):
            if graph.before[op]:
                self._after[graph.before[op]] = op
            if graph.needs[op]:
                self._feeds[graph.needs[op]] = op

    def longest(self, times: Sequence[float]) -> tuple[float, list[PathCut]]:
        """(makespan, critical paths: ties broken one way and the other)."""
        ends = end_times(self.graph, times, self.p2p)
        final = max(self.last, key=lambda op: ends[op])
        return ends[final], [self._cut([(final, False)], ends, None, times, prefer) for prefer in (True, False)]

    def many(self, times: Sequence[float], above: float) -> tuple[float, list[PathCut]]:
        """(makespan, paths longer than `above`: critical ones first, then the longest through each kind of op)."""
        graph, p2p = self.graph, self.p2p
        ends = end_times(graph, times, p2p)
        tails = [0.0] * len(ends)
        for op in range(len(ends) - 1, 0, -1):
            tail = tails[op] + times[graph.kind[op]]
            before, needs = graph.before[op], graph.needs[op]
            if tail > tails[before]:
                tails[before] = tail
            if graph.lags[op]:
                tail += p2p
            if tail > tails[needs]:
                tails[needs] = tail
        final = max(self.last, key=lambda op: ends[op])
        cuts = {self._cut([(final, False)], ends, None, times, prefer): None for prefer in (True, False)}
        through = np.array(ends) + np.array(tails)
        kinds = np.array(graph.kind)
        middle = np.array(graph.microbatch) == graph.m // 2
        for kind in range(2 * graph.num_stages):
            op = int(np.flatnonzero((kinds == kind) & middle)[0])
            if through[op] > above:
                for prefer in (True, False):
                    cuts[self._cut([(op, True)], ends, tails, times, prefer)] = None
        return ends[final], list(cuts)

    def _cut(
        self,
        seeds: list[tuple[int, bool]],
        ends: list[float],
        tails: list[float] | None,
        times: Sequence[float],
        prefer_device: bool,
    ) -> PathCut:
        graph, p2p = self.graph, self.p2p
        visits, lags = [0] * (2 * graph.num_stages), 0
        op, forward = seeds[0]
        start = op
        while op:
            visits[graph.kind[op]] += 1
            before, needs = graph.before[op], graph.needs[op]
            by_device, by_need = ends[before], ends[needs] + (p2p if graph.lags[op] else 0.0)
            if needs and (by_need > by_device or by_need == by_device and not prefer_device):
                lags += graph.lags[op]
                op = needs
            else:
                op = before
        if forward:
            assert tails is not None
            op = start
            while self._after[op] or self._feeds[op]:
                after, feeds = self._after[op], self._feeds[op]
                by_device = tails[after] + times[graph.kind[after]] if after else -1.0
                by_need = (
                    tails[feeds] + times[graph.kind[feeds]] + (p2p if graph.lags[feeds] else 0.0) if feeds else -1.0
                )
                if by_need > by_device or by_need == by_device and not prefer_device:
                    lags += graph.lags[feeds]
                    op = feeds
                else:
                    op = after
                visits[graph.kind[op]] += 1
        return PathCut(lags, tuple(visits))
