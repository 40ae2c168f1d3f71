"""The solver finds what exhaustive search finds, and proves it; the simulator says what it answers."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.assignment import Assignment, Solution
from megatron_telechat.planner.problem import BalanceProblem, Block, LayerGroup, Mode
from megatron_telechat.planner.simulate import simulate
from megatron_telechat.planner.solve import solve
from tests.planner.small_problems import binding_problem, small_problem
from tools.bench.yardsticks.exhaustive import solve_exhaustively

EXAMPLES = json.loads((Path(__file__).parent / "solved_problems.json").read_text())


BINDING = 25


def large_problem(P: int, V: int, layers: int = 96, mem_limit: float = 1e9, m: int = 16) -> BalanceProblem:
    modes = (Mode("none", 0, 400, 0), Mode("full", 17011, 40, 360))
    return BalanceProblem(
        P, V, m, mem_limit, 100, 150, (LayerGroup(layers, 17011, 34802, 300, modes),),
        embed=Block(170, 170, 900, 40), head=Block(14660, 29320, 900, 300),
    )  # fmt: skip


def check(problem: BalanceProblem, answer: Solution, truth: Solution, note: object) -> None:
    assert answer.status == truth.status, note
    if truth.status == "infeasible":
        assert (answer.shortfall is None) == (truth.shortfall is None), note
        assert answer.shortfall is None or answer.shortfall == pytest.approx(truth.shortfall, abs=1e-3), note
        return
    exact = 0.0 if problem.integral else 1e-6
    assert answer.makespan == pytest.approx(truth.makespan, rel=exact, abs=0), note
    assert answer.lower_bound <= truth.makespan * (1 + 1e-12), note
    assert 0 <= answer.gap <= 2e-7, note
    result = simulate(problem, answer.assignment)
    assert (result.makespan, result.peak_bytes) == (answer.makespan, answer.peak_bytes), note
    assert max(result.peak_bytes) <= problem.mem_limit, note


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda one: one["name"])
def test_solved_examples(example):
    problem = BalanceProblem.from_json(example["problem"])
    out = solve(problem).to_json()
    for answer in (out, solve_exhaustively(problem).to_json()):
        if example["answer"] == "infeasible":
            assert (answer["status"], answer["makespan"], answer["shortfall"]) == ("infeasible", None, 568)
            continue
        assert (answer["status"], answer["makespan"]) == ("optimal", example["answer"]["makespan"])
        plan = simulate(problem, Assignment.from_json(answer))
        assert list(plan.peak_bytes) == answer["peak_bytes"]
        known = simulate(problem, Assignment.from_json(example["answer"]["plan"]))
        assert (known.makespan, list(known.peak_bytes)) == (answer["makespan"], example["answer"]["peak_bytes"])
    keys = ["status", "makespan", "lower_bound", "gap", "modes", "mtp_stage", "peak_bytes", "seconds"]
    assert list(out)[:8] == keys and json.dumps(out)


@pytest.mark.heavy
def test_random_problems_as_exhaustive_search():
    seen = {"optimal": 0, "infeasible": 0, "mtp": 0, "interleaved": 0, "recompute": 0, "fewer than P": 0, "empty": 0}
    seen |= {"other groups": 0, "slow stage": 0}
    for seed in range(220):
        problem = small_problem(seed)
        truth = solve_exhaustively(problem)
        answer = solve(problem)
        check(problem, answer, truth, seed)
        seen[truth.status] += 1
        if answer.assignment is not None:
            seen["mtp"] += problem.mtp is not None
            seen["interleaved"] += problem.V > 1
            seen["recompute"] += any(map(any, answer.assignment.modes))
            seen["fewer than P"] += problem.m < problem.P
            seen["other groups"] += problem.schedule[3] != problem.P
            seen["slow stage"] += problem.slow_stage > 0
            seen["empty"] += not all(answer.assignment.counts)
    assert min(seen.values()) >= 10, seen


@pytest.mark.heavy
def test_many_virtual_stages_with_binding_memory_as_exhaustive_search():
    seen = {"infeasible": 0, "searched": 0, "recompute": 0}
    for seed in range(BINDING):
        problem = binding_problem(seed)
        answer, truth = solve(problem), solve_exhaustively(problem)
        check(problem, answer, truth, seed)
        seen["infeasible"] += answer.assignment is None
        seen["searched"] += answer.nodes > 1
        seen["recompute"] += answer.assignment is not None and any(map(any, answer.assignment.modes))
    assert min(seen.values()) >= 2, seen


@pytest.mark.slow
def test_many_random_problems_as_exhaustive_search():
    """pytest -m slow tests/planner/test_solve.py"""
    for seed in range(1000, 3000):
        problem = small_problem(seed)
        check(problem, solve(problem), solve_exhaustively(problem), seed)
    for seed in range(100, 400):
        problem = binding_problem(seed)
        check(problem, solve(problem), solve_exhaustively(problem), seed)


@pytest.mark.heavy
@pytest.mark.parametrize("P, V, layers", [(8, 1, 96), (16, 1, 80), (4, 2, 30), (8, 2, 96)])
def test_large_problems_are_proved(P, V, layers):
    problem = large_problem(P, V, layers)
    answer = solve(problem, 60)
    assert (answer.status, answer.gap) == ("optimal", 0.0)


@pytest.mark.heavy
def test_as_many_microbatches_as_stages_are_proved():
    """Branching on devices before stages left a gap after 9000 boxes; stages first take about a hundred."""
    answer = solve(large_problem(8, 3, m=8), 60)
    assert (answer.status, answer.gap) == ("optimal", 0.0) and answer.nodes < 1000


def test_binding_memory_is_proved_and_costs_time():
    loose = large_problem(8, 1)
    tight = dataclasses.replace(loose, mem_limit=max(solve(loose, 60).peak_bytes) * 0.75)
    answer = solve(tight, 60)
    assert answer.status == "optimal" and any(map(any, answer.assignment.modes))
    assert max(answer.peak_bytes) <= tight.mem_limit
    assert answer.makespan > solve(loose, 60).makespan


@pytest.mark.heavy
def test_time_limit_gives_the_best_so_far_with_its_gap():
    problem = large_problem(16, 2)
    started = time.process_time()
    answer = solve(problem, 1.0)
    assert time.process_time() - started < 2.5
    assert answer.status in ("feasible", "optimal")
    assert 0 < answer.lower_bound <= answer.makespan == simulate(problem, answer.assignment).makespan
    assert answer.gap == pytest.approx(1 - answer.lower_bound / answer.makespan)


def test_gap_stops_early():
    problem = large_problem(8, 3)
    answer = solve(problem, 60, gap=0.2)
    assert answer.gap <= 0.2 and answer.nodes <= 5


@pytest.mark.heavy
def test_a_gap_leaves_the_bound_true():
    for seed in range(40):
        problem = small_problem(seed)
        truth = solve_exhaustively(problem)
        if truth.status == "infeasible":
            continue
        answer = solve(problem, gap=0.1)
        assert answer.lower_bound <= truth.makespan * (1 + 1e-12) <= answer.makespan * (1 + 2e-12)
        assert answer.gap <= 0.1 + 1e-9


@pytest.mark.heavy
def test_warm_start_is_kept_or_beaten():
    problem = large_problem(8, 2)
    best = solve(problem, 60)
    again = solve(problem, 0.05, warm_start=best.assignment)
    assert again.makespan == best.makespan
    with pytest.raises(ConfigError, match="warm start"):
        solve(problem, 1, warm_start=Assignment(((0,),)))


def test_the_same_answer_twice():
    problem = small_problem(4)
    one, two = solve(problem), solve(problem)
    assert (one.assignment, one.lower_bound, one.nodes) == (two.assignment, two.lower_bound, two.nodes)


def test_layers_too_few_for_the_stages():
    problem = dataclasses.replace(large_problem(4, 1, layers=3), min_layers_first=1, min_layers_last=1)
    for answer in (solve(problem), solve_exhaustively(problem)):
        assert (answer.status, answer.shortfall) == ("infeasible", None)
        assert "layers" in answer.reason


def test_mtp_without_a_place():
    problem = dataclasses.replace(large_problem(1, 1, layers=3), mtp=Block(1, 1, 1, 1))
    assert solve(problem).status == solve_exhaustively(problem).status == "infeasible"


@pytest.mark.parametrize("limit, gap", [(0, 0), (-1, 0), (1, 1.0), (1, -0.1)])
def test_bad_options(limit, gap):
    with pytest.raises(ConfigError):
        solve(small_problem(4), limit, gap=gap)


def test_schedule_that_cannot_run_is_refused():
    with pytest.raises(ConfigError, match="multiple of P"):
        solve(large_problem(4, 3, layers=24, m=5))


def test_seconds_and_microseconds_give_the_same_plan():
    whole = large_problem(4, 2, layers=30)
    scale = 1e-6

    def small(block: Block) -> Block:
        return Block(block.f * scale, block.b * scale, block.w, block.act)

    group = whole.groups[0]
    modes = tuple(dataclasses.replace(mode, extra_b=mode.extra_b * scale) for mode in group.modes)
    seconds = dataclasses.replace(
        whole, p2p=whole.p2p * scale, embed=small(whole.embed), head=small(whole.head),
        groups=(dataclasses.replace(group, f=group.f * scale, b=group.b * scale, modes=modes),),
    )  # fmt: skip
    assert not seconds.integral
    answer = solve(seconds, 60)
    assert answer.status == "optimal"
    assert answer.makespan == pytest.approx(solve(whole, 60).makespan * scale, rel=1e-6)
