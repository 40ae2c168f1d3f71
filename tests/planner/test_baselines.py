"""What others would choose is never better than the solver, and is what their flags and objectives say."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from megatron_telechat.planner.assignment import Assignment, stage_groups
from megatron_telechat.planner.baselines import accounted_counts, megatron_splits, uniform_counts
from megatron_telechat.planner.problem import BalanceProblem, Block, LayerGroup, Mode
from megatron_telechat.planner.simulate import peak_bytes, simulate, stage_times
from megatron_telechat.planner.solve import solve
from tests.planner.small_problems import small_problem
from tools.bench.yardsticks.exhaustive import splits
from tools.bench.yardsticks.surrogates import OBJECTIVES, all_pairs, largest_stage, surrogate, surrogates

PROBLEM = BalanceProblem(
    2, 2, 4, 10**9, 0, 0, (LayerGroup(8, 10, 20, 1, (Mode("none", 0, 5, 0), Mode("full", 10, 1, 4))),),
    embed=Block(1, 1, 1, 1), head=Block(9, 18, 1, 1),
)  # fmt: skip


def test_megatrons_splits():
    assert uniform_counts(PROBLEM) == (2, 2, 2, 2)
    assert accounted_counts(PROBLEM) is None
    ten = dataclasses.replace(PROBLEM, groups=(dataclasses.replace(PROBLEM.groups[0], count=10),))
    assert uniform_counts(ten) is None and accounted_counts(ten) == (2, 3, 3, 2)


@pytest.mark.heavy
def test_no_baseline_beats_the_solver():
    for seed in range(30):
        problem = small_problem(seed)
        best = solve(problem)
        for one in [*megatron_splits(problem), *surrogates(problem)]:
            if best.status == "infeasible":
                assert one.makespan is None
            elif one.makespan is not None:
                result = simulate(problem, one.assignment)
                assert result.makespan == one.makespan >= best.makespan * (1 - 1e-6), (seed, one.name)
                assert max(result.peak_bytes) <= problem.mem_limit


# forward 1 2 | 3 4, backward 10 20 | 30 40: virtual stages 0 and 1 of two devices
TIMES = [1, 2, 3, 4, 10, 20, 30, 40]


def test_surrogates_by_hand():
    assert largest_stage(PROBLEM).value(TIMES) == 110 + (4 - 1) * 2 * (4 + 40)
    assert all_pairs(PROBLEM).value(TIMES) == 110 + (4 - 2) * (4 + 40)
    one_virtual_stage = dataclasses.replace(PROBLEM, P=4, V=1)
    assert all_pairs(one_virtual_stage).value(TIMES) == 110 + (4 - 2) * (4 + 40)
    assert largest_stage(dataclasses.replace(PROBLEM, m=1)).value(TIMES) == 110


def test_the_surrogate_of_as_many_microbatches_as_stages_by_hand():
    # before the last virtual stage: 10 + 1 (forward of the embedding) and 20; the last one: 30 and
    # 40 + 9 (forward of the output layer) + half of the 4 - 9 that its layers take
    two = dataclasses.replace(PROBLEM, m=2)
    assert all_pairs(two).value(TIMES) == 20 + (40 + 9 + (4 - 9) / 2)


def least_by_trying(problem: BalanceProblem, kind: str) -> float | None:
    """The least surrogate of all assignments that fit."""
    best = None
    objective = OBJECTIVES[kind](problem)
    for place, counts in splits(problem):
        choices = [
            [sum(chosen, ()) for chosen in itertools.product(*(
                itertools.combinations_with_replacement(range(len(group.modes)), count)
                for group, count in zip(problem.groups, row, strict=True)
            ))]
            for row in stage_groups(problem, counts)
        ]  # fmt: skip
        for modes in itertools.product(*choices):
            one = Assignment(modes, place)
            if max(peak_bytes(problem, one)) <= problem.mem_limit:
                value = objective.value(stage_times(problem, one))
                best = value if best is None else min(best, value)
    return best


def tiny_problem(seed: int) -> BalanceProblem:
    """Few enough assignments to value every one."""
    problem = small_problem(seed)
    while problem.num_layers > 6:
        problem = dataclasses.replace(
            problem, groups=tuple(dataclasses.replace(one, count=max(one.count // 2, 1)) for one in problem.groups)
        )
    stages = min(problem.min_layers, 1 if problem.num_layers >= problem.num_stages else 0)
    return dataclasses.replace(problem, min_layers=stages, mem_limit=problem.mem_limit * 0.7)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_surrogate_is_minimised_exactly(kind):
    tried = infeasible = 0
    for seed in range(60):
        problem = tiny_problem(seed)
        if problem.num_stages > 4:
            continue
        known = least_by_trying(problem, kind)
        found = surrogate(problem, kind)
        assert found.proved, seed
        if known is None:
            infeasible += 1
            assert found.assignment is None, seed
            continue
        tried += 1
        value = OBJECTIVES[kind](problem).value(stage_times(problem, found.assignment))
        assert value == pytest.approx(known, rel=1e-6), seed
    assert tried >= 20 and infeasible >= 2


def test_plain_flags_split_two_ranks_as_they_like():
    """--decoder-first-pipeline-num-layers leaves the rest to the other rank: with P = 2 no layout string is needed."""
    for weight in (0, 9, 18, 27):
        problem = dataclasses.replace(PROBLEM, V=1, head=Block(weight, 18, 1, 1))
        best = {one.name: one for one in megatron_splits(problem, strict=True)}["best plain flags"]
        assert best.makespan == solve(problem).makespan, weight
