"""The LP of a box of branch and bound: path cuts separated at fractional points, and bounds that are safe."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from megatron_telechat.planner.budget import Budget
from megatron_telechat.planner.count_program import Space
from megatron_telechat.planner.device_hull import DeviceHull, device_hulls
from megatron_telechat.planner.incumbent import Incumbent
from megatron_telechat.planner.lp import INF, LinearProgram, LpResult, RowStore
from megatron_telechat.planner.op_graph import OpGraph
from megatron_telechat.planner.path_cuts import PathCut, Separator
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.rest import least_seconds
from megatron_telechat.planner.slow_stage import time_factors

WHOLE = 1e-6
"""A value this near to an integer is one."""

ROOT_ROUNDS, NODE_ROUNDS, PROBE_ROUNDS = 400, 30, 10
MORE_ROUNDS = 300
"""Rounds of cuts at the root, at a node, in a trial; and more of them while the point is whole."""

STALL = 0.03
"""Part of the distance to the cutoff that four rounds of path cuts have to gain."""
WORTH = 2e-3
"""Part of the distance to the cutoff that a round of rows of device plans has to gain."""
MEMORY_TOLERANCE = 1e-6
"""Layers by which a point may exceed a memory row: more than the tolerance of HiGHS, so that no row comes twice."""
POOL_CUTS = 20
"""Cuts of the pool that join the LP in a round: the most violated ones."""
MAX_CUTS = 300
"""Rows of cuts that the LP keeps; slack ones go first. Every cut ever found stays in the pool. With half as many and 32
virtual stages, cuts that are needed come and go."""


MetRow = PathCut | tuple[np.ndarray, float]
"""A row that every assignment satisfies: of a path, or (coefficients, low) of the plans of a device."""


@dataclass(order=True)
class Node:
    """A box: bounds of the columns and of the branching rows. `bound` holds for all in it (LP time units)."""

    bound: float
    number: int
    depth: int = field(compare=False)
    lo: np.ndarray = field(compare=False)
    hi: np.ndarray = field(compare=False)
    row_lo: np.ndarray = field(compare=False)
    row_hi: np.ndarray = field(compare=False)

    @property
    def empty(self) -> bool:
        """Whether a range of the box is empty."""
        return bool(np.any(self.lo > self.hi) or np.any(self.row_lo > self.row_hi))

    def child(self, number: int) -> Node:
        """The same box, to be narrowed."""
        bounds = (bound.copy() for bound in (self.lo, self.hi, self.row_lo, self.row_hi))
        return Node(self.bound, number, self.depth + 1, *bounds)


class Relaxation:
    """One LP for all boxes: loading a box changes bounds only, and every cut holds in every box.

    Of the memory rows, hundreds with virtual stages, few ever bind: they join the LP when a point violates them.
    """

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
        self.problem, self.incumbent, self.budget, self.gap, self.limit = problem, incumbent, budget, gap, limit
        self.space = space = Space(problem, _serial_time(problem))
        self.unit = space.time_unit
        self.separator = Separator(graph, space.p2p, time_factors(problem))
        fixed = np.setdiff1d(np.arange(len(space.rows)), space.memory_rows)
        self.lp = LinearProgram(
            space.cost, space.lo, space.hi, space.rows[fixed], space.row_lo[fixed], space.row_hi[fixed]
        )
        self.first_branch_row = space.first_branch_row - len(space.memory_rows)
        self.pool: dict[PathCut, None] = {}
        self.pool_rows = RowStore(space.size)
        self.met: list[MetRow] = []
        self.num_fixed_rows = self.lp.num_rows
        memory = space.rows[space.memory_rows]
        scale = np.abs(memory).max(axis=1, initial=0.0)
        scale[scale == 0] = 1.0
        self.memory_rows, self.memory_highs = memory / scale[:, None], space.row_hi[space.memory_rows] / scale
        self.memory_devices = np.array(space.memory_devices, dtype=int)
        self.hulls: list[DeviceHull] = []
        self.keep(cuts)

    def keep(self, rows: Iterable[MetRow]) -> None:
        """Put rows in the pool, in the order in which they were met; a path that is there is left out."""
        for met in rows:
            if isinstance(met, PathCut):
                if met in self.pool:
                    continue
                self.pool[met] = None
            self.pool_rows.append(*(self.space.cut_row(met) if isinstance(met, PathCut) else met))
            self.met.append(met)

    def cutoff(self) -> float:
        """A node whose bound is at least this holds nothing better, or nothing below the limit (LP time units)."""
        best = self.incumbent.makespan
        if not math.isfinite(best):
            return self.limit / self.unit
        nothing_better = self.incumbent.cutoff(best)
        if self.gap > 0:
            nothing_better = min(nothing_better, best * (1 - self.gap))
        return min(nothing_better, self.limit) / self.unit

    def load(self, node: Node) -> None:
        """Set the LP to the bounds of this box."""
        self.lp.set_columns(node.lo, node.hi)
        self.lp.set_rows(self.first_branch_row, node.row_lo, node.row_hi)

    def add_cuts(self, cuts: list[PathCut], x: np.ndarray, above: float) -> int:
        """Add the cuts that `x` violates; returns how many."""
        rows, lows = [], []
        for cut in dict.fromkeys(cuts):
            row, low = self.space.cut_row(cut)
            if row @ x < low - above:
                rows.append(row)
                lows.append(low)
                self.keep([cut])
        if rows:
            self.lp.add_rows(np.array(rows), np.array(lows), np.full(len(rows), INF))
        return len(rows)

    def add_from_pool(self, x: np.ndarray, above: float) -> int:
        """Add the few cuts of the pool that `x` violates most; returns how many."""
        rows, lows = self.pool_rows.rows(), self.pool_rows.lows()
        short = lows - rows @ x
        worst = np.flatnonzero(short > above)
        worst = worst[np.argsort(-short[worst], kind="stable")[:POOL_CUTS]]
        if len(worst):
            self.lp.add_rows(rows[worst], lows[worst], np.full(len(worst), INF))
        return len(worst)

    def add_memory(self, x: np.ndarray) -> int:
        """Add of each device the memory row that `x` violates most; returns how many."""
        over = self.memory_rows @ x - self.memory_highs
        where = np.flatnonzero(over > MEMORY_TOLERANCE)
        if len(where):
            where = where[np.argsort(-over[where], kind="stable")]
            where = where[np.unique(self.memory_devices[where], return_index=True)[1]]
            self.lp.add_rows(self.memory_rows[where], np.full(len(where), -INF), self.memory_highs[where])
        return len(where)

    def add_hull_rows(self, x: np.ndarray) -> int:
        """Add of each device a row that its whole plans satisfy and `x` does not; returns how many."""
        found = [(hull, cut) for hull in self.hulls if (cut := hull.separate(x)) is not None]
        for hull, (values, least) in found:
            row = np.zeros(self.space.size)
            row[hull.columns] = values
            self.keep([(row, least)])
            self.lp.add_rows(row[None], np.array([least]), np.array([INF]))
        return len(found)

    def relax(self, node: Node, rounds: int) -> LpResult:
        """Solve the LP of a node with as many cuts as pay off. The result's bound is safe; node.bound is raised.

        Cuts are taken at the LP point, and half way to the best point met so far (in-out separation), which makes
        the bound rise in half the rounds.
        """
        if node.empty:
            node.bound = INF
            return LpResult(False, INF, node.lo, node.lo)
        self.load(node)
        gains: list[float] = []
        center, least, memory_rounds = None, INF, 0
        while True:
            result = self.lp.solve()
            self.budget.work += 1
            node.bound = max(node.bound, result.bound)
            if not result.feasible or node.bound >= self.cutoff() or self.budget.over():
                return result
            x = result.x
            if memory_rounds < rounds and self.add_memory(x):
                memory_rounds += 1
                continue
            tolerance = 1e-9 * max(1.0, x[0])
            gains.append(result.bound)
            missing = self.cutoff() - gains[-1]
            worth = max(1e-5 * abs(gains[-1]), STALL * missing if math.isfinite(missing) else 0.0)
            stalled = len(gains) > rounds or len(gains) > 4 and gains[-1] - gains[-5] < worth
            if stalled and not self.is_whole(x) or len(gains) > rounds + MORE_ROUNDS:
                return result
            self.trim(x, result.duals)
            if self.add_from_pool(x, 1e-5 * abs(x[0])):
                continue
            added = 0
            if center is not None:
                middle = (x + center) / 2
                span, cuts = self.separator.longest(self.space.stage_times(middle).tolist())
                added = self.add_cuts(cuts, x, tolerance / 2)
                if span + self.space.rest(middle) < least:
                    center, least = middle, span + self.space.rest(middle)
            if not added:
                span, cuts = self.separator.longest(self.space.stage_times(x).tolist())
                span += self.space.rest(x)
                if span < least:
                    center, least = x, span
                if span <= x[0] + tolerance or not self.add_cuts(cuts, x, tolerance / 2):
                    return result

    def tighten(self, node: Node, result: LpResult) -> LpResult:
        """At a root: narrow it, list the whole plans of each device, and add rows of them as long as that pays off.

        `result` is of the node's LP, and what comes back too.
        """
        if not result.feasible or node.bound >= self.cutoff():
            return result
        self.narrow(node, result.duals)
        self.list_plans(node)
        while result.feasible and node.bound < self.cutoff() and not self.budget.over():
            before = node.bound
            if not self.add_hull_rows(result.x):
                break
            result = self.relax(node, ROOT_ROUNDS)
            if node.bound - before < WORTH * (self.cutoff() - before):
                break
        return result

    def list_plans(self, node: Node) -> None:
        """List the whole plans of each device in a box, for `add_hull_rows` in any box inside of it."""
        rest = least_seconds(self.problem) if self.problem.rest else 0.0
        busy = (self.cutoff() * self.unit - rest) / self.problem.m
        first = self.space.first_branch_row
        self.hulls = device_hulls(
            self.space, node.lo, node.hi, lambda row: (node.row_lo[row - first], node.row_hi[row - first]), busy
        )

    def trim(self, x: np.ndarray, duals: np.ndarray) -> None:
        """Throw slack rows out of the LP when there are many; cuts stay in the pool."""
        first = self.num_fixed_rows
        if len(duals) != self.lp.num_rows or self.lp.num_rows - first <= MAX_CUTS:
            return
        at = slice(first, self.lp.num_rows)
        values = self.lp.rows[at] @ x
        inside = np.minimum(values - self.lp.row_lo[at], self.lp.row_hi[at] - values)
        self.lp.delete_rows(np.flatnonzero((np.abs(duals[first:]) < 1e-12) & (inside > 1e-7)) + first)

    def is_whole(self, x: np.ndarray) -> bool:
        """Whether all counts of the point are integers up to the tolerance WHOLE."""
        counts = x[1 : self.space.counts_end]
        return bool(np.all(np.abs(counts - np.rint(counts)) < WHOLE))

    def narrow(self, node: Node, duals: np.ndarray) -> None:
        """Drop values whose reduced cost says that they hold nothing better; any duals do, so these need not be new."""
        self.load(node)
        if len(duals) != self.lp.num_rows:
            return
        duals = self.lp.usable(duals)
        spare = self.cutoff() - self.lp.safe_bound(duals, self.lp.cost)
        if not math.isfinite(spare) or spare <= 0:
            return
        first = self.first_branch_row
        rows = duals[first : first + len(node.row_lo)]
        costs = self.lp.cost - duals @ self.lp.rows[: self.lp.num_rows]
        costs[0] = costs[self.space.counts_end :] = 0.0
        for low, high, price in ((node.lo, node.hi, costs), (node.row_lo, node.row_hi, rows)):
            at = np.flatnonzero(price > 1e-9)
            high[at] = np.minimum(high[at], low[at] + np.floor(spare / price[at] + 1e-6))
            at = np.flatnonzero(price < -1e-9)
            low[at] = np.maximum(low[at], high[at] + np.ceil(spare / price[at] - 1e-6))


def _serial_time(problem: BalanceProblem) -> float:
    """No schedule takes longer than all ops one after the other."""
    layers = sum(
        group.count * (group.f + group.b + max(mode.extra_b for mode in group.modes)) for group in problem.groups
    )
    blocks = sum(block.f + block.b for block in problem.blocks)
    return problem.m * (1 + problem.slow_stage) * (layers + blocks + 2 * problem.num_stages * problem.p2p) + 1.0
