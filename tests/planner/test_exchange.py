"""The local search over whole assignments keeps the rules of the problem, and tells the simulator's time."""

from __future__ import annotations

import time

import numpy as np
import pytest

from megatron_telechat.planner.assignment import check_assignment
from megatron_telechat.planner.exchange import Exchange
from megatron_telechat.planner.simulate import peak_bytes, simulate
from megatron_telechat.planner.solve import solve
from tests.planner.small_problems import binding_problem, small_problem


def test_random_moves_and_what_follows_fit_and_are_timed_right():
    random = np.random.default_rng(3)
    seen = {"moved": 0, "groups": 0, "mtp": 0, "recompute": 0, "back at the best": 0}
    for problem in [*map(small_problem, range(60)), *map(binding_problem, range(8))]:
        best = solve(problem)
        if best.assignment is None:
            continue
        exchange = Exchange(problem)
        for moves in (1, 3, 5):
            found = exchange.shaken(best.assignment, moves, random)
            span, after = exchange.improve(found, time.perf_counter() + 60, 6, 24)
            for one in (found, after):
                check_assignment(problem, one)
                assert max(peak_bytes(problem, one)) <= problem.mem_limit
            assert span == pytest.approx(simulate(problem, after).total, rel=1e-12)
            assert best.makespan * (1 - 1e-6) <= span <= simulate(problem, found).total * (1 + 1e-12)
            seen["moved"] += found != best.assignment
            seen["groups"] += len(problem.groups) > 1
            seen["mtp"] += problem.mtp is not None
            seen["recompute"] += any(map(any, found.modes))
            seen["back at the best"] += span == pytest.approx(best.makespan, rel=1e-9)
    assert min(seen.values()) >= 10, seen
