"""Branch and bound over layer counts, with path cuts separated at fractional points."""

from __future__ import annotations

import heapq
import itertools
import math
import time
from dataclasses import dataclass, field

import numpy as np

from megatron_telechat.planner.cuts import PathCut, Separator
from megatron_telechat.planner.graph import OpGraph
from megatron_telechat.planner.incumbent import Incumbent
from megatron_telechat.planner.lp import INF, LinearProgram, LpResult, RowStore
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.space import Space

WHOLE = 1e-6
"""A value this near to a whole number is one."""

ROOT_ROUNDS, NODE_ROUNDS, PROBE_ROUNDS = 400, 30, 10
POOL_CUTS = 5
MAX_CUTS = 150
"""Rows of cuts that the LP keeps; slack ones go first. Every cut ever found stays in the pool."""


@dataclass(order=True)
class Node:
    """A box: bounds of the columns and of the branching rows. `boundary`: first and last stage of each group's end."""

    bound: float
    number: int
    depth: int = field(compare=False)
    lo: np.ndarray = field(compare=False)
    hi: np.ndarray = field(compare=False)
    row_lo: np.ndarray = field(compare=False)
    row_hi: np.ndarray = field(compare=False)
    boundary: tuple[tuple[int, int], ...] = field(compare=False)


class Tree:
    """The search. `bound` (in the problem's own time) holds at any moment for every assignment that fits."""

    def __init__(self, problem: BalanceProblem, graph: OpGraph, incumbent: Incumbent, deadline: float, gap: float):
        self.problem, self.incumbent, self.deadline, self.gap = problem, incumbent, deadline, gap
        longest = _serial_time(problem)
        self.space = space = Space(problem, longest)
        self.unit = space.time_unit
        self.separator = Separator(graph, space.p2p)
        self.lp = LinearProgram(space.cost, space.lo, space.hi, space.rows, space.row_lo, space.row_hi)
        self.pool: dict[PathCut, None] = {}
        self.pool_rows = RowStore(space.size)
        self.num_fixed_rows = self.lp.num_rows
        self.counter = itertools.count()
        self.heap: list[Node] = []
        self.closed_bound = INF
        self.nodes = 0
        self.score: dict[tuple[str, int], list] = {}
        self.tables: list[dict[int, float]] = []

    # bounds ------------------------------------------------------------------------------------------------------

    def cutoff(self) -> float:
        """A node whose bound is at least this holds nothing better (LP time units)."""
        best = self.incumbent.makespan
        if not math.isfinite(best):
            return INF
        if self.gap > 0:
            best *= 1 - self.gap
        return self.incumbent.cutoff(best) / self.unit

    def root_node(self) -> Node:
        space, first = self.space, self.space.first_branch_row
        stages, groups = self.problem.num_stages, len(self.problem.groups)
        return Node(
            -INF, next(self.counter), 0, space.lo.copy(), space.hi.copy(), space.row_lo[first:].copy(),
            space.row_hi[first:].copy(), ((0, stages - 1),) * (groups - 1),
        )  # fmt: skip

    # one LP ------------------------------------------------------------------------------------------------------

    def load(self, node: Node) -> None:
        self.lp.set_columns(node.lo, node.hi)
        self.lp.set_rows(self.space.first_branch_row, node.row_lo, node.row_hi)

    def add_cuts(self, cuts: list[PathCut], x: np.ndarray, above: float) -> int:
        """Add the cuts that `x` violates; returns how many."""
        rows, lows = [], []
        for cut in dict.fromkeys(cuts):
            row, low = self.space.cut_row(cut)
            if row @ x < low - above:
                rows.append(row)
                lows.append(low)
                if cut not in self.pool:
                    self.pool[cut] = None
                    self.pool_rows.append(row, low)
        if rows:
            self.lp.add_rows(np.array(rows), np.array(lows), np.full(len(rows), INF))
        return len(rows)

    def add_from_pool(self, x: np.ndarray, above: float) -> int:
        """Add the few cuts of the pool that `x` violates most; returns how many."""
        rows, lows = self.pool_rows.rows(), self.pool_rows.lows()
        short = lows - rows @ x
        worst = np.argsort(-short, kind="stable")[:POOL_CUTS]
        worst = worst[short[worst] > above]
        if len(worst):
            self.lp.add_rows(rows[worst], lows[worst], np.full(len(worst), INF))
        return len(worst)

    def relax(self, node: Node, rounds: int) -> LpResult:
        """Solve the LP of a node with as many cuts as pay off. The result's bound is safe; node.bound is raised.

        Cuts are taken at the LP point, and half way to the best point met so far (in-out separation), which makes
        the bound rise in half the rounds.
        """
        if np.any(node.lo > node.hi) or np.any(node.row_lo > node.row_hi):
            return LpResult(False, INF, node.lo, node.lo)
        self.load(node)
        gains: list[float] = []
        center, least = None, INF
        while True:
            result = self.lp.solve()
            node.bound = max(node.bound, result.bound)
            if not result.feasible or node.bound >= self.cutoff() or time.perf_counter() > self.deadline:
                return result
            x = result.x
            tolerance = 1e-9 * max(1.0, x[0])
            gains.append(result.bound)
            stalled = len(gains) > rounds or len(gains) > 4 and gains[-1] - gains[-5] < 1e-5 * abs(gains[-1])
            if stalled and not self.is_whole(x):
                return result
            self.trim(result.duals)
            if self.add_from_pool(x, 1e-5 * abs(x[0])):
                continue
            added = 0
            if center is not None:
                middle = (x + center) / 2
                span, cuts = self.separator.longest(self.space.stage_times(middle).tolist())
                added = self.add_cuts(cuts, x, tolerance / 2)
                if span < least:
                    center, least = middle, span
            if not added:
                span, cuts = self.separator.longest(self.space.stage_times(x).tolist())
                if span < least:
                    center, least = x, span
                if span <= x[0] + tolerance or not self.add_cuts(cuts, x, tolerance / 2):
                    return result

    def trim(self, duals: np.ndarray) -> None:
        """Throw slack cuts out of the LP when there are many; they stay in the pool."""
        if len(duals) != self.lp.num_rows or self.lp.num_rows - self.num_fixed_rows <= MAX_CUTS:
            return
        slack = np.flatnonzero(np.abs(duals[self.num_fixed_rows :]) < 1e-12) + self.num_fixed_rows
        self.lp.delete_rows(slack)

    def is_whole(self, x: np.ndarray) -> bool:
        return bool(np.all(np.abs(x[1:] - np.rint(x[1:])) < WHOLE))

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
        """What may be branched on, of the first class that has something fractional: (col or row, number, value)."""
        space, first = self.space, self.space.first_branch_row
        values = space.rows[first:] @ x
        classes = [
            [("col", column) for column in space.y.values()],
            [("row", row - first) for row in space.device_rows],
            [("row", row - first) for row in space.mode_rows],
            [("row", row - first) for row in space.stage_rows],
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
        down, up = self._copy(node), self._copy(node)
        if what == "col":
            down.hi[number], up.lo[number] = math.floor(value), math.floor(value) + 1
        else:
            down.row_hi[number], up.row_lo[number] = math.floor(value), math.floor(value) + 1
            self._tighten(down, number)
            self._tighten(up, number)
        return down, up

    def _copy(self, node: Node) -> Node:
        return Node(
            node.bound, next(self.counter), node.depth + 1, node.lo.copy(), node.hi.copy(), node.row_lo.copy(),
            node.row_hi.copy(), node.boundary,
        )  # fmt: skip

    def _tighten(self, node: Node, row: int) -> None:
        """A device whose layers are bounded repeats at least what its table says."""
        device = row + self.space.first_branch_row - self.space.device_rows[0]
        if self.tables and 0 <= device < self.problem.P:
            low, high = int(node.row_lo[row]), int(min(node.row_hi[row], self.problem.num_layers))
            least = min((self.tables[device].get(layers, 0.0) for layers in range(low, high + 1)), default=INF)
            extra = self.space.extra_rows[device] - self.space.first_branch_row
            node.row_lo[extra] = max(node.row_lo[extra], min(least, 1e9))

    def boundary_children(self, node: Node, g: int, stage: int) -> tuple[Node, Node]:
        """The last stage with layers of group `g` or before is at most `stage`, or behind it."""
        space = self.space
        early = [at for at, kind in enumerate(space.kinds) if kind[0] <= g]
        late = [at for at, kind in enumerate(space.kinds) if kind[0] > g]
        before, behind = self._copy(node), self._copy(node)
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
        free = np.flatnonzero(node.lo[1:] < node.hi[1:]) + 1
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
        if known[2] >= 2:
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
            if np.any(child.row_lo > child.row_hi):
                child.bound = INF
                continue
            self.load(child)
            child.bound = max(child.bound, self.lp.solve().bound)
            self.lp.set_basis(basis)
        self.lp.limit_iterations(None)
        self.load(node)
        return pair

    def narrow(self, node: Node, result: LpResult) -> None:
        """Drop values whose reduced cost says that they hold nothing better."""
        spare = self.cutoff() - result.bound
        if not math.isfinite(spare) or len(result.duals) != self.lp.num_rows:
            return
        first = self.space.first_branch_row
        last = first + len(node.row_lo)
        rows = result.duals[first:last].copy()
        rows[self.space.extra_rows[0] - first :] = 0.0
        costs = self.lp.reduced_costs(result.duals)
        costs[0] = 0.0
        for low, high, price in ((node.lo, node.hi, costs), (node.row_lo, node.row_hi, rows)):
            at = np.flatnonzero(price > 1e-9)
            high[at] = np.minimum(high[at], low[at] + np.floor(spare / price[at] + 1e-6))
            at = np.flatnonzero(price < -1e-9)
            low[at] = np.maximum(low[at], high[at] + np.ceil(spare / price[at] - 1e-6))

    # shaving -----------------------------------------------------------------------------------------------------

    def shave(self, node: Node, until: float) -> LpResult | None:
        """Cut off ends of the ranges of layers (devices, stages, modes) that hold nothing better.

        Returns the LP of the narrowed node, None if nothing is left or the node is closed.
        """
        space, first = self.space, self.space.first_branch_row
        entries = [
            ("row", row - first) for row in dict.fromkeys(space.device_rows + space.stage_rows + space.mode_rows)
        ]
        changed = True
        result = self.relax(node, ROOT_ROUNDS)
        while changed and time.perf_counter() < until:
            changed = False
            for what, number in entries:
                if not result.feasible or node.bound >= self.cutoff() or time.perf_counter() > until:
                    break
                value = float(space.rows[first + number] @ result.x)
                for up in (True, False):
                    while self._shave_end(node, number, value, up):
                        changed = True
                        result = self.relax(node, NODE_ROUNDS)
                        if not result.feasible or node.bound >= self.cutoff():
                            break
                        value = float(space.rows[first + number] @ result.x)
                    if not result.feasible or node.bound >= self.cutoff():
                        break
        return result

    def _shave_end(self, node: Node, number: int, value: float, up: bool) -> bool:
        """Whether the range of a row could be narrowed: to the value's whole neighbour, or to the one after it."""
        low, high = node.row_lo[number], node.row_hi[number]
        base = math.floor(value + WHOLE) if up else math.ceil(value - WHOLE)
        for step in (1, 2):
            edge = base + step if up else base - step
            if not low <= edge <= high:
                return False
            child = self._copy(node)
            if up:
                child.row_lo[number] = edge
            else:
                child.row_hi[number] = edge
            self._tighten(child, number)
            outcome = self.relax(child, PROBE_ROUNDS)
            if child.bound >= self.cutoff() or outcome.bound == INF:
                if up:
                    node.row_hi[number] = edge - 1
                else:
                    node.row_lo[number] = edge + 1
                self._tighten(node, number)
                return step == 1
        return False

    # the loop ----------------------------------------------------------------------------------------------------

    def run(self, root: Node) -> None:
        """Search until everything is closed or time is up; `lower_bound` tells what is proved."""
        current: Node | None = root
        while current is not None or self.heap:
            if current is None:
                current = heapq.heappop(self.heap)
            if current.bound >= self.cutoff():
                self.closed_bound = min(self.closed_bound, current.bound)
                current = None
                continue
            if time.perf_counter() > self.deadline:
                heapq.heappush(self.heap, current)
                return
            current = self._step(current)

    def _step(self, node: Node) -> Node | None:
        self.nodes += 1
        if node.depth == 0:
            result = self.shave(node, time.perf_counter() + 0.4 * (self.deadline - time.perf_counter()))
        else:
            result = self.relax(node, NODE_ROUNDS)
        if node.bound >= self.cutoff():
            self.closed_bound = min(self.closed_bound, node.bound)
            return None
        if result.bound == INF or np.any(node.lo > node.hi) or np.any(node.row_lo > node.row_hi):
            return None
        if result.feasible:
            self.incumbent.offer_point(self.space, result.x, self.is_whole(result.x), self.nodes)
            self.narrow(node, result)
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
        """What is proved, in the problem's time; inf if there is no assignment that fits."""
        open_bound = min((node.bound for node in self.heap), default=INF)
        return min(open_bound, self.closed_bound) * self.unit


def _serial_time(problem: BalanceProblem) -> float:
    """No schedule takes longer than all ops one after the other."""
    layers = sum(
        group.count * (group.f + group.b + max(mode.extra_b for mode in group.modes)) for group in problem.groups
    )
    blocks = sum(block.f + block.b for block in (problem.embed, problem.head, problem.mtp) if block is not None)
    return problem.m * (layers + blocks + 2 * problem.num_stages * problem.p2p) + 1.0
