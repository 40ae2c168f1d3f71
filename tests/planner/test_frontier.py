"""Frontiers of a space, and plans that expect uneven experts."""

from __future__ import annotations

import dataclasses
import math

import pytest

from megatron_telechat.costs.imbalance import worst_imbalance
from megatron_telechat.planner.frontier import _monotone, memory_frontier
from megatron_telechat.planner.simulate import peak_bytes, simulate
from megatron_telechat.planner.space import layouts, step_problem
from megatron_telechat.planner.sweep import sweep
from tests.planner.small_clusters import Cluster, cluster

GIB = 2**30
MOE = "--preset telechat2-39b-a12b --num-layers 6 --world-size 16 --global-batch-size 64"


def under(one: Cluster, limit: float) -> list:
    """The space where a device has so many bytes."""
    return [
        dataclasses.replace(layout, problem=dataclasses.replace(layout.problem, mem_limit=limit))
        for layout in one.space
    ]


@pytest.mark.heavy
@pytest.mark.slow
def test_a_frontier_is_what_sweeps_of_each_limit_say():
    one = cluster("--preset telechat2-7b --num-layers 8 --world-size 8 --global-batch-size 16", "h100-80g")
    limits = [number * GIB for number in (64, 24, 12, 8, 2)]
    found = memory_frontier(one.space, one.load, limits, 200.0, gap=1e-3)
    assert [point.limit for point in found] == limits
    steps = []
    for point in found:
        limit, proof, best = point.limit, point.proof, point.best
        alone = sweep(under(one, limit), one.load, 1, 60.0, gap=1e-3).proof
        assert (best is None) == math.isinf(alone.step)
        if best is None:
            assert proof.no_fit + proof.refused == proof.layouts
            continue
        steps.append(proof.step)
        assert proof.gap <= 1.001e-3 and alone.gap <= 1.001e-3
        assert proof.bound <= alone.step * (1 + 1e-9) and alone.bound <= proof.step * (1 + 1e-9)
        plan = best[1]
        assert max(peak_bytes(plan.problem, plan.assignment)) <= limit
    assert len(steps) >= 3 and steps == sorted(steps) and steps[-1] > steps[0]


@pytest.mark.heavy
def test_experts_that_cannot_be_uneven_are_not():
    one = cluster(MOE, "h100-80g")
    question = dataclasses.replace(one.question, imbalance=1.5)
    space = layouts(question, one.load, {})
    even = {
        layout.question.software.moe_imbalance for layout in space if layout.question.run.parallel.expert_sizes[0] == 1
    }
    wide = {
        layout.question.software.moe_imbalance for layout in space if layout.question.run.parallel.expert_sizes[0] == 16
    }
    assert even == {1.0} and wide == {1.5}
    run = space[0].question.run
    parallel = dataclasses.replace(run.parallel, expert_model_parallel_size=4, expert_tensor_parallel_size=1)
    assert worst_imbalance(dataclasses.replace(run, parallel=parallel)) == 4  # 16 experts, 4 chosen, 4 on a rank


@pytest.mark.heavy
def test_the_largest_imbalance_is_the_worst_of_all():
    """Times and bytes of any split grow with it: so its best plan is the best for the worst of a set."""
    one = cluster(MOE, "h100-80g")
    asked = [dataclasses.replace(one.question, imbalance=number) for number in (1.0, 1.2, 2.0)]
    plans = [plan.assignment for _, plan in sweep(one.space, one.load, 6, 30.0).plans]
    assert plans
    for layout in one.space[:: len(one.space) // 20]:
        problems = [step_problem(question.of(layout.question.run)) for question in asked]
        for plan in plans:
            if len(plan.modes) == problems[0].num_stages and problems[0].num_layers == sum(plan.counts):
                found = [(simulate(problem, plan).total, max(peak_bytes(problem, plan))) for problem in problems]
                assert found == sorted(found) and sorted(peak for _, peak in found) == [peak for _, peak in found]


@pytest.mark.heavy
def test_what_less_memory_finds_counts_for_more():
    one = cluster("--preset telechat2-7b --num-layers 8 --world-size 8 --global-batch-size 16", "h100-80g")
    slow, fast = memory_frontier(one.space, one.load, [64 * GIB, 32 * GIB], 60.0)
    worse = dataclasses.replace(slow, proof=dataclasses.replace(slow.proof, step=2 * fast.proof.step))
    mended = _monotone([worse, fast])
    assert mended[0].proof.step == fast.proof.step and mended[0].proof.bound <= fast.proof.step
    assert mended[0].best[1].problem.mem_limit == 64 * GIB and mended[1] == fast
