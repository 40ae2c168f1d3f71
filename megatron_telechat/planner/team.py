"""Branch and bound on several processors: workers narrow the root, and search boxes, each with a program of its own.

What one of them meets (paths, rows of device plans, a better assignment) the others get with their next request. Boxes
come back open, closed or split, so the bound is that of one search: the smallest of the boxes that are still open.
"""

from __future__ import annotations

import heapq
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_telechat.planner.assignment import Assignment
from megatron_telechat.planner.branch import Tree
from megatron_telechat.planner.budget import Budget
from megatron_telechat.planner.incumbent import MANY_DESCENTS, Incumbent
from megatron_telechat.planner.lp import INF, LpResult
from megatron_telechat.planner.messages import register
from megatron_telechat.planner.op_graph import OpGraph, op_graph
from megatron_telechat.planner.path_cuts import PathCut
from megatron_telechat.planner.problem import BalanceProblem, Block, DeviceCost, LayerGroup, Mode
from megatron_telechat.planner.relaxation import NODE_ROUNDS, MetRow, Node
from megatron_telechat.planner.worker import Employer, Worker

MOST_WORKERS = 16
"""Each of them gets what all others meet."""
WAIT_S = 1.0
"""Seconds after which the workers start: a short search is over before they would be there."""
WORK = 400
"""Linear programs in a request."""
GRACE_S = 5.0
"""Seconds that a worker may take beyond the time limit, which it looks at between two linear programs."""
SHAKES = 8
"""Shakes of each worker whenever the root is narrowed: a better assignment lets it be narrowed further."""
SLICE = 8
"""Rows that are narrowed before it is time to look whether the workers may start."""


@dataclass(frozen=True)
class News:
    """What others met since the last request, or this worker since its last answer."""

    rows: tuple[MetRow, ...]
    best: Assignment | None


@dataclass(frozen=True)
class Found:
    """An answer: the box that a search was at and others that are still open, the smallest bound of those that were
    closed, how many were looked at."""

    current: Node | None
    nodes: tuple[Node, ...]
    closed_bound: float
    searched: int
    news: News


@dataclass(frozen=True)
class Begin:
    """The problem, once for each worker."""

    problem: BalanceProblem
    gap: float
    number: int

    def answer(self, memory: dict[str, Any]) -> None:
        """Make its program ready."""
        memory["member"] = Member(self.problem, self.gap, self.number)


@dataclass(frozen=True)
class Narrow:
    """Narrow the ranges of these branch rows of a root; its box comes back."""

    news: News
    root: Node
    numbers: tuple[int, ...]
    seconds: float

    def answer(self, memory: dict[str, Any]) -> Found:
        """As `Tree.shave_rows`."""
        member: Member = memory["member"]
        member.hear(self.news, Budget(time.perf_counter() + self.seconds))
        member.incumbent.shake(SHAKES)
        member.shave_rows(self.root, member.relax(self.root, NODE_ROUNDS), self.numbers)
        return member.tell(self.root, [])


@dataclass(frozen=True)
class Search:
    """Search in these boxes of a root for so many linear programs, in `current` first."""

    news: News
    root: Node
    current: Node | None
    nodes: tuple[Node, ...]
    seconds: float
    work: int = WORK

    def answer(self, memory: dict[str, Any]) -> Found:
        """As `Tree.dive`."""
        member: Member = memory["member"]
        member.hear(self.news, Budget(time.perf_counter() + self.seconds, self.work))
        if not memory.get("listed"):
            member.list_plans(self.root)
            memory["listed"] = True
        member.heap = list(self.nodes)
        heapq.heapify(member.heap)
        return member.tell(member.dive(self.current), member.heap)


register(
    *(Begin, Narrow, Search, Found, News, Node, PathCut, Assignment),
    *(BalanceProblem, LayerGroup, Mode, Block, DeviceCost),
)


class Member(Tree):
    """The search of a worker."""

    def __init__(self, problem: BalanceProblem, gap: float, number: int):
        incumbent = Incumbent(problem, INF, seed=number)  # each looks elsewhere
        super().__init__(problem, op_graph(*problem.schedule), incumbent, Budget(INF), gap)
        self.shaving = 1.0
        self.nodes = self._from = MANY_DESCENTS  # the first boxes of a search are rounded by who began it
        self._told, self._given = 0, None

    def hear(self, news: News, budget: Budget) -> None:
        """Begin a request."""
        self.budget = budget
        self.incumbent.deadline = budget.deadline
        self.keep(news.rows)
        self._told, self._given = len(self.met), news.best
        if news.best is not None:
            self.incumbent.offer(news.best)
        self.closed_bound, self._from = INF, self.nodes

    def tell(self, current: Node | None, nodes: Sequence[Node]) -> Found:
        """What came out of it."""
        best = self.incumbent.assignment
        news = News(tuple(self.met[self._told :]), best if best != self._given else None)
        return Found(current, tuple(nodes), self.closed_bound, self.nodes - self._from, news)


class Team(Tree, Employer):
    """A search that has others do its work from a time (of `time.perf_counter`) on. Use it as a context."""

    def __init__(
        self,
        problem: BalanceProblem,
        graph: OpGraph,
        incumbent: Incumbent,
        budget: Budget,
        gap: float,
        processes: int,
        starting: float,
    ):
        Tree.__init__(self, problem, graph, incumbent, budget, gap)
        Employer.__init__(self)
        self.processes = min(processes, MOST_WORKERS) if processes > 1 else 0
        self._from = starting
        self._awaited: list[Worker] = []
        self._heard: dict[Worker, int] = {}
        self._own: dict[Worker, set[int]] = {}
        self._root: Node | None = None

    def shave_rows(self, node: Node, result: LpResult, numbers: Sequence[int]) -> tuple[bool, LpResult]:
        """As of a search alone; the workers share the rows that are left when they are there."""
        changed = False
        for first in range(0, len(numbers), SLICE):
            if self.ready():
                more, result = self._narrow(node, result, numbers[first:])
                return changed or more, result
            more, result = super().shave_rows(node, result, numbers[first : first + SLICE])
            changed |= more
        return changed, result

    def run(self, current: Node | None = None) -> None:
        """As of a search alone."""
        self._root = current
        if current is not None and not self.budget.over():
            current = self.advance(current)  # a root is narrowed by all of them
        while (current is not None or self.heap) and not self.ready() and not self.budget.over():
            current = self.advance(current)
        if current is not None:
            heapq.heappush(self.heap, current)
        if self.heap and self.ready():
            self._share()

    def ready(self) -> bool:
        """Whether the workers are ready; they are started when it is time."""
        if self.processes and not self._workers and time.perf_counter() >= self._from:
            self.employ(self.processes)
            for number, worker in enumerate(self._workers, 1):
                worker.ask(Begin(self.problem, self.gap, number))
                self._heard[worker], self._own[worker] = 0, set()
            self._awaited = list(self._workers)
        for worker in select.select(self._awaited, [], [], 0)[0] if self._awaited else ():
            worker.answer()
            self._awaited.remove(worker)
        return bool(self._workers) and not self._awaited

    def _narrow(self, node: Node, result: LpResult, numbers: Sequence[int]) -> tuple[bool, LpResult]:
        if not result.feasible or node.bound >= self.cutoff() or self.budget.over(self.shaving):
            return False, result
        parts = [tuple(numbers[at :: len(self._workers)]) for at in range(len(self._workers))]
        for worker, part in zip(self._workers, parts, strict=True):
            worker.ask(Narrow(self._news(worker), node.child(0), part, self.budget.left(self.shaving)))
        before = node.row_lo.copy(), node.row_hi.copy()
        for worker in self._workers:
            box = self._take(worker, worker.answer())
            assert box is not None, "the root comes back"
            np.maximum(node.row_lo, box.row_lo, out=node.row_lo)
            np.minimum(node.row_hi, box.row_hi, out=node.row_hi)
            node.bound = max(node.bound, box.bound)
        changed = bool(np.any(before[0] != node.row_lo) or np.any(before[1] != node.row_hi))
        return changed, self.relax(node, NODE_ROUNDS)

    def _share(self) -> None:
        """Lend the best boxes to whoever is free, until all are closed or time is up.

        A worker goes on with the box that it was at: a search that begins anew at the best box again and again leaves
        all others open.
        """
        lent: dict[Worker, tuple[Node, ...]] = {}
        at: dict[Worker, Node] = {}
        try:
            while self.heap or lent or at:
                over = self.budget.over()
                for worker in () if over else [one for one in self._workers if one not in lent]:
                    current, boxes = at.pop(worker, None), self._best_boxes()
                    if current is not None or boxes:
                        root = self._root
                        assert root is not None
                        worker.ask(Search(self._news(worker), root, current, boxes, self.budget.left()))
                        lent[worker] = boxes if current is None else (current, *boxes)
                if not lent:
                    return
                ready = select.select(list(lent), [], [], max(self.budget.left() + GRACE_S, 0.0))[0]
                if not ready:
                    return
                for worker in ready:
                    current = self._take(worker, worker.answer())
                    del lent[worker]
                    if current is not None:
                        at[worker] = current
        finally:
            for box in (*at.values(), *(box for boxes in lent.values() for box in boxes)):
                heapq.heappush(self.heap, box)

    def _best_boxes(self) -> tuple[Node, ...]:
        """A share of the open boxes, the best first; none where none is left."""
        most = max(1, len(self.heap) // (2 * len(self._workers)))
        found: list[Node] = []
        while self.heap and len(found) < min(most, 4):
            node = heapq.heappop(self.heap)
            if node.bound >= self.cutoff():
                self.closed_bound = min(self.closed_bound, node.bound)
            else:
                found.append(node)
        return tuple(found)

    def _news(self, worker: Worker) -> News:
        since = self._heard[worker]
        own, self._own[worker] = self._own[worker], set()
        self._heard[worker] = len(self.met)
        return News(
            tuple(row for at, row in enumerate(self.met[since:], since) if at not in own), self.incumbent.assignment
        )

    def _take(self, worker: Worker, found: Found) -> Node | None:
        first = len(self.met)
        self.keep(found.news.rows)
        self._own[worker].update(range(first, len(self.met)))
        if found.news.best is not None:
            self.incumbent.offer(found.news.best)
        self.closed_bound = min(self.closed_bound, found.closed_bound)
        self.nodes += found.searched
        for box in found.nodes:
            heapq.heappush(self.heap, box)
        return found.current
