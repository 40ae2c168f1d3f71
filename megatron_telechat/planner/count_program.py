"""The balance problem as a linear program over counts: columns, rows, and what branch and bound may narrow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megatron_telechat.planner.lp import INF
from megatron_telechat.planner.path_cuts import PathCut
from megatron_telechat.planner.problem import BalanceProblem, LayerGroup
from megatron_telechat.planner.rest import most_seconds
from megatron_telechat.planner.simulate import in_flight


class Space:
    """Columns: the makespan M; n[c, k], layers of kind k (a group in a mode) on stage c; y[c], the MTP block is on
    stage c; z[c, l], a layer or block of stage c has a working set of at least level l; and the seconds of each entry
    of the problem's `rest`, which are no counts.

    Times are in units of `time_unit`, bytes in units of the memory limit.

    Attributes:
        memory_rows, memory_devices: the rows of memory, and the device of each.
        rows, row_lo, row_hi: the rules; from `first_branch_row` on, sums that may be branched on: layers of each
            device, layers of each stage, layers of each device in each mode but 0.
        times, fixed_times: stage times = fixed_times + times @ x, forward then backward.
        counts_end: columns 1 to here are counts.
    """

    def __init__(self, problem: BalanceProblem, longest: float):
        self.problem = problem
        self.loose = memory_is_loose(problem)
        self.kinds = [
            (g, j)
            for g, group in enumerate(problem.groups)
            for j in ([fastest_mode(group)] if self.loose else range(len(group.modes)))
        ]
        C, K = problem.num_stages, len(self.kinds)
        self.places = [place for place in problem.mtp_places() if place is not None]
        used = {group.modes[j].ws for group in problem.groups for j in range(len(group.modes))}
        used |= {block.ws for block in problem.blocks}
        self.levels = [] if self.loose else sorted(used - {0})
        self.n = 1 + np.arange(C * K).reshape(C, K)
        self.y = {place: 1 + C * K + at for at, place in enumerate(self.places)}
        first_z = 1 + C * K + len(self.places)
        self.z = first_z + np.arange(C * len(self.levels)).reshape(C, len(self.levels))
        self.counts_end = first_z + C * len(self.levels)
        self.size = self.counts_end + len(problem.rest)
        total = max(group.f + group.b for group in problem.groups)
        self.time_unit = float(total or max(problem.head.f + problem.head.b, 1.0))
        self.lo, self.hi = np.zeros(self.size), np.ones(self.size)
        most = most_seconds(problem) / self.time_unit
        self.hi[0] = longest / self.time_unit + most
        self.lo[self.counts_end :], self.hi[self.counts_end :] = -most, most
        for at, (g, _) in enumerate(self.kinds):
            self.hi[self.n[:, at]] = problem.groups[g].count
        self._times()
        self._rows: list[tuple[np.ndarray, float, float]] = []
        self._rules()
        self._rest()
        self._memory()
        self.first_branch_row = len(self._rows)
        self._branch_rows()
        self.rows = np.array([row for row, _, _ in self._rows])
        self.row_lo = np.array([low for _, low, _ in self._rows])
        self.row_hi = np.array([high for _, _, high in self._rows])
        self.cost = np.zeros(self.size)
        self.cost[0] = 1.0

    def _times(self) -> None:
        problem, C = self.problem, self.problem.num_stages
        self.times, self.fixed_times = np.zeros((2 * C, self.size)), np.zeros(2 * C)
        for stage in range(C):
            block = problem.fixed_block(stage, None)
            self.fixed_times[[stage, C + stage]] = block.f, block.b
            for at, (g, j) in enumerate(self.kinds):
                group = problem.groups[g]
                self.times[stage, self.n[stage, at]] = group.f
                self.times[C + stage, self.n[stage, at]] = group.b + group.modes[j].extra_b
        if (mtp := problem.mtp) is not None:
            for place, column in self.y.items():
                self.times[place, column], self.times[C + place, column] = mtp.f, mtp.b
        self.times /= self.time_unit
        self.fixed_times /= self.time_unit
        self.p2p = problem.p2p / self.time_unit

    def _row(self, entries: dict[int, float], low: float, high: float) -> int:
        row = np.zeros(self.size)
        for column, value in entries.items():
            row[column] += value
        self._rows.append((row, low, high))
        return len(self._rows) - 1

    def _rules(self) -> None:
        problem, C = self.problem, self.problem.num_stages
        for g, group in enumerate(problem.groups):
            columns = [at for at, kind in enumerate(self.kinds) if kind[0] == g]
            self._row({int(c): 1.0 for c in self.n[:, columns].ravel()}, group.count, group.count)
        fewest = problem.fewest_layers(None)
        for stage in range(C):
            layers = {int(c): 1.0 for c in self.n[stage]}
            before = {column: 1.0 for place, column in self.y.items() if place < stage}
            up_to = {column: 1.0 for place, column in self.y.items() if place <= stage}
            if fewest[stage]:
                self._row({**layers, **{column: float(fewest[stage]) for column in up_to}}, fewest[stage], INF)
            if before:
                most = float(problem.num_layers)
                self._row({**layers, **{column: most for column in before}}, -INF, most)
        if self.y:
            self._row({column: 1.0 for column in self.y.values()}, 1.0, 1.0)

    def _rest(self) -> None:
        problem, C = self.problem, self.problem.num_stages
        for column, costs in enumerate(problem.rest, self.counts_end):
            for cost in costs:
                for device in range(problem.P):
                    stages = np.arange(device, C, problem.P)
                    row = -cost.forward * self.times[stages].sum(axis=0)
                    row -= cost.backward * self.times[C + stages].sum(axis=0)
                    for at, (g, _) in enumerate(self.kinds):
                        row[self.n[stages, at]] -= cost.layers[g] / self.time_unit
                    row[column] = 1.0
                    fixed = cost.forward * self.fixed_times[stages].sum()
                    fixed += cost.backward * self.fixed_times[C + stages].sum()
                    fixed += (
                        cost.constant + cost.embed * (device == 0) + cost.head * (device == problem.P - 1)
                    ) / self.time_unit
                    self._rows.append((row, float(fixed), INF))

    def _memory(self) -> None:
        problem, unit = self.problem, self.problem.mem_limit or 1.0
        self.memory_rows: list[int] = []
        self.memory_devices: list[int] = []
        if self.loose:
            return
        for device, moments in enumerate(in_flight(*problem.schedule)):
            stages = range(device, problem.num_stages, problem.P)
            for moment in moments:
                entries: dict[int, float] = {}
                used = problem.const_mem
                for virtual_stage, stage in enumerate(stages):
                    held, block = moment.held[virtual_stage], problem.fixed_block(stage, None)
                    used += block.w + held * block.act
                    for at, (g, j) in enumerate(self.kinds):
                        group = problem.groups[g]
                        entries[int(self.n[stage, at])] = (group.w + held * group.modes[j].act) / unit
                    if (mtp := problem.mtp) is not None and stage in self.y:
                        entries[self.y[stage]] = (mtp.w + held * mtp.act) / unit
                if moment.backward is not None:
                    below = 0.0
                    for at, level in enumerate(self.levels):
                        entries[int(self.z[stages[moment.backward], at])] = (level - below) / unit
                        below = level
                self.memory_devices.append(device)
                self.memory_rows.append(self._row(entries, -INF, (problem.mem_limit * (1 + 1e-9) - used) / unit))
        least = min(mode.ws for group in problem.groups for mode in group.modes)
        holds_layers = [count > 0 and not self.y for count in problem.fewest_layers(None)]
        for stage in range(problem.num_stages):
            for at, level in enumerate(self.levels):
                if level <= max(problem.fixed_block(stage, None).ws, least if holds_layers[stage] else 0.0):
                    self.lo[self.z[stage, at]] = 1.0
                if stage in self.y and problem.mtp is not None and level <= problem.mtp.ws:
                    self._row({self.y[stage]: 1.0, int(self.z[stage, at]): -1.0}, -INF, 0.0)
                high = [kind for kind, (g, j) in enumerate(self.kinds) if problem.groups[g].modes[j].ws >= level]
                most = min(sum(group.count for group in problem.groups), problem.num_layers)
                self._row(
                    {**{int(self.n[stage, kind]): 1.0 for kind in high}, int(self.z[stage, at]): -float(most)},
                    -INF,
                    0.0,
                )

    def _branch_rows(self) -> None:
        problem, layers = self.problem, self.problem.num_layers
        by_device = [self.n[device :: problem.P] for device in range(problem.P)]
        self.device_rows = [self._row({int(c): 1.0 for c in one.ravel()}, 0, layers) for one in by_device]
        self.stage_rows = [self._row({int(c): 1.0 for c in one}, 0, layers) for one in self.n]
        self.mode_rows: list[int] = []
        for mode in range(1, max(len(group.modes) for group in problem.groups)):
            kinds = [at for at, (_, j) in enumerate(self.kinds) if j == mode]
            self.mode_rows += [self._row({int(c): 1.0 for c in one[:, kinds].ravel()}, 0, layers) for one in by_device]

    def cut_row(self, cut: PathCut) -> tuple[np.ndarray, float]:
        """(row, low) with row @ x >= low for every assignment x."""
        visits = np.array(cut.visits, dtype=float)
        row = -(visits @ self.times)
        row[0] = 1.0
        row[self.counts_end :] = -1.0
        return row, math.fsum([cut.lags * self.p2p, *(visits * self.fixed_times)])

    def stage_times(self, x: np.ndarray) -> np.ndarray:
        """Forward and backward times of each virtual stage at a point of the LP, in units of the program."""
        return self.fixed_times + self.times @ x

    def rest(self, x: np.ndarray) -> float:
        """Seconds beside the pipeline at a point of the LP, in units of the program."""
        return float(x[self.counts_end :].sum())

    def counts(self, x: np.ndarray) -> np.ndarray:
        """Layers of each stage."""
        return x[self.n].sum(axis=1)

    def place(self, x: np.ndarray) -> int | None:
        """Virtual stage that holds the MTP block at this point (the largest part of it); None without one."""
        return max(self.y, key=lambda place: x[self.y[place]]) if self.y else None

    def modes(self, x: np.ndarray) -> tuple[tuple[int, ...], ...]:
        """Modes of the layers at a whole point."""
        counts: Sequence[Sequence[int]] = np.rint(x[self.n]).astype(int).tolist()
        return tuple(tuple(self.kinds[at][1] for at, count in enumerate(row) for _ in range(count)) for row in counts)


def fastest_mode(group: LayerGroup) -> int:
    """The first of the modes with the shortest backward."""
    return min(range(len(group.modes)), key=lambda mode: group.modes[mode].extra_b)


def memory_is_loose(problem: BalanceProblem) -> bool:
    """Whether even a device with all layers in their fastest mode, and all blocks, fits."""
    most = max(sum(moment.held) for moments in in_flight(*problem.schedule) for moment in moments)
    used, transient = float(problem.const_mem), 0.0
    for group in problem.groups:
        mode = group.modes[fastest_mode(group)]
        used += group.count * (group.w + most * mode.act)
        transient = max(transient, mode.ws)
    for block in problem.blocks:
        used += block.w + most * block.act
        transient = max(transient, block.ws)
    return used + transient <= problem.mem_limit
