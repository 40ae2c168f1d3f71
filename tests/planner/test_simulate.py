"""The simulator against a slow event simulation, and its order against the one of costs/schedule."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from megatron_telechat.costs.op_order import rank_ops
from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.assignment import Assignment, stage_groups
from megatron_telechat.planner.op_graph import end_times, makespans, op_graph
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import simulate
from megatron_telechat.planner.slow_stage import worst_case, worst_makespans
from tests.planner import event_simulation
from tests.planner.small_problems import small_problem
from tools.bench.yardsticks.exhaustive import splits


def random_assignment(problem: BalanceProblem, rng: random.Random) -> Assignment | None:
    found = list(splits(problem))
    if not found:
        return None
    place, counts = rng.choice(found)
    stages = []
    for row in stage_groups(problem, counts):
        stages.append(
            tuple(
                rng.randrange(len(group.modes))
                for group, count in zip(problem.groups, row, strict=True)
                for _ in range(count)
            )
        )
    return Assignment(tuple(stages), place)


def test_makespan_and_peaks_are_those_of_the_event_simulation():
    rng = random.Random(1)
    tried = 0
    for seed in range(1000, 1150):
        problem = small_problem(seed)
        assignment = random_assignment(problem, rng)
        if assignment is None:
            continue
        result = simulate(problem, assignment)
        makespan, peaks = event_simulation.run(problem, assignment)
        assert result.makespan == pytest.approx(makespan, rel=1e-12), seed
        assert result.peak_bytes == pytest.approx(peaks, rel=1e-12), seed
        assert max(op.end for op in result.ops) == result.makespan
        tried += 1
    assert tried > 100


def test_timeline_keeps_the_order_and_never_overlaps():
    problem = small_problem(6)
    assignment = random_assignment(problem, random.Random(2))
    ops = simulate(problem, assignment).ops
    for device in range(problem.P):
        mine = [op for op in ops if op.device == device]
        order = [(op.forward, op.virtual_stage, op.microbatch) for op in rank_ops(device, *problem.schedule)]
        assert [(op.kind == "F", op.virtual_stage, op.microbatch) for op in mine] == order
        assert all(one.end <= other.start + 1e-9 for one, other in zip(mine, mine[1:], strict=False))


@pytest.mark.parametrize(
    "P, V, m, group",
    [
        *((1, 1, 3, 1), (4, 1, 2, 4), (4, 1, 9, 4), (2, 2, 5, 2), (4, 2, 8, 4), (4, 3, 4, 4), (3, 2, 2, 3)),
        *((2, 2, 5, 3), (4, 2, 8, 8), (3, 3, 8, 5)),
    ],
)
def test_many_at_once_is_one_after_the_other(P, V, m, group):
    graph = op_graph(P, V, m, group)
    times = np.random.default_rng(0).uniform(0, 10, size=(5, 2 * P * V))
    one_by_one = [max(end_times(graph, row.tolist(), 0.7)) for row in times]
    assert makespans(graph, times, 0.7) == pytest.approx(one_by_one)


def test_one_stage_is_a_sum():
    problem = BalanceProblem.from_json(
        {
            "P": 1,
            "V": 1,
            "m": 3,
            "mem_limit": 1000,
            "const_mem": 1,
            "p2p": 50,
            "groups": [
                {"count": 2, "f": 10, "b": 20, "w": 7, "modes": [{"name": "none", "extra_b": 0, "act": 5, "ws": 0}]}
            ],
            "embed": {"f": 1, "b": 2, "w": 3, "act": 4},
            "head": {"f": 5, "b": 6, "w": 7, "act": 8},
        }
    )
    result = simulate(problem, Assignment(((0, 0),)))
    assert result.makespan == 3 * (60 + 3 + 11)
    assert result.peak_bytes == (1 + 14 + 3 + 7 + 10 + 4 + 8,)


def test_an_order_in_which_the_ranks_wait_for_each_other_is_refused():
    with pytest.raises(ConfigError, match="wait for each other"):
        op_graph(4, 3, 5)


@pytest.mark.parametrize(
    "modes, place, match",
    [
        (((0, 0), (0,)), None, "3 virtual stages|2 virtual stages"),
        (((0,), (0,), (0,), (0,)), None, "4 layers"),
        (((), (0, 0), (0, 0), (0,)), 3, "mtp_stage"),
        (((0, 0), (), (0, 0), (0,)), None, "0 layers on virtual stage 1"),
        (((0, 0), (0,), (7,), (0,)), None, "mode 7"),
    ],
)
def test_assignments_that_are_none(modes, place, match):
    problem = BalanceProblem.from_json(
        {
            "P": 2,
            "V": 2,
            "m": 2,
            "mem_limit": 1000,
            "const_mem": 1,
            "p2p": 0,
            "groups": [
                {"count": 5, "f": 1, "b": 2, "w": 7, "modes": [{"name": "none", "extra_b": 0, "act": 5, "ws": 0}]}
            ],
            "embed": {"f": 0, "b": 0, "w": 0, "act": 0},
            "head": {"f": 0, "b": 0, "w": 0, "act": 0},
        }
    )
    with pytest.raises(ConfigError, match=match):
        simulate(problem, Assignment(modes, place))


def test_the_worst_case_is_that_of_some_device():
    """More devices than cases are simulated at once."""
    P, V, m, share = 10, 2, 20, 0.3
    group = {"count": 40, "f": 1, "b": 2, "w": 0, "modes": [{"name": "none", "extra_b": 0, "act": 0, "ws": 0}]}
    free = {"f": 0, "b": 0, "w": 0, "act": 0}
    problem = BalanceProblem.from_json(
        {"P": P, "V": V, "m": m, "mem_limit": 1, "const_mem": 0, "p2p": 0.1, "groups": [group], "embed": free,
         "head": free, "slow_stage": share}
    )  # fmt: skip
    graph, rng = op_graph(P, V, m), np.random.default_rng(3)
    times = rng.uniform(1, 2, size=(5, 2 * P * V))
    slower = np.repeat(times[:, None], P, axis=1)
    for device in range(P):
        slower[:, device, device::P] *= 1 + share
    spans = np.array([[max(end_times(graph, case.tolist(), 0.1)) for case in cases] for cases in slower])
    assert worst_makespans(problem, times) == pytest.approx(spans.max(axis=1))
    for row, cases in zip(spans, slower, strict=True):
        assert row[worst_case(graph, cases, 0.1)] == row.max()
    assert {int(at) for at in spans.argmax(axis=1)} - set(range(8)), "a worst case among the last ones"
    uneven = Assignment(tuple((0,) * (2 + (stage in (9, 19)) - (stage in (3, 13))) for stage in range(P * V)))
    slow_last = dataclasses.replace(problem, slow_stage=0.0)
    assert simulate(problem, uneven).makespan > simulate(slow_last, uneven).makespan * 1.2
