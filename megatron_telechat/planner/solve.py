"""The exact solver of balance problems."""

from __future__ import annotations

import math
import time

from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.assignment import Assignment, Solution, check_assignment
from megatron_telechat.planner.branch import Tree
from megatron_telechat.planner.incumbent import Incumbent, rounding
from megatron_telechat.planner.least_memory import LeastMemory, least_memory
from megatron_telechat.planner.op_graph import op_graph
from megatron_telechat.planner.problem import BalanceProblem


def solve(
    problem: BalanceProblem, time_limit_s: float = 30.0, warm_start: Assignment | None = None, gap: float = 0.0
) -> Solution:
    """The fastest assignment that fits, with a proof, or the best found in time with what is proved of it.

    Where all times are whole numbers, "optimal" means that nothing is faster; else that nothing is faster by more
    than a 1e-7th part (the solver stops there, and `lower_bound` is what it proved).

    Args:
        time_limit_s: wall time after which the best so far is returned.
        warm_start: an assignment to begin with; it need not fit the memory.
        gap: stop as soon as (makespan - lower bound) / makespan is at most this.

    Raises:
        ConfigError: the schedule of P, V, m cannot run, or the warm start or an option is none.
    """
    if not time_limit_s > 0:
        raise ConfigError(f"a time limit of {time_limit_s} s", fix="more than 0")
    if not 0 <= gap < 1:
        raise ConfigError(f"a gap of {gap}", fix="at least 0 and less than 1, such as 0.01")
    started = time.perf_counter()
    deadline = started + time_limit_s
    graph = op_graph(problem.P, problem.V, problem.m)
    incumbent = Incumbent(problem, deadline)
    if warm_start is not None:
        check_assignment(problem, warm_start, "warm start")
        incumbent.offer(warm_start)
        incumbent.offer_counts(warm_start.counts, warm_start.mtp_stage, 2)
    incumbent.begin()
    least = None
    if incumbent.assignment is None:
        least = least_memory(problem, deadline - time.perf_counter())
        if least.at_least > 1e-6 * problem.mem_limit:
            return _infeasible(problem, least, started)
        if least.assignment is not None:
            incumbent.offer(least.assignment)
            incumbent.offer_counts(least.assignment.counts, least.assignment.mtp_stage, 2)
    tree = Tree(problem, graph, incumbent, deadline, gap)
    tree.run(tree.root_node())
    if incumbent.assignment is None and not tree.heap:
        return _infeasible(problem, least, started)
    return _solution(problem, incumbent, tree, time.perf_counter() - started)


def _solution(problem: BalanceProblem, incumbent: Incumbent, tree: Tree, seconds: float) -> Solution:
    bound = tree.lower_bound()
    if problem.integral and math.isfinite(bound):
        bound = float(math.ceil(bound - rounding(bound)))
    if incumbent.assignment is None or incumbent.result is None:
        return Solution(
            "feasible", lower_bound=bound, seconds=seconds, reason="no assignment that fits was found in time"
        )
    best = incumbent.makespan
    bound = max(min(bound, best), 0.0)
    proved = bound >= best if problem.integral else bound >= incumbent.cutoff(best) * (1 - 1e-9)
    return Solution(
        status="optimal" if proved else "feasible",
        makespan=best,
        lower_bound=bound,
        gap=(best - bound) / best if best else 0.0,
        assignment=incumbent.assignment,
        peak_bytes=incumbent.result.peak_bytes,
        seconds=seconds,
        nodes=tree.nodes,
    )


def _infeasible(problem: BalanceProblem, least: LeastMemory | None, started: float) -> Solution:
    seconds = time.perf_counter() - started
    if least is None or least.assignment is None and math.isinf(least.at_least):
        if not problem.mtp_places():
            return Solution(
                "infeasible", seconds=seconds, reason="the MTP block has no place: there is one virtual stage"
            )
        return Solution("infeasible", seconds=seconds, reason="the stages need more layers than there are")
    shortfall = least.at_least if least.assignment is None else least.lacking
    return Solution("infeasible", seconds=seconds, shortfall=shortfall, reason="no assignment fits the memory limit")
