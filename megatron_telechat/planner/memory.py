"""The assignment that needs the least memory on its fullest device, time aside."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.lp import INF
from megatron_telechat.planner.plan import Assignment, check_assignment
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import peak_bytes
from megatron_telechat.planner.space import Space


@dataclass(frozen=True)
class LeastMemory:
    """`lacking`: bytes over the limit (negative: to spare) of `assignment`; none lacks less than `at_least`."""

    lacking: float
    at_least: float
    assignment: Assignment | None


def least_memory(problem: BalanceProblem, time_limit_s: float) -> LeastMemory:
    """Minimise the largest peak of a device by a mixed-integer program (HiGHS), and measure its answer."""
    import highspy

    space = Space(problem, 1.0)
    rows, lows, highs, size = _rows(space)
    integer = np.arange(size) > 0
    lo, hi = np.zeros(size), np.ones(size)
    lo[: space.size], hi[: space.size] = space.lo, space.hi
    lo[0], hi[0] = -INF, INF
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = size, len(rows)
    cost = np.zeros(size)
    cost[0] = 1.0
    model.col_cost_, model.col_lower_, model.col_upper_ = cost, lo, hi
    model.row_lower_, model.row_upper_ = lows, highs
    where = np.nonzero(rows)
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.searchsorted(where[0], np.arange(len(rows) + 1)).astype(np.int32)
    model.a_matrix_.index_, model.a_matrix_.value_ = where[1].astype(np.int32), rows[where]
    kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
    model.integrality_ = [kinds[int(one)] for one in integer]
    solver = highspy.Highs()
    options = {"output_flag": False, "threads": 1, "time_limit": max(time_limit_s, 0.1)}
    for option, value in {**options, "mip_rel_gap": 0.0, "mip_abs_gap": 1e-9, "random_seed": 0}.items():
        solver.setOptionValue(option, value)
    solver.passModel(model)
    solver.run()
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return LeastMemory(INF, INF, None)
    info = solver.getInfo()
    unit = problem.mem_limit or 1.0
    x = np.array(solver.getSolution().col_value)
    at_least = info.mip_dual_bound * unit
    if len(x) != size or info.primal_solution_status == 0:
        return LeastMemory(INF, at_least, None)
    x = np.rint(x[: space.size])
    assignment = Assignment(space.modes(x), space.place(x))
    try:
        check_assignment(problem, assignment)
    except ConfigError:
        return LeastMemory(INF, at_least, None)
    return LeastMemory(max(peak_bytes(problem, assignment)) - problem.mem_limit, at_least, assignment)


def _rows(space: Space) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The rules and memory rows of the space, column 0 now being the bytes over the limit, and where groups end.

    One more column for each boundary between groups and each stage: whether layers of the earlier groups may be there;
    later groups may be on the stages before whose next one this does not hold.
    """
    problem, count = space.problem, space.first_branch_row
    C, G = problem.num_stages, len(problem.groups)
    size = space.size + (G - 1) * C
    rows = np.zeros((count, size))
    rows[:, : space.size] = space.rows[:count]
    lows, highs = list(space.row_lo[:count]), list(space.row_hi[:count])
    rows[space.memory_rows, 0] = -1.0
    for row in space.memory_rows:
        highs[row] -= problem.mem_limit * 1e-9 / (problem.mem_limit or 1.0)
    more = []
    layers = problem.num_layers
    for g in range(G - 1):
        early = [at for at, kind in enumerate(space.kinds) if kind[0] <= g]
        late = [at for at, kind in enumerate(space.kinds) if kind[0] > g]
        allowed = space.size + g * C + np.arange(C)
        for stage in range(C):
            row = np.zeros(size)
            row[space.n[stage, early]] = 1.0
            row[allowed[stage]] = -layers
            more.append((row, 0.0))
            if stage + 1 < C:
                row = np.zeros(size)
                row[space.n[stage, late]] = 1.0
                row[allowed[stage + 1]] = layers
                more.append((row, float(layers)))
                row = np.zeros(size)
                row[allowed[stage + 1]], row[allowed[stage]] = 1.0, -1.0
                more.append((row, 0.0))
    if more:
        rows = np.concatenate([rows, np.array([row for row, _ in more])])
    return rows, np.array(lows + [-INF] * len(more)), np.array(highs + [high for _, high in more]), size
