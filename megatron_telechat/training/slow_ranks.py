"""Ranks that compute more slowly than others with the same work. Pure arithmetic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

INTERVALS = 3
"""So many logging intervals in a row must a rank be slow before it is named."""
LEAST_S = 60.0
"""So long must they last together: what another process takes of a short interval is no news."""


@dataclass(frozen=True)
class SlowRank:
    """A rank that was slow for some time; times are of the last logging interval."""

    rank: int
    host: str
    compute_s: float
    median_s: float
    slow_s: float

    def event(self, step: int) -> dict[str, Any]:
        """Of metrics.jsonl."""
        return {
            "event": "slow_rank",
            "step": step,
            "rank": self.rank,
            "host": self.host,
            "compute_s": self.compute_s,
            "median_s": self.median_s,
            "slow_s": self.slow_s,
        }

    def line(self) -> str:
        """For the console."""
        return (
            f"slow rank: rank {self.rank} (host {self.host}) computes {self.compute_s:.3g} s a step, "
            f"{self.compute_s / self.median_s:.2f} times the median of its pipeline rank ({self.median_s:.3g} s), for "
            f"{self.slow_s:.0f} s; look at that host and device"
        )


class SlowRanks:
    """Compares the ranks of each pipeline rank, which hold the same layers.

    Args:
        factor: times the median; 0: nobody is named.
        pipeline_ranks: of every rank, by rank.
        hosts: the same.
    """

    def __init__(self, factor: float, pipeline_ranks: Sequence[int], hosts: Sequence[str]):
        self._factor, self._hosts = factor, hosts
        self._peers: dict[int, list[int]] = defaultdict(list)
        for rank, pipeline_rank in enumerate(pipeline_ranks):
            self._peers[pipeline_rank].append(rank)
        self._slow: dict[int, tuple[int, float]] = {}
        self._named: set[int] = set()

    @property
    def stages(self) -> list[list[int]]:
        """The ranks of each pipeline rank, by pipeline rank."""
        return [ranks for _, ranks in sorted(self._peers.items())]

    def observe(self, compute_s: Sequence[float], interval_s: float) -> tuple[dict[str, Any], list[SlowRank]]:
        """One logging interval.

        Args:
            compute_s: seconds of compute a step, by rank.
            interval_s: how long it was.

        Returns:
            The fields of the record (none where no rank has a peer), and the ranks that are named now.
        """
        slowest, ratio, named = None, 0.0, []
        for ranks in self._peers.values():
            if len(ranks) < 2:
                continue
            median_s = median_low([compute_s[rank] for rank in ranks])
            for rank in ranks:
                mine = compute_s[rank] / median_s if median_s > 0 else 1.0
                if mine > ratio:
                    slowest, ratio = rank, mine
                if not 0 < self._factor < mine:
                    self._slow.pop(rank, None)
                    self._named.discard(rank)
                    continue
                intervals, slow_s = self._slow.get(rank, (0, 0.0))
                self._slow[rank] = intervals, slow_s = intervals + 1, slow_s + interval_s
                if intervals >= INTERVALS and slow_s >= LEAST_S and rank not in self._named:
                    self._named.add(rank)
                    named.append(SlowRank(rank, self._hosts[rank], compute_s[rank], median_s, slow_s))
        if slowest is None:
            return {}, []
        fields = {
            "compute_s_max": compute_s[slowest],
            "compute_over_median": ratio,
            "slowest_rank": slowest,
        }
        return fields, named
