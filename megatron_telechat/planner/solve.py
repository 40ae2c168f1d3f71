"""The exact solver of balance problems."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.assignment import Assignment, Solution, check_assignment
from megatron_telechat.planner.branch import Tree
from megatron_telechat.planner.budget import Budget
from megatron_telechat.planner.incumbent import Incumbent, rounding
from megatron_telechat.planner.least_memory import LeastMemory, least_memory
from megatron_telechat.planner.lp import INF
from megatron_telechat.planner.op_graph import op_graph
from megatron_telechat.planner.path_cuts import PathCut
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.relaxation import ROOT_ROUNDS
from megatron_telechat.planner.team import WAIT_S, Team

ROUNDING = 1e-9
"""Relative error of sums and products of a bound."""


def reaches(bound: float, limit: float) -> bool:
    """Whether a bound is as high as a limit, but for rounding."""
    return bound >= limit * (1 - ROUNDING)


def solve(
    problem: BalanceProblem,
    time_limit_s: float = 30.0,
    warm_start: Assignment | None = None,
    gap: float = 0.0,
    processes: int = 1,
) -> Solution:
    """The fastest assignment that fits, with a proof, or the best found in time with what is proved of it.

    Where all times are whole numbers, "optimal" means that nothing is faster; else that nothing is faster by more
    than a 1e-7th part (the solver stops there, and `lower_bound` is what it proved).

    Args:
        time_limit_s: wall time after which the best so far is returned.
        warm_start: an assignment to begin with; it need not fit the memory.
        gap: stop as soon as (makespan - lower bound) / makespan is at most this.
        processes: that search once a second is over. With several, which of equally fast assignments comes out may
            differ from time to time.

    Raises:
        ConfigError: the schedule of P, V, m cannot run, or the warm start or an option is none.
        ResourceError: a process of the search ended.
    """
    if not time_limit_s > 0:
        raise ConfigError(f"a time limit of {time_limit_s} s", fix="more than 0")
    if not 0 <= gap < 1:
        raise ConfigError(f"a gap of {gap}", fix="at least 0 and less than 1, such as 0.01")
    started = time.perf_counter()
    deadline = started + time_limit_s
    graph = op_graph(*problem.schedule)
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
    with Team(problem, graph, incumbent, Budget(deadline), gap, processes, started + WAIT_S) as tree:
        tree.run(tree.root_node())
    if incumbent.assignment is None and not tree.heap:
        return _infeasible(problem, least, started)
    return _solution(problem, incumbent, tree, time.perf_counter() - started)


def solve_below(
    problem: BalanceProblem,
    limit: float,
    budget: Budget,
    gap: float = 0.0,
    cuts: dict[PathCut, None] | None = None,
    warm_start: Assignment | None = None,
) -> Solution:
    """Is there an assignment that fits and is faster than `limit`? The fastest, if there is one.

    The bound of the relaxation comes first: where it reaches the limit nothing else is looked at. The status is then
    "bounded" (and wherever the search proves it), and `lower_bound` at least the limit. Of a problem whose relaxation
    has no point the status is "infeasible". Without a limit a first split comes before all else, and with a budget of
    no linear program it is all. The answer does not depend on the speed of the machine, as long as the budget ends by
    its number of linear programs.

    Args:
        limit: what is not faster is of no interest; inf: anything is.
        gap: as of `solve`.
        cuts: paths through the graph of this P, V, m that may be long; the ones that are met are added.
        warm_start: an assignment of this problem that fits.
    """
    started = time.perf_counter()
    graph = op_graph(*problem.schedule)
    incumbent = Incumbent(problem, budget.deadline, eager=False)
    cuts = {} if cuts is None else cuts
    tree = Tree(problem, graph, incumbent, budget, gap, limit, list(cuts))
    root = tree.root_node()
    if warm_start is not None:
        incumbent.offer(warm_start)
    elif limit == INF:
        incumbent.begin()
    if not budget.over() and tree.relax(root, ROOT_ROUNDS).bound == INF:
        cuts |= tree.pool
        return Solution("infeasible", seconds=time.perf_counter() - started, reason="no assignment fits the memory")
    if root.bound < tree.cutoff() and not budget.over():
        if incumbent.assignment is None and limit < INF:
            incumbent.begin()
        tree.run(root)
    else:
        tree.heap.append(root)
    cuts |= tree.pool
    seconds, bound = time.perf_counter() - started, tree.lower_bound()
    if incumbent.assignment is None and bound == INF:
        return Solution("infeasible", seconds=seconds, reason="no assignment fits the memory", nodes=tree.nodes)
    found = _solution(problem, incumbent, tree, seconds)
    reached = found.lower_bound is not None and reaches(found.lower_bound, limit)
    return replace(found, status="bounded") if reached else found


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
