"""The sweep: its proof holds for the whole space, whatever ends it, on however many processes."""

from __future__ import annotations

import dataclasses
import math
import random
import time

import numpy as np
import pytest

from megatron_telechat.config import load_run_config
from megatron_telechat.costs.memory import stage_memory
from megatron_telechat.errors import ConfigError, ResourceError
from megatron_telechat.planner import worker
from megatron_telechat.planner.budget import Budget
from megatron_telechat.planner.build import planned_run
from megatron_telechat.planner.count_program import Space
from megatron_telechat.planner.predict import predict
from megatron_telechat.planner.problem import BalanceProblem, DeviceCost
from megatron_telechat.planner.simulate import simulate
from megatron_telechat.planner.solve import solve, solve_below
from megatron_telechat.planner.space import layouts
from megatron_telechat.planner.sweep import Proof, Search, quick_bound, sweep
from megatron_telechat.planner.tasks import Workers
from tests.planner.small_clusters import Cluster, assignments, cluster, exhaustive, small_cluster
from tests.planner.small_problems import small_problem
from tools.bench.yardsticks.exhaustive import solve_exhaustively

SOME = "--preset telechat2-7b --num-layers 6 --world-size 8 --global-batch-size 16"


def truth_of(one: Cluster) -> float:
    """Seconds of the fastest step of all layouts that the training takes, by exhaustive search."""
    best = math.inf
    for layout in one.space:
        seconds, plan = exhaustive(layout.problem)
        if plan is None or seconds >= best:
            continue
        try:
            loaded = layout.loaded(one.load)
        except ConfigError:
            continue
        assert loaded.problem == layout.problem
        planned = planned_run(loaded.question.run, layout.problem, plan)
        nominal = simulate(dataclasses.replace(layout.problem, slow_stage=0.0), plan).total
        assert predict(planned.run, one.question.device, one.question.software).iteration == pytest.approx(nominal)
        best = seconds
    return best


def check_cluster(one: Cluster, note: object) -> Proof:
    truth = truth_of(one)
    ranking = sweep(one.space, one.load, 3, 60.0, gap=1e-4)
    proof = ranking.proof
    assert proof.step == pytest.approx(truth, rel=1.01e-4), note
    if math.isinf(truth):
        assert not ranking.plans and proof.no_fit + proof.refused == proof.layouts, note
        return proof
    assert proof.bound <= truth * (1 + 1e-9) and proof.gap <= 1.001e-4, note
    flags, plan = ranking.plans[0]
    assert plan.worst_iteration == pytest.approx(proof.step), note
    parts = (proof.no_fit, proof.by_work, proof.by_relaxation, proof.searched, proof.refused, proof.unseen)
    assert sum(parts) == proof.layouts, note
    return proof


@pytest.mark.heavy
def test_small_clusters_as_exhaustive_search():
    clusters = {seed: small_cluster(seed) for seed in (2, 3, 5, 8, 10)}
    proofs = [check_cluster(one, seed) for seed, one in clusters.items()]
    assert any(math.isfinite(proof.step) for proof in proofs)
    assert any(one.question.slow_stage for one in clusters.values())
    assert any(layout.problem.group_size for one in clusters.values() for layout in one.space)


@pytest.mark.slow
def test_many_small_clusters_as_exhaustive_search():
    proofs = [check_cluster(small_cluster(seed), seed) for seed in range(100, 124)]
    assert sum(math.isfinite(proof.step) for proof in proofs) >= 20
    assert sum(proof.no_fit > 0 for proof in proofs) >= 5


@pytest.fixture(scope="module")
def some() -> Cluster:
    return cluster(SOME, "h100-80g", 32)


def test_a_step_is_what_the_prediction_says(some):
    """Pipeline and rest, of any split: with exchanges that hide, that do not, and with state on the host."""
    rng = random.Random(3)
    for layout in rng.sample(some.space, 24):
        loaded = layout.loaded(some.load)
        every = list(assignments(layout.problem)) if layout.problem.num_stages <= 4 else []
        for plan in rng.sample(every, min(len(every), 3)):
            planned = planned_run(loaded.question.run, layout.problem, plan)
            found = predict(planned.run, some.question.device, some.question.software)
            assert simulate(layout.problem, plan).total == pytest.approx(found.iteration, rel=1e-12), layout.flags


@pytest.mark.heavy
def test_a_layout_is_what_the_configuration_makes_of_its_flags(some):
    moe = cluster("--preset telechat2-39b-a12b --world-size 64 --global-batch-size 64", "h100-80g")
    long = cluster("--preset telechat2-7b --world-size 16 --global-batch-size 16 --seq-length 65536", "h100-80g")
    rng = random.Random(4)
    for one in (some, moe, long):
        taken = 0
        for layout in rng.sample(one.space, 20):
            try:
                loaded = layout.loaded(one.load)
            except ConfigError:
                continue
            taken += 1
            assert loaded.problem == layout.problem, layout.flags
            assert loaded.flags == layout.flags
        assert taken >= 15


def test_the_schedules_of_a_space():
    """A preset with virtual stages leaves no layout out; micro-batches come in all groups that are tried."""
    schedules = [one.schedule for one in cluster("--preset telechat2-115b --world-size 512", "h100-80g").space]
    assert {P for P, *_ in schedules} == {1, 2, 4, 8, 16, 32, 64}
    # 10 micro-batches over 4 stages: groups of 5, 6 and 10, none of 4, of 7 (it leaves 3) or of 8
    words = "--preset telechat2-7b --num-layers 8 --world-size 4 --global-batch-size 10"
    words += " --micro-batch-size 1 --pipeline-model-parallel-size 4"
    given = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 4, "micro_batch_size": 1}
    one = cluster(words, "h100-80g")
    assert {schedule for schedule in (found.schedule for found in layouts(one.question, one.load, given))} == {
        (4, 1, 10, 4),
        (4, 2, 10, 5),
        (4, 2, 10, 6),
        (4, 2, 10, 10),
    }
    fixed = {**given, "microbatch_group_size_per_virtual_pipeline_stage": 10}
    assert {found.schedule for found in layouts(one.question, one.load, fixed)} == {(4, 1, 10, 4), (4, 2, 10, 10)}


@pytest.mark.heavy
def test_no_bound_is_above_what_is_found(some):
    """Arithmetic below the relaxation, the relaxation below the fastest split, of layouts of every kind."""
    rng = random.Random(5)
    solved = 0
    for layout in rng.sample(some.space, 40):
        answer = solve(layout.problem, 5.0)
        if answer.makespan is None:
            continue
        solved += 1
        quick = quick_bound(layout.problem)
        relaxed = solve_below(layout.problem, math.inf, Budget(time.perf_counter() + 9, 1), 0.0).lower_bound
        assert quick <= answer.makespan and relaxed <= answer.makespan * (1 + 1e-9), layout.flags
        below = solve_below(layout.problem, answer.makespan * 0.999, Budget(time.perf_counter() + 9), 0.0)
        assert below.status == "bounded" and below.lower_bound <= answer.makespan, layout.flags
        above = solve_below(layout.problem, answer.makespan * 1.001, Budget(time.perf_counter() + 9), 0.0)
        assert above.makespan == pytest.approx(answer.makespan, rel=1e-6), layout.flags
    assert solved >= 20


def with_rest(problem: BalanceProblem, seed: int) -> BalanceProblem:
    """A rest of any kind, also with shares that shrink where a device has more to do."""
    rng = random.Random(seed)

    def cost() -> DeviceCost:
        layers = tuple(rng.uniform(0, 150) for _ in problem.groups)
        shares = (rng.choice([0, -0.7]), rng.choice([0, -0.7, 0.2]))
        return DeviceCost(rng.uniform(0, 50), layers, rng.uniform(0, 200), rng.uniform(0, 200), *shares)

    rest = tuple(tuple(cost() for _ in range(rng.choice([1, 2, 4]))) for _ in range(rng.choice([1, 2])))
    return dataclasses.replace(problem, mtp=None, rest=rest)


def test_rows_of_the_program_say_of_the_rest_what_the_simulator_says():
    """The least rest that the rows of the LP leave at a whole point is that of the split."""
    rng = random.Random(6)
    compared = 0
    for seed in range(60):
        problem = with_rest(small_problem(seed), seed)
        if problem.num_stages > 4 or problem.num_layers > 6:
            continue
        space = Space(problem, 1e6)
        for plan in rng.sample(every := list(assignments(problem)), min(len(every), 4)):
            x = np.zeros(space.size)
            layer = 0
            groups = [g for g, group in enumerate(problem.groups) for _ in range(group.count)]
            for stage, modes in enumerate(plan.modes):
                for mode in modes:
                    if (groups[layer], mode) in space.kinds:
                        x[space.n[stage, space.kinds.index((groups[layer], mode))]] += 1
                    layer += 1
            if x.sum() < problem.num_layers:
                continue  # a mode that loose memory leaves out
            least = 0.0
            for column in range(space.counts_end, space.size):
                rows = np.flatnonzero(space.rows[:, column])
                least += (space.row_lo[rows] - space.rows[rows] @ x).max()
            compared += 1
            assert least * space.time_unit == pytest.approx(simulate(problem, plan).rest), seed
    assert compared >= 40


@pytest.mark.heavy
def test_problems_with_a_rest_as_exhaustive_search():
    compared = 0
    for seed in range(200):
        problem = with_rest(small_problem(seed), seed)
        stages, modes = problem.num_stages, max(len(group.modes) for group in problem.groups)
        if stages > 4 or problem.num_layers > 6 or modes > 2 and stages > 2:
            continue
        truth, _ = exhaustive(problem)
        answer = solve(problem)
        if math.isinf(truth):
            assert answer.status == "infeasible", seed
            continue
        compared += 1
        assert answer.makespan == pytest.approx(truth, rel=1e-6), seed
        assert answer.lower_bound <= truth * (1 + 1e-12), seed
        assert simulate(problem, answer.assignment).total == answer.makespan
    assert compared >= 20


@pytest.mark.heavy
def test_a_limit_is_proved_or_beaten():
    for seed in range(40):
        problem = small_problem(seed)
        truth = solve_exhaustively(problem)
        budget = Budget(time.perf_counter() + 20)
        if truth.makespan is None:
            assert solve_below(problem, 1e12, budget).status in ("infeasible", "bounded"), seed
            continue
        at = solve_below(problem, truth.makespan * (1 - 1e-6), budget)
        assert at.status == "bounded" and at.lower_bound <= truth.makespan, seed
        over = solve_below(problem, truth.makespan * 1.05 + 1, budget)
        assert over.makespan == pytest.approx(truth.makespan, rel=1e-6), seed


@pytest.mark.heavy
def test_the_answer_does_not_depend_on_the_number_of_processes(some, monkeypatch):
    started = []
    start = worker._start

    def counted():
        started.append(start())
        return started[-1]

    monkeypatch.setattr(worker, "_start", counted)
    answers = []
    for processes in (1, 2):
        with Workers(processes, wait_s=0.0) as workers:
            search = Search(some.space, some.load, 1e-3, time.perf_counter() + 100, workers)
            search.run()
            search.polish(1e-4)
            rows = [(one.layout.number, one.value, one.bound, one.assignment) for one in search.rows(5)]
        answers.append((rows, [(one.bound, one.value, one.effort) for one in search.entries]))
    assert answers[0] == answers[1]
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_what_time_leaves_open_is_in_the_gap(some):
    """The time may be up at any moment: the bound is below the fastest step, and the gap says how far."""
    whole = sweep(some.space, some.load, 1, 60.0, gap=1e-3).proof
    assert whole.gap <= 1.001e-3 and whole.unseen == 0
    for rounds in (0, 1, 2, 4):
        with Workers(1) as workers:
            search = Search(some.space, some.load, 1e-3, time.perf_counter() + 100, workers)
            left = iter(range(rounds))
            search.over = lambda left=left: next(left, None) is None  # type: ignore[method-assign]
            search.run()
            proof = search.proof()
        assert proof.bound <= whole.step and (proof.unseen > 0 or proof.gap <= 1.001e-3), rounds
        assert proof.step >= whole.bound, rounds
        assert rounds or math.isinf(proof.gap)


@pytest.mark.heavy
def test_a_process_that_ends_is_an_error(some, monkeypatch):
    start = worker._start

    def broken():
        process = start()
        process.kill()
        process.wait()
        return process

    monkeypatch.setattr(worker, "_start", broken)
    with Workers(2, wait_s=0.0) as workers, pytest.raises(ResourceError, match="ended before it had answered"):
        Search(some.space, some.load, 1e-3, time.perf_counter() + 100, workers).run()


def test_plans_of_a_sweep_train_and_fit(some):
    ranking = sweep(some.space, some.load, 4, 60.0)
    for flags, plan in ranking.plans:
        virtual = flags.index("--num-virtual-stages-per-pipeline-rank")
        sizes = [*flags[:virtual], *flags[virtual + 2 :]]
        more = ["--num-virtual-stages-per-pipeline-rank", str(plan.problem.V), *plan.planned.flags]
        run = load_run_config([*SOME.split(), "--dry-run", *sizes, *more], {}).run
        assert max(stage.total_bytes for stage in stage_memory(run)) <= 29 * 2**30
    assert [plan.makespan for _, plan in ranking.plans] == sorted(plan.makespan for _, plan in ranking.plans)
