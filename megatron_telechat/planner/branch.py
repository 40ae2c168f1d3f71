"""Branch and bound over layer counts."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from megatron_telechat.planner.budget import Budget
from megatron_telechat.planner.incumbent import SELDOM, Incumbent
from megatron_telechat.planner.lp import INF, LpResult
from megatron_telechat.planner.op_graph import OpGraph
from megatron_telechat.planner.path_cuts import PathCut
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.relaxation import NODE_ROUNDS, PROBE_ROUNDS, ROOT_ROUNDS, WHOLE, Node, Relaxation

RELIABLE = 8
"""Trials of a branching after which its mean gains are believed. With two, a search that others share may need twenty
times as many boxes."""
SHAKES = 4
"""Shakes after every SELDOM boxes: a fifth of the time of a search."""
SHAVING = 0.4
"""Share of a search that may go to the root alone."""


class Tree(Relaxation):
    """The search: boxes still open in a heap, the best bound first; the newest child of a box is taken next."""

    def __init__(
        self,
        problem: BalanceProblem,
        graph: OpGraph,
        incumbent: Incumbent,
        budget: Budget,
        gap: float,
        limit: float = INF,
        cuts: Iterable[PathCut] = (),
    ):
        super().__init__(problem, graph, incumbent, budget, gap, limit, cuts)
        self.counter = itertools.count()
        self.heap: list[Node] = []
        self.closed_bound = INF
        self.nodes = 0
        self.shaving = SHAVING
        self.score: dict[tuple[str, int], list] = {}

    def root_node(self) -> Node:
        """The box of all assignments, bounded by the work of its layers spread evenly."""
        space, first = self.space, self.space.first_branch_row
        root = Node(
            least_work(self.problem) / self.unit, 0, -1, space.lo, space.hi, space.row_lo[first:], space.row_hi[first:]
        )
        return root.child(next(self.counter))

    # branching ---------------------------------------------------------------------------------------------------

    def broken_boundary(self, x: np.ndarray) -> tuple[int, int] | None:
        """(group, stage) at which to split a boundary between groups that the point does not respect."""
        space = self.space
        for g in range(len(self.problem.groups) - 1):
            early = [at for at, kind in enumerate(space.kinds) if kind[0] <= g]
            late = [at for at, kind in enumerate(space.kinds) if kind[0] > g]
            has_early = np.flatnonzero(x[space.n[:, early]].sum(axis=1) > WHOLE)
            has_late = np.flatnonzero(x[space.n[:, late]].sum(axis=1) > WHOLE)
            if has_early[-1] > has_late[0]:
                mass = x[space.n[:, early]].sum(axis=1).cumsum()
                stage = int(np.searchsorted(mass, mass[-1] - WHOLE - 0.5))
                return g, min(max(stage, int(has_late[0])), int(has_early[-1]) - 1)
        return None

    def candidates(self, node: Node, x: np.ndarray) -> list[tuple[str, int, float]]:
        """What may be branched on, of the first class that has something fractional: (col or row, number, value).

        Sums over a device come before its stages: in the steady state the rounds of a device make the time. With m <= P
        there is no steady state, only filling and draining through single stages, and their sums come first.
        """
        space, first = self.space, self.space.first_branch_row
        values = space.rows[first:] @ x
        sums = [space.device_rows, space.mode_rows, space.stage_rows]
        if self.problem.m <= self.problem.P:
            sums = [space.stage_rows, space.mode_rows, space.device_rows]
        classes = [
            [("col", column) for column in space.y.values()],
            *([("row", row - first) for row in rows] for rows in sums),
            [("col", int(column)) for column in space.n.ravel()],
            [("col", int(column)) for column in space.z.ravel()],
        ]
        for members in classes:
            found = []
            for what, number in members:
                value = x[number] if what == "col" else values[number]
                if abs(value - round(value)) > WHOLE:
                    found.append((what, number, float(value)))
            if found:
                return found
        return []

    def children(self, node: Node, what: str, number: int, value: float) -> tuple[Node, Node]:
        """Split a box at a value between two integers: column or branch row ``number`` is rounded down in one child
        and up in the other."""
        down, up = node.child(next(self.counter)), node.child(next(self.counter))
        if what == "col":
            down.hi[number], up.lo[number] = math.floor(value), math.floor(value) + 1
        else:
            down.row_hi[number], up.row_lo[number] = math.floor(value), math.floor(value) + 1
        return down, up

    def boundary_children(self, node: Node, g: int, stage: int) -> tuple[Node, Node]:
        """The last stage with layers of group `g` or before is at most `stage`, or behind it."""
        space = self.space
        early = [at for at, kind in enumerate(space.kinds) if kind[0] <= g]
        late = [at for at, kind in enumerate(space.kinds) if kind[0] > g]
        before, behind = node.child(next(self.counter)), node.child(next(self.counter))
        before.hi[space.n[stage + 1 :, early]] = 0
        behind.hi[space.n[: stage + 1, late]] = 0
        return before, behind

    def choose(self, node: Node, result: LpResult) -> tuple[Node, Node] | None:
        """Two children that leave the point out; None if it is whole and nothing is left to narrow."""
        broken = self.broken_boundary(result.x) if len(self.problem.groups) > 1 else None
        if broken is not None:
            return self.boundary_children(node, *broken)
        found = self.candidates(node, result.x)
        if not found:
            return self.halve(node, result.x)
        return self._best(node, found)

    def halve(self, node: Node, x: np.ndarray) -> tuple[Node, Node] | None:
        """Children that part the range of a column near `x`; None if the box is one point."""
        counts = slice(1, self.space.counts_end)
        free = np.flatnonzero(node.lo[counts] < node.hi[counts]) + 1
        if not len(free):
            return None
        column = int(free[0])
        below = min(max(math.floor(x[column]), node.lo[column]), node.hi[column] - 1)
        return self.children(node, "col", column, below + 0.5)

    def _best(self, node: Node, found: list[tuple[str, int, float]]) -> tuple[Node, Node]:
        found.sort(key=lambda one: abs(one[2] - math.floor(one[2]) - 0.5))
        best, score = None, -1.0
        for one in found[:12]:
            gain, pair = self._estimate(node, one)
            if gain > score:
                best, score = pair or self.children(node, *one), gain
            if score == INF:
                break
        assert best is not None
        return best

    def _estimate(self, node: Node, one: tuple[str, int, float]) -> tuple[float, tuple[Node, Node] | None]:
        """How good a branching is (inf: it closes a child), and the children if they were looked at."""
        what, number, value = one
        known = self.score.setdefault((what, number), [0.0, 0.0, 0])
        part = value - math.floor(value)
        if known[2] >= RELIABLE:
            down, up = known[0] / known[2] * part, known[1] / known[2] * (1 - part)
            return max(down, 1e-7) * max(up, 1e-7), None
        pair = self.children(node, what, number, value)
        down, up = (min(child.bound - node.bound, 0.2 * abs(node.bound)) for child in self._probe(node, pair))
        known[0] += down / part
        known[1] += up / (1 - part)
        known[2] += 1
        closes = max(child.bound for child in pair) >= self.cutoff()
        return INF if closes else max(down, 1e-7) * max(up, 1e-7), pair

    def _probe(self, node: Node, pair: tuple[Node, Node]) -> tuple[Node, Node]:
        """Raise the bounds of the children by a few simplex steps each."""
        basis = self.lp.basis()
        self.lp.limit_iterations(40)
        for child in pair:
            if child.empty:
                child.bound = INF
                continue
            self.load(child)
            child.bound = max(child.bound, self.lp.solve().bound)
            self.budget.work += 1
            self.lp.set_basis(basis)
        self.lp.limit_iterations(None)
        self.load(node)
        return pair

    def shave(self, node: Node) -> LpResult | None:
        """Cut off ends of the ranges of layers (devices, stages, modes) that hold nothing better.

        Returns the LP of the narrowed node, None if nothing is left or the node is closed.
        """
        space, first = self.space, self.space.first_branch_row
        rows = dict.fromkeys(space.device_rows + space.stage_rows + space.mode_rows)
        result = self.tighten(node, self.relax(node, ROOT_ROUNDS))
        changed = True
        while changed and result.feasible and node.bound < self.cutoff() and not self.budget.over(self.shaving):
            changed, result = self.shave_rows(node, result, [row - first for row in rows])
        return self.tighten(node, result)

    def shave_rows(self, node: Node, result: LpResult, numbers: Sequence[int]) -> tuple[bool, LpResult]:
        """(Whether the range of one of these branch rows could be narrowed, the LP of the node.)"""
        space, first = self.space, self.space.first_branch_row
        changed = False
        for number in numbers:
            for up in (True, False):
                while result.feasible and node.bound < self.cutoff() and not self.budget.over(self.shaving):
                    value = float(space.rows[first + number] @ result.x)
                    if not self._shave_end(node, number, value, up):
                        break
                    changed = True
                    result = self.relax(node, NODE_ROUNDS)
        return changed, result

    def _shave_end(self, node: Node, number: int, value: float, up: bool) -> bool:
        """Whether the range of a row could be narrowed: to the value's whole neighbour, or to the one after it."""
        low, high = node.row_lo[number], node.row_hi[number]
        base = math.floor(value + WHOLE) if up else math.ceil(value - WHOLE)
        for step in (1, 2):
            edge = base + step if up else base - step
            if not low <= edge <= high:
                return False
            child = node.child(next(self.counter))
            if up:
                child.row_lo[number] = edge
            else:
                child.row_hi[number] = edge
            outcome = self.relax(child, PROBE_ROUNDS)
            if child.bound >= self.cutoff() or outcome.bound == INF:
                if up:
                    node.row_hi[number] = edge - 1
                else:
                    node.row_lo[number] = edge + 1
                return step == 1
        return False

    def run(self, current: Node | None = None) -> None:
        """Search this box and those of the heap until all are closed or time is up; `lower_bound` tells what is
        proved."""
        current = self.dive(current)
        if current is not None:
            heapq.heappush(self.heap, current)

    def dive(self, current: Node | None = None) -> Node | None:
        """As `run`; the box that it was at when time was up is not in the heap but comes back."""
        while (current is not None or self.heap) and not self.budget.over():
            current = self.advance(current)
        return current

    def advance(self, current: Node | None) -> Node | None:
        """Look at one box, this one or the best of the heap: it is closed, or split. Returns a child to go on with."""
        if current is None:
            current = heapq.heappop(self.heap)
        if current.bound >= self.cutoff():
            self.closed_bound = min(self.closed_bound, current.bound)
            return None
        return self._step(current)

    def _step(self, node: Node) -> Node | None:
        self.nodes += 1
        if node.depth == 0:
            result = self.shave(node)
        else:
            result = self.relax(node, NODE_ROUNDS)
            if result.feasible and node.bound < self.cutoff() and self.add_hull_rows(result.x):
                result = self.relax(node, NODE_ROUNDS)
        if result is None or node.bound >= self.cutoff():
            self.closed_bound = min(self.closed_bound, node.bound)
            return None
        if result.bound == INF:
            return None
        if result.feasible:
            self.incumbent.offer_point(self.space, result.x, self.is_whole(result.x), self.nodes)
            if self.nodes % SELDOM == 0:
                self.incumbent.shake(SHAKES)
            self.narrow(node, result.duals)
            pair = self.choose(node, result)
        else:
            pair = self.halve(node, (node.lo + node.hi) / 2)
        if pair is None:
            self.close_point(node)
            return None
        down, up = pair
        heapq.heappush(self.heap, down)
        return up

    def close_point(self, node: Node) -> None:
        """A box of one point holds what the simulator says of it."""
        self.incumbent.offer_point(self.space, node.lo, True, self.nodes)
        exact = self.incumbent.exact(self.space, node.lo) / self.unit
        self.closed_bound = min(self.closed_bound, max(node.bound, exact))

    def lower_bound(self) -> float:
        """What is proved, in the problem's time; inf if there is no assignment that fits.

        Ranges that were cut off hold nothing below the cutoff of their time, hence nothing below the present one.
        """
        open_bound = min((node.bound for node in self.heap), default=INF)
        return min(open_bound, self.closed_bound, self.cutoff()) * self.unit


def least_work(problem: BalanceProblem) -> float:
    """Some device has at least its share of the work, and does one op at a time; it may be the slow one."""
    layers = [group.count * (group.f + group.b + min(mode.extra_b for mode in group.modes)) for group in problem.groups]
    blocks = [block.f + block.b for block in problem.blocks]
    return problem.m * (1 + problem.slow_stage) * math.fsum(layers + blocks) / problem.P * (1 - 1e-12)
