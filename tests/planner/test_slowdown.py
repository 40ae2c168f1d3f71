"""Waiting neighbours make ops faster, varying ops make stages wait; what was not measured changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_telechat.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_telechat.costs.conditions import conditions
from megatron_telechat.costs.devices import DeviceSpec, Measured
from megatron_telechat.planner.assignment import Assignment
from megatron_telechat.planner.op_graph import makespans, op_graph
from megatron_telechat.planner.predict import predict
from megatron_telechat.planner.problem import BalanceProblem, LayerGroup, Mode
from megatron_telechat.planner.simulate import simulate, stage_times
from megatron_telechat.planner.slowdown import device_pace, expected_makespan


def pipeline(P: int, V: int, m: int, counts: tuple[int, ...]) -> tuple[BalanceProblem, list[float], float]:
    layers = LayerGroup(sum(counts), 10, 20, 1, (Mode("none", 0, 1, 0),))
    problem = BalanceProblem(P, V, m, 1e9, 0, 0, (layers,))
    assignment = Assignment(tuple((0,) * count for count in counts))
    return problem, stage_times(problem, assignment), simulate(problem, assignment).makespan


LAYOUTS = [(2, 1, 6, (3, 3)), (4, 1, 8, (1, 2, 3, 2)), (2, 3, 6, (1, 2, 1, 1, 2, 1))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_measured_changes_nothing(layout):
    problem, times, makespan = pipeline(*layout)
    assert expected_makespan(problem, times, 1.0, 0.0) == makespan


@pytest.mark.parametrize("P", [2, 4])
def test_one_microbatch_is_always_alone(P):
    problem, times, makespan = pipeline(P, 1, 1, (2,) * P)
    assert expected_makespan(problem, times, 0.8, 0.0) == pytest.approx(0.8 * makespan)
    # three ranks of each stage: two of the other 3 P - 1 work whenever one does
    beside = 2 / (3 * P - 1)
    assert expected_makespan(problem, times, 0.8, 0.0, together=3) == pytest.approx((0.8 + 0.2 * beside) * makespan)


def test_a_long_stage_runs_faster_while_the_short_one_waits():
    problem, times, makespan = pipeline(2, 1, 200, (6, 2))
    long, short = device_pace(problem, times, 0.7)
    # the short one works a third of the time, and all its work is beside the long one's
    assert short == pytest.approx(1.0, abs=0.01)
    assert long == pytest.approx(0.7 + 0.3 * (2 / 6) / long, abs=0.02)
    even, even_times, _ = pipeline(2, 1, 200, (4, 4))
    assert device_pace(even, even_times, 0.7) == pytest.approx([1.0, 1.0], abs=0.02)
    assert expected_makespan(problem, times, 0.7, 0.0) == pytest.approx(makespan * long, rel=0.01)


def test_varying_ops_make_even_stages_wait():
    problem, times, makespan = pipeline(2, 1, 32, (4, 4))
    one = expected_makespan(problem, times, 1.0, 0.1)
    # a pair of normal times is 0.56 standard deviations above its mean in the mean of its maximum
    assert 1.02 * makespan < one < 1.08 * makespan
    assert one == expected_makespan(problem, times, 1.0, 0.1), "drawn from a fixed seed"
    assert one < expected_makespan(problem, times, 1.0, 0.2)
    lone, lone_times, lone_makespan = pipeline(2, 1, 1, (4, 4))
    assert expected_makespan(lone, lone_times, 1.0, 0.1) == pytest.approx(lone_makespan, rel=0.03)


def test_the_prediction_of_a_run_counts_what_was_measured():
    model = ModelConfig(num_layers=4, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, vocab_size=256)
    training = TrainingConfig(device="cpu", precision="fp32", seq_length=128, global_batch_size=8)

    def predicted(alone: float, jitter: float, ranks_per_node: int = 2, layout: str = "Et*3|tL"):
        parallel = ParallelConfig(
            world_size=2,
            ranks_per_node=ranks_per_node,
            pipeline_model_parallel_size=2,
            pipeline_model_parallel_layout=layout,
        )
        run = RunConfig(model=model, parallel=parallel, training=training)
        both = {"forward": 0.001, "backward": 0.002}
        layers = {"dense": {"forward": 0.01, "backward": 0.02}}
        entry = Measured(conditions(run), layers, both, both, 0.0, 1e-9, alone=alone, jitter=jitter)
        return predict(run, DeviceSpec("mine", measured=(entry,)))

    plain, faster = predicted(1.0, 0.0), predicted(0.6, 0.0)
    assert plain.pace == 1.0 and plain.makespan == plain.simulation.makespan
    assert 0.6 < faster.pace < 1.0 and faster.iteration < plain.iteration
    even, varied = (predicted(1.0, jitter, layout="Et*2|t*2L") for jitter in (0.0, 0.2))
    assert even.pace == 1.0 < varied.pace and even.iteration < varied.iteration
    assert (
        faster.bubble == pytest.approx(plain.bubble)
        and varied.bubble == pytest.approx(even.bubble)
        and 0 < even.bubble < 1
    )
    assert predicted(0.6, 0.0, ranks_per_node=1).pace == 1.0, "ranks of other nodes do not disturb"


def test_factors_of_ops():
    problem, times, makespan = pipeline(4, 1, 8, (2, 2, 2, 2))
    graph = op_graph(4, 1, 8)
    factors = np.ones((len(graph.kind), 3))
    factors[:, 1] = 2.0
    last = max(graph.last_ops)
    factors[last, 2] = 3.0
    plain, double, longer = makespans(graph, np.repeat(np.array(times)[None], 3, axis=0), 0.0, factors)
    assert (plain, double) == (makespan, 2 * makespan)
    assert longer >= makespan
