"""What others would choose is never better than the solver, and is what their flags say."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_telechat.planner.baselines import accounted_counts, baselines, surrogate_value, uniform_counts
from megatron_telechat.planner.problem import BalanceProblem, Block, LayerGroup, Mode
from megatron_telechat.planner.simulate import simulate
from megatron_telechat.planner.solve import solve
from tests.planner.small_problems import small_problem

PROBLEM = BalanceProblem(
    2, 2, 4, 10**9, 0, 0, (LayerGroup(8, 10, 20, 1, (Mode("none", 0, 5, 0), Mode("full", 10, 1, 4))),),
    embed=Block(1, 1, 1, 1), head=Block(9, 18, 1, 1),
)  # fmt: skip


def test_megatrons_splits():
    assert uniform_counts(PROBLEM) == (2, 2, 2, 2)
    assert accounted_counts(PROBLEM) is None
    ten = dataclasses.replace(PROBLEM, groups=(dataclasses.replace(PROBLEM.groups[0], count=10),))
    assert uniform_counts(ten) is None and accounted_counts(ten) == (2, 3, 3, 2)


def test_no_baseline_beats_the_solver():
    for seed in range(30):
        problem = small_problem(seed)
        best = solve(problem)
        for one in baselines(problem):
            if best.status == "infeasible":
                assert one.makespan is None
            elif one.makespan is not None:
                result = simulate(problem, one.assignment)
                assert result.makespan == one.makespan >= best.makespan * (1 - 1e-6), (seed, one.name)
                assert max(result.peak_bytes) <= problem.mem_limit


def test_surrogates_by_hand():
    # P=2, V=2: forward 1 2 | 3 4, backward 10 20 | 30 40 of chunks 0 and 1
    times = [1, 2, 3, 4, 10, 20, 30, 40]
    assert surrogate_value(PROBLEM, times, "largest stage") == 4 * (2 + 4 + 20 + 40) + 110 / 2
    pairs = (2 + 20) + (2 + 40) + (4 + 20) + (4 + 40)
    assert surrogate_value(PROBLEM, times, "all pairs of chunks") == pytest.approx(4 / 2 * pairs + 110 / 2)
