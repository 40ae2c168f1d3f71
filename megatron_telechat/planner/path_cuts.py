"""Paths through the op graph: the makespan is at least the length of each, which is linear in the stage times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_telechat.planner.op_graph import OpGraph, end_times
from megatron_telechat.planner.slow_stage import worst_case


@dataclass(frozen=True)
class PathCut:
    """makespan >= lags * p2p + visits . stage times, for every assignment.

    Attributes:
        visits: ops of each kind on the path, times the factor on their time in the case that it is a path of.
    """

    lags: int
    visits: tuple[float, ...]


class Separator:
    """Finds the longest path at a (fractional) point, in the worst of several cases.

    Args:
        factors: [cases, 2 C] on the times of the virtual stages (`slow_stage.time_factors`).
    """

    def __init__(self, graph: OpGraph, p2p: float, factors: np.ndarray):
        self.graph, self.p2p, self.factors = graph, p2p, factors
        self.last = graph.last_ops

    def longest(self, times: Sequence[float]) -> tuple[float, list[PathCut]]:
        """(makespan, critical paths: ties broken one way and the other)."""
        cases = self.factors * np.array(times)
        worst = worst_case(self.graph, cases, self.p2p)
        ends = end_times(self.graph, cases[worst].tolist(), self.p2p)
        final = max(self.last, key=lambda op: ends[op])
        factors = self.factors[worst].tolist()
        return ends[final], [self._cut(final, ends, factors, prefer) for prefer in (True, False)]

    def _cut(self, op: int, ends: list[float], factors: list[float], prefer_device: bool) -> PathCut:
        graph, p2p = self.graph, self.p2p
        visits, lags = [0] * (2 * graph.num_stages), 0
        while op:
            visits[graph.kind[op]] += 1
            before, needs = graph.before[op], graph.needs[op]
            by_device, by_need = ends[before], ends[needs] + (p2p if graph.lags[op] else 0.0)
            if needs and (by_need > by_device or by_need == by_device and not prefer_device):
                lags += graph.lags[op]
                op = needs
            else:
                op = before
        return PathCut(lags, tuple(number * factor for number, factor in zip(visits, factors, strict=True)))
