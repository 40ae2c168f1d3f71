"""The assignment that needs the least memory on its fullest device, time aside."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.assignment import Assignment, check_assignment
from megatron_telechat.planner.count_program import Space
from megatron_telechat.planner.lp import INF
from megatron_telechat.planner.mip import program
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import peak_bytes


@dataclass(frozen=True)
class LeastMemory:
    """`lacking`: bytes over the limit (negative: to spare) of `assignment`; none lacks less than `at_least`."""

    lacking: float
    at_least: float
    assignment: Assignment | None


def least_memory(problem: BalanceProblem, time_limit_s: float) -> LeastMemory:
    """Minimise the largest peak of a device by a mixed-integer program (HiGHS), and measure its answer."""
    space = Space(replace(problem, rest=()), 1.0)
    least = program(space)
    unit = problem.mem_limit or 1.0
    # column 0: bytes over the limit, in units of it
    least.cost[0], least.lo[0], least.hi[0] = 1.0, -INF, INF
    least.rows[space.memory_rows, 0] = -1.0
    least.row_hi[space.memory_rows] -= problem.mem_limit * 1e-9 / unit
    result = least.minimise(time_limit_s)
    at_least = result.bound * unit
    if result.x is None:
        return LeastMemory(INF, at_least, None)
    x = np.rint(result.x[: space.size])
    assignment = Assignment(space.modes(x), space.place(x))
    try:
        check_assignment(problem, assignment)
    except ConfigError:
        return LeastMemory(INF, at_least, None)
    return LeastMemory(max(peak_bytes(problem, assignment)) - problem.mem_limit, at_least, assignment)
