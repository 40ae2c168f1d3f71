"""Rows that every whole plan of one device satisfies, and a fractional one does not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

from megatron_telechat.planner.count_program import Space
from megatron_telechat.planner.lp import INF, LinearProgram
from megatron_telechat.planner.simulate import in_flight

MOST_POINTS = 150_000
"""Whole plans of a device that are listed; a device with more gets no rows."""
DEEP = 1e-4
"""How far (in layers) a point has to be outside for a row to be worth it."""
MOST_ROUNDS = 300


class DeviceHull:
    """The whole plans of a device, points [count, stages x kinds], and the rows that separate others from their hull.

    A row is sought by a linear program over few of the points: the one that is most violated at `x`, with coefficients
    between -1 and 1. The points that break it join the program until there is none; its side is then the largest value
    over all points, so that it holds for each of them whatever the tolerances of the program were.
    """

    def __init__(self, columns: np.ndarray, points: np.ndarray):
        self.columns, self.points = columns, points
        size = len(columns)
        most = size * (float(np.abs(points).max()) + 1)
        ends = np.append(np.ones(size), most)
        nothing = np.zeros((0, size + 1))
        self._lp = LinearProgram(np.zeros(size + 1), -ends, ends, nothing, np.zeros(0), np.zeros(0))

    def separate(self, x: np.ndarray) -> tuple[np.ndarray, float] | None:
        """(coefficients of the device's columns, least): no point is below `least`, and `x` (of all columns) is."""
        here = x[self.columns]
        self._lp.set_cost(np.append(here, -1.0))
        if not self._lp.num_rows:
            self._add(np.argsort(np.abs(self.points - here).sum(axis=1), kind="stable")[: 2 * len(here)])
        for _ in range(MOST_ROUNDS):
            found = self._lp.solve()
            if not found.feasible or found.x @ self._lp.cost > -DEEP:
                return None
            row = found.x[:-1]
            values = self.points @ row
            lowest = int(np.argmin(values))
            least = float(values[lowest])
            if least > found.x[-1] - DEEP / 10:
                return (row, least - 1e-9 * (1 + abs(least))) if row @ here < least - DEEP / 2 else None
            self._add(np.array([lowest]))
        return None

    def _add(self, which: np.ndarray) -> None:
        rows = np.concatenate([self.points[which], -np.ones((len(which), 1))], axis=1)
        self._lp.add_rows(rows, np.zeros(len(rows)), np.full(len(rows), INF))


def device_hulls(
    space: Space, lo: np.ndarray, hi: np.ndarray, range_of: Callable[[int], tuple[float, float]], most_work: float
) -> list[DeviceHull]:
    """Of the devices with few enough whole plans; of none where an MTP block may move.

    Args:
        lo, hi: ranges of the columns.
        range_of: the range of a row of the space, by its number.
        most_work: seconds that a device may be busy for one micro-batch.
    """
    if space.loose or space.y:
        return []
    hulls = []
    for device in range(space.problem.P):
        points = _points(space, device, lo, hi, range_of, most_work)
        if points is not None and len(points):
            hulls.append(DeviceHull(space.n[device :: space.problem.P].ravel(), points))
    return hulls


def _points(
    space: Space, device: int, lo: np.ndarray, hi: np.ndarray, range_of: Callable[[int], tuple[float, float]],
    most_work: float,
) -> np.ndarray | None:  # fmt: skip
    """All whole counts of a device in these ranges that fit; None if they are too many to list."""
    problem, C = space.problem, space.problem.num_stages
    stages = range(device, C, problem.P)
    fewest = problem.fewest_layers(None)
    work = np.array([space.times[stage, space.n[stage]] + space.times[C + stage, space.n[stage]] for stage in stages])
    spare = most_work / space.time_unit - sum(
        space.fixed_times[stage] + space.fixed_times[C + stage] for stage in stages
    )
    limit = range_of(space.device_rows[device])[1]
    if work.min() > 0 and math.isfinite(spare):
        limit = min(limit, spare * (1 + 1e-9) // work.min())
    if limit < 0:
        return None
    table = np.zeros((1, 0))
    busy, total = np.zeros(1), np.zeros(1)
    for at, stage in enumerate(stages):
        low, high = range_of(space.stage_rows[stage])
        low, high = max(low, fewest[stage]), min(high, limit)
        ranges = [range(int(lo[column]), int(min(hi[column], high)) + 1) for column in space.n[stage]]
        if np.prod([float(len(one)) for one in ranges]) > MOST_POINTS:
            return None
        own = np.array([one for one in itertools.product(*ranges) if low <= sum(one) <= high], dtype=float)
        if not len(own) or len(own) * len(table) > 6 * MOST_POINTS:
            return None
        later = sum(max(range_of(space.stage_rows[one])[0], fewest[one]) for one in stages[at + 1 :])
        total = (total[:, None] + own.sum(axis=1)).ravel()
        busy = (busy[:, None] + own @ work[at]).ravel()
        keep = np.flatnonzero((total + later <= limit) & (busy <= spare * (1 + 1e-9)))
        table = np.concatenate([table[keep // len(own)], own[keep % len(own)]], axis=1)
        total, busy = total[keep], busy[keep]
    table = table[total >= range_of(space.device_rows[device])[0]]
    table = table[_fits(space, device, table)]
    return table if len(table) <= MOST_POINTS else None


def _fits(space: Space, device: int, table: np.ndarray) -> np.ndarray:
    """Which counts [count, stages x kinds] of a device fit the memory."""
    problem = space.problem
    modes = [problem.groups[g].modes[j] for g, j in space.kinds]
    counts = table.reshape(len(table), problem.V, len(modes))
    blocks = [problem.fixed_block(stage, None) for stage in range(device, problem.num_stages, problem.P)]
    weights = counts.sum(axis=1) @ [problem.groups[g].w for g, _ in space.kinds]
    act = counts @ [mode.act for mode in modes] + [block.act for block in blocks]
    transient = np.maximum(((counts > 0) * [mode.ws for mode in modes]).max(axis=2), [block.ws for block in blocks])
    spare = problem.mem_limit * (1 + 1e-9) - problem.const_mem - sum(block.w for block in blocks)
    fits = np.ones(len(table), dtype=bool)
    for moment in in_flight(*problem.schedule)[device]:
        used = weights + act @ np.array(moment.held, dtype=float)
        if moment.backward is not None:
            used = used + transient[:, moment.backward]
        fits &= used <= spare
    return fits
