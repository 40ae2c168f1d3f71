"""Mixed-integer programs over the counts of a balance problem, for objectives that are no longest path."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_telechat.planner.count_program import Space
from megatron_telechat.planner.lp import INF


@dataclass(frozen=True)
class MipResult:
    """`x`: the best point found, None if none; `bound`: no point costs less (inf if there is none at all)."""

    x: np.ndarray | None
    bound: float
    optimal: bool


@dataclass(frozen=True)
class Program:
    """min cost.x; columns and rows with bounds. Column 0 is continuous, and so are those from `continuous_from` on."""

    cost: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    rows: np.ndarray
    row_lo: np.ndarray
    row_hi: np.ndarray
    continuous_from: int

    def with_rows(self, rows: np.ndarray, row_lo: np.ndarray, row_hi: np.ndarray) -> Program:
        """The same with more rows."""
        lows, highs = np.concatenate([self.row_lo, row_lo]), np.concatenate([self.row_hi, row_hi])
        return replace(self, rows=np.concatenate([self.rows, rows]), row_lo=lows, row_hi=highs)

    def minimise(self, time_limit_s: float) -> MipResult:
        """Solve by HiGHS on one thread."""
        import highspy

        size = len(self.cost)
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = size, len(self.rows)
        model.col_cost_, model.col_lower_, model.col_upper_ = self.cost, self.lo, self.hi
        model.row_lower_, model.row_upper_ = self.row_lo, self.row_hi
        where = np.nonzero(self.rows)
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.searchsorted(where[0], np.arange(len(self.rows) + 1)).astype(np.int32)
        model.a_matrix_.index_, model.a_matrix_.value_ = where[1].astype(np.int32), self.rows[where]
        kinds = (highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous)
        model.integrality_ = [kinds[at == 0 or at >= self.continuous_from] for at in range(size)]
        solver = highspy.Highs()
        options = {"output_flag": False, "threads": 1, "time_limit": max(time_limit_s, 0.1)}
        for option, value in {**options, "mip_rel_gap": 0.0, "mip_abs_gap": 1e-9, "random_seed": 0}.items():
            solver.setOptionValue(option, value)
        solver.passModel(model)
        solver.run()
        status = solver.getModelStatus()
        if status == highspy.HighsModelStatus.kInfeasible:
            return MipResult(None, INF, True)
        info = solver.getInfo()
        x = np.array(solver.getSolution().col_value)
        found = len(x) == size and info.primal_solution_status != 0
        return MipResult(x if found else None, info.mip_dual_bound, status == highspy.HighsModelStatus.kOptimal)


def program(space: Space, more_columns: int = 0) -> Program:
    """The rules and memory rows of a space, and the order of its groups; no objective yet.

    Columns: those of the space; then for each boundary between groups and each stage, whether layers of the earlier
    groups may be there (later groups may be on a stage only if this does not hold for the next one); then
    `more_columns` continuous ones, at least 0.
    """
    problem, count = space.problem, space.first_branch_row
    C, G = problem.num_stages, len(problem.groups)
    first_more = space.size + (G - 1) * C
    size = first_more + more_columns
    order: list[tuple[dict[int, float], float]] = []
    layers = float(problem.num_layers)
    for g in range(G - 1):
        early = [at for at, kind in enumerate(space.kinds) if kind[0] <= g]
        late = [at for at, kind in enumerate(space.kinds) if kind[0] > g]
        allowed = [int(at) for at in space.size + g * C + np.arange(C)]
        for stage in range(C):
            order.append(({**{int(at): 1.0 for at in space.n[stage, early]}, allowed[stage]: -layers}, 0.0))
            if stage + 1 < C:
                after = allowed[stage + 1]
                order.append(({**{int(at): 1.0 for at in space.n[stage, late]}, after: layers}, layers))
                order.append(({after: 1.0, allowed[stage]: -1.0}, 0.0))
    rows = np.zeros((count + len(order), size))
    rows[:count, : space.size] = space.rows[:count]
    for at, (entries, _) in enumerate(order, count):
        for column, value in entries.items():
            rows[at, column] = value
    lo, hi = np.zeros(size), np.ones(size)
    lo[: space.size], hi[: space.size] = space.lo, space.hi
    hi[first_more:] = INF
    lows = np.concatenate([space.row_lo[:count], np.full(len(order), -INF)])
    highs = np.concatenate([space.row_hi[:count], [high for _, high in order]])
    return Program(np.zeros(size), lo, hi, rows, lows, highs, first_more)
