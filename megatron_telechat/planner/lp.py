"""Linear programs through HiGHS, with bounds that do not depend on its tolerances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

INF = float("inf")


@dataclass
class LpResult:
    """Of one solve. `bound`: safe lower bound of the optimum, -inf if none could be drawn, inf if proved infeasible."""

    feasible: bool
    bound: float
    x: np.ndarray
    duals: np.ndarray


class LinearProgram:
    """min cost.x with bounds on columns and rows; rows and bounds may change, a solve starts from the last basis.

    All columns need finite bounds: then every vector of row duals proves a bound by plain arithmetic
    (Neumaier & Shcherbina, Math. Prog. 99, 2004), whatever the simplex tolerances were.
    """

    def __init__(
        self, cost: np.ndarray, lo: np.ndarray, hi: np.ndarray, rows: np.ndarray, row_lo: np.ndarray, row_hi: np.ndarray
    ):
        import highspy

        self._api = highspy
        self.cost, self.lo, self.hi = cost.copy(), lo.copy(), hi.copy()
        self.rows = np.zeros((64, len(cost)))
        self.row_lo, self.row_hi = np.zeros(64), np.zeros(64)
        self.num_rows = 0
        self._h: Any = highspy.Highs()  # its stubs lack changeRowsBounds and getDualRay
        for option, value in (("output_flag", False), ("presolve", "off"), ("solver", "simplex"), ("threads", 1)):
            self._h.setOptionValue(option, value)
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = len(cost), 0
        model.col_cost_, model.col_lower_, model.col_upper_ = cost, lo, hi
        model.row_lower_, model.row_upper_ = np.zeros(0), np.zeros(0)
        model.a_matrix_.start_ = np.zeros(len(cost) + 1, dtype=np.int32)
        model.a_matrix_.index_, model.a_matrix_.value_ = np.zeros(0, dtype=np.int32), np.zeros(0)
        self._h.passModel(model)
        self.add_rows(rows, row_lo, row_hi)
        self._columns = np.arange(len(cost), dtype=np.int32)

    def add_rows(self, rows: np.ndarray, row_lo: np.ndarray, row_hi: np.ndarray) -> None:
        """Append rows [count, columns] with their bounds."""
        count = len(rows)
        if not count:
            return
        if self.num_rows + count > len(self.rows):
            size = 2 * (self.num_rows + count)
            for name in ("rows", "row_lo", "row_hi"):
                old = getattr(self, name)
                new = np.zeros((size, *old.shape[1:]))
                new[: self.num_rows] = old[: self.num_rows]
                setattr(self, name, new)
        at = slice(self.num_rows, self.num_rows + count)
        self.rows[at], self.row_lo[at], self.row_hi[at] = rows, row_lo, row_hi
        self.num_rows += count
        where = np.nonzero(rows)
        begin = np.searchsorted(where[0], np.arange(count)).astype(np.int32)
        self._h.addRows(count, row_lo, row_hi, len(where[0]), begin, where[1].astype(np.int32), rows[where])

    def delete_rows(self, which: np.ndarray) -> None:
        """Delete rows by number."""
        self._h.deleteRows(len(which), which.astype(np.int32))
        keep = np.setdiff1d(np.arange(self.num_rows), which)
        for name in ("rows", "row_lo", "row_hi"):
            array = getattr(self, name)
            array[: len(keep)] = array[keep]
        self.num_rows = len(keep)

    def set_columns(self, lo: np.ndarray, hi: np.ndarray) -> None:
        """Set the bounds of all columns; only changed ones are passed to HiGHS."""
        changed = np.flatnonzero((lo != self.lo) | (hi != self.hi)).astype(np.int32)
        if len(changed):
            self._h.changeColsBounds(len(changed), changed, lo[changed], hi[changed])
            self.lo[changed], self.hi[changed] = lo[changed], hi[changed]

    def set_rows(self, first: int, lo: np.ndarray, hi: np.ndarray) -> None:
        """Bounds of the rows from `first` on."""
        at = slice(first, first + len(lo))
        changed = np.flatnonzero((lo != self.row_lo[at]) | (hi != self.row_hi[at])).astype(np.int32)
        if len(changed):
            self._h.changeRowsBounds(len(changed), changed + np.int32(first), lo[changed], hi[changed])
            self.row_lo[first + changed], self.row_hi[first + changed] = lo[changed], hi[changed]

    def set_cost(self, cost: np.ndarray) -> None:
        """Set the cost of all columns."""
        self._h.changeColsCost(len(cost), self._columns, cost)
        self.cost = cost.copy()

    def limit_iterations(self, count: int | None) -> None:
        """Stop the simplex after this many iterations; None: no limit."""
        self._h.setOptionValue("simplex_iteration_limit", 2**31 - 1 if count is None else count)

    def basis(self) -> object:
        """The current simplex basis, for set_basis."""
        return self._h.getBasis()

    def set_basis(self, basis: object) -> None:
        """Start the next solve from this basis."""
        self._h.setBasis(basis)

    def solve(self) -> LpResult:
        """Solve; an infeasible program returns a ray as proof, see LpResult."""
        self._h.run()
        status = self._h.getModelStatus()
        kinds = self._api.HighsModelStatus
        if status == kinds.kInfeasible:
            return LpResult(False, self._infeasible(), np.zeros(0), np.zeros(0))
        solution = self._h.getSolution()
        duals = np.array(solution.row_dual)
        if status == kinds.kOptimal:
            return LpResult(True, self.safe_bound(duals, self.cost), np.array(solution.col_value), duals)
        bound = self.safe_bound(duals, self.cost) if len(duals) == self.num_rows and solution.dual_valid else -INF
        return LpResult(False, bound, np.zeros(0), duals)

    def safe_bound(self, duals: np.ndarray, cost: np.ndarray) -> float:
        """Lagrangian bound of any row duals, less an allowance for the rounding of its own sum."""
        duals = self.usable(duals)
        lo, hi = self.row_lo[: self.num_rows], self.row_hi[: self.num_rows]
        side = np.where(duals > 0, lo, hi)
        terms = duals * np.where(duals == 0, 0.0, side)
        reduced = cost - duals @ self.rows[: self.num_rows]
        ends = np.where(reduced > 0, self.lo, self.hi) * reduced
        size = (
            np.abs(terms).sum()
            + np.abs(ends).sum()
            + (np.abs(duals) @ np.abs(self.rows[: self.num_rows])) @ np.maximum(np.abs(self.lo), np.abs(self.hi)) * 1e-3
        )
        return float(terms.sum() + ends.sum() - 1e-13 * size)

    def usable(self, duals: np.ndarray) -> np.ndarray:
        """Duals without those that point at a bound that a row does not have."""
        lo, hi = self.row_lo[: self.num_rows], self.row_hi[: self.num_rows]
        return np.where((duals > 0) & (lo == -INF) | (duals < 0) & (hi == INF), 0.0, duals)

    def _infeasible(self) -> float:
        """inf if the ray of HiGHS proves that there is no point, else -inf."""
        found = self._h.getDualRay()
        if not found[1]:
            return -INF
        ray = np.array(found[2])[: self.num_rows]
        ray = ray / (np.abs(ray).max() or 1.0)
        nothing = np.zeros(len(self.cost))
        return INF if max(self.safe_bound(ray, nothing), self.safe_bound(-ray, nothing)) > 1e-9 else -INF


class RowStore:
    """Rows with low ends, that grow."""

    def __init__(self, size: int):
        self._rows, self._lows, self._count = np.zeros((64, size)), np.zeros(64), 0

    def append(self, row: np.ndarray, low: float) -> None:
        """Add a row [columns] with its lower bound; the storage doubles when it is full."""
        if self._count == len(self._lows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
            self._lows = np.concatenate([self._lows, np.zeros_like(self._lows)])
        self._rows[self._count], self._lows[self._count] = row, low
        self._count += 1

    def rows(self) -> np.ndarray:
        """The rows so far [count, columns], as a view."""
        return self._rows[: self._count]

    def lows(self) -> np.ndarray:
        """The lower bounds so far [count], as a view."""
        return self._lows[: self._count]
