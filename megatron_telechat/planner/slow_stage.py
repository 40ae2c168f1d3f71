"""The cases that a plan has to be good for: any one device of the pipeline runs slower, or none does."""

from __future__ import annotations

import numpy as np

from megatron_telechat.planner.op_graph import OpGraph, makespans, op_graph
from megatron_telechat.planner.problem import BalanceProblem

AT_ONCE = 8
"""Cases that are simulated at once: a schedule of millions of ops takes a lot of memory for each."""


def time_factors(problem: BalanceProblem) -> np.ndarray:
    """[cases, 2 C] factors on the times of the virtual stages, forwards then backwards.

    An op that takes longer makes no schedule shorter, so where all devices may be slower the case of none is left out.
    """
    kinds = 2 * problem.num_stages
    if not problem.slow_stage:
        return np.ones((1, kinds))
    slow = np.arange(problem.P)[:, None] == np.arange(kinds) % problem.P
    return 1.0 + problem.slow_stage * slow


def worst_makespans(problem: BalanceProblem, times: np.ndarray) -> np.ndarray:
    """Makespan in the worst case, for many vectors of times at once: [K, 2 C] -> [K]."""
    graph = op_graph(*problem.schedule)
    found = [makespans(graph, times * factors, problem.p2p) for factors in time_factors(problem)]
    return np.max(found, axis=0)


def worst_case(graph: OpGraph, cases: np.ndarray, p2p: float) -> int:
    """Which of these cases, [cases, 2 C] times of the virtual stages, takes longest."""
    if len(cases) == 1:
        return 0
    found = [makespans(graph, cases[start : start + AT_ONCE], p2p) for start in range(0, len(cases), AT_ONCE)]
    return int(np.argmax(np.concatenate(found)))
