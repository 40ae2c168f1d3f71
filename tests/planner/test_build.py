"""Balance problems of real runs: one truth with the memory report, and the way back to layouts and flags."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_telechat.config import load_run_config
from megatron_telechat.config.recompute import recompute_plan
from megatron_telechat.costs import device_spec
from megatron_telechat.costs.memory import stage_memory
from megatron_telechat.errors import ConfigError
from megatron_telechat.planner import predict as predict_module
from megatron_telechat.planner.assignment import Assignment
from megatron_telechat.planner.build import (
    assignment_of,
    balance_problem,
    kinds_of,
    mtp_block,
    of_layer,
    parse_kind,
    planned_run,
)
from megatron_telechat.planner.predict import predict
from megatron_telechat.planner.simulate import simulate

NPU = device_spec("ascend-910b-64g")
RUNS = {
    "115b": ("telechat2-115b", 512, ()),
    "35b": ("telechat2-35b", 16, ()),
    "39b": ("telechat2-39b-a12b", 1024, ()),
    "7b": ("telechat2-7b", 8, ()),
    "115b selective": (
        "telechat2-115b",
        512,
        ("--recompute-granularity", "selective", "--recompute-modules", "core_attn", "mlp"),
    ),
    "39b virtual stages": (
        "telechat2-39b-a12b",
        1024,
        (
            "--pipeline-model-parallel-size",
            "4",
            "--num-virtual-stages-per-pipeline-rank",
            "2",
            "--recompute-layout",
            "full*3|none*4|moe*4|none*4|full*4|none*4|none*4|core_attn+layernorm*3",
            "--pipeline-model-parallel-layout",
            "Et*3|t*4|t*4|t*4|t*4|t*4|t*4|t*3L",
        ),
    ),
    "35b groups": (
        "telechat2-35b",
        16,
        (
            *("--pipeline-model-parallel-size", "4", "--num-virtual-stages-per-pipeline-rank", "2"),
            *("--pipeline-model-parallel-layout", "Et*7|t*8|t*8|t*9|t*8|t*8|t*8|t*8L"),
            *("--microbatch-group-size-per-virtual-pipeline-stage", "6", "--global-batch-size", "34"),
        ),
    ),
    "dense and experts": (
        "telechat2-39b-a12b",
        1024,
        ("--moe-layer-freq", "2", "--ffn-hidden-size", "12288", "--no-use-distributed-optimizer"),
    ),
}


def load(name):
    preset, world, flags = RUNS[name]
    return load_run_config(["--preset", preset, "--dry-run", "--world-size", str(world), *flags], {}).run


@pytest.mark.parametrize("name", RUNS)
def test_memory_of_the_planner_is_that_of_the_report(name):
    run = load(name)
    problem = balance_problem(run, NPU, kinds_of(run), reserve_bytes=0.0)
    peaks = simulate(problem, assignment_of(run, problem)).peak_bytes
    assert peaks == pytest.approx([stage.total_bytes for stage in stage_memory(run)], rel=1e-12)


@pytest.mark.parametrize("name", RUNS)
def test_a_plan_goes_to_a_run_and_back(name):
    run = load(name)
    problem = balance_problem(run, NPU, kinds_of(run))
    assignment = assignment_of(run, problem)
    planned = planned_run(run, problem, assignment)
    assert assignment_of(planned.run, problem) == assignment
    assert recompute_plan(planned.run) == recompute_plan(run)
    # the flags, typed after the preset, give the same run
    preset, world, flags = RUNS[name]
    if "--recompute-granularity" in flags:  # the plan takes their place
        flags = ()
    typed = load_run_config(
        ["--preset", preset, "--dry-run", "--world-size", str(world), *flags, *planned.flags], {}
    ).run
    assert assignment_of(typed, problem) == assignment


def test_a_prediction_of_many_microbatches_is_that_of_the_whole_schedule(monkeypatch):
    """Carried on from a part, which ends with the shorter last group."""
    problem = replace(balance_problem(load("35b groups"), NPU), m=6 * 30 + 4)
    assignment = assignment_of(load("35b groups"), problem)
    monkeypatch.setattr(predict_module, "MOST_OPS", 2 * problem.num_stages * 6 * 10)
    makespan, part = predict_module.simulated(problem, assignment)
    assert max(op.microbatch for op in part.ops) + 1 == 6 * 10 + 4
    assert makespan == pytest.approx(simulate(problem, assignment).makespan, rel=1e-9)


def test_groups_follow_the_layer_types():
    problem = balance_problem(load("dense and experts"), NPU, ("full", "core_attn+mlp"))
    assert [group.count for group in problem.groups] == [1] * 30
    assert [mode.name for mode in problem.groups[0].modes] == ["none", "full", "core_attn+moe"]
    assert [mode.name for mode in problem.groups[1].modes] == ["none", "full", "core_attn+mlp"]
    assert problem.groups[0].w > problem.groups[1].w
    (group,) = balance_problem(load("115b"), NPU, ("full", "full", "none")).groups
    assert (group.count, [mode.name for mode in group.modes]) == (96, ["none", "full"])


def test_limits_and_reserve():
    run = load("115b")
    problem = balance_problem(run, NPU)
    assert (problem.mem_limit, problem.const_mem) == (60.9 * 2**30, 3 * 2**30)
    assert balance_problem(run, NPU, mem_limit_bytes=54.5e9, reserve_bytes=1.0).mem_limit == 54.5e9
    assert (problem.P, problem.V, problem.m) == (8, 3, 8)


def test_a_multi_token_prediction_block_has_a_place():
    run = load("115b")
    block = mtp_block(run, NPU)
    problem = balance_problem(run, NPU, mtp=block)
    group, head = problem.groups[0], problem.head
    assert block.f == pytest.approx(group.f + head.f)
    assert group.w < block.w < group.w + head.w
    assert len(problem.mtp_places()) == 8


@pytest.mark.parametrize(
    "text, is_moe, modes",
    [
        ("full", True, ("full",)),
        ("none", False, ()),
        ("mlp+core_attn", False, ("core_attn", "mlp")),
        ("mlp", True, ("moe",)),
        ("moe+layernorm", False, ("mlp", "layernorm")),
    ],
)
def test_kinds(text, is_moe, modes):
    assert of_layer(parse_kind(text), is_moe) == modes


@pytest.mark.parametrize("text", ["ful", "full+mlp", "core_attn,mlp"])
def test_unknown_kinds(text):
    with pytest.raises(ConfigError, match="unknown recompute kind"):
        parse_kind(text)


def plan_of(run, recompute):
    """A plan of four stages of 7, 8, 8, 7 layers, the given numbers of layers recomputed in full."""
    problem = balance_problem(run, NPU)
    modes = tuple(
        (1,) * number + (0,) * (count - number) for count, number in zip((7, 8, 8, 7), recompute, strict=True)
    )
    return planned_run(run, problem, Assignment(modes))


def test_flags_of_megatron():
    run = load_run_config(
        [
            "--preset",
            "telechat2-7b",
            "--dry-run",
            "--world-size",
            "8",
            "--pipeline-model-parallel-size",
            "4",
            "--pipeline-model-parallel-layout",
            "Et*7|t*8|t*8|t*7L",
        ],
        {},
    ).run
    layout = ("--pipeline-model-parallel-layout", "Et*7|t*8|t*8|t*7L")
    block = ("--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers")
    assert plan_of(run, (0, 0, 0, 0)).megatron_flags() == layout
    assert plan_of(run, (2, 2, 2, 2)).megatron_flags() == (*layout, *block, "2")
    assert plan_of(run, (7, 8, 8, 7)).megatron_flags() == (*layout, *block, "8")
    with pytest.raises(ConfigError, match="first N layers of every virtual stage"):
        plan_of(run, (3, 2, 1, 0)).megatron_flags()
    assert plan_of(run, (3, 2, 1, 0)).flags[-1] == "full*3,none*4|full*2,none*6|full,none*7|none*7"


def test_a_plan_without_recompute_turns_that_of_a_preset_off():
    run = load("35b")
    problem = balance_problem(run, NPU)
    planned = planned_run(run, problem, Assignment(((0,) * 16,) * 4))
    typed = load_run_config(["--preset", "telechat2-35b", "--dry-run", *planned.flags], {}).run
    assert recompute_plan(typed) == recompute_plan(planned.run) == ((),) * 64


def test_a_plan_that_would_deadlock_is_refused():
    run = load("35b")
    problem = replace(balance_problem(run, NPU), min_layers=0)
    with pytest.raises(ConfigError, match="deadlock"):
        planned_run(run, problem, Assignment(((0,) * 32, (), (0,) * 16, (0,) * 16)))


@pytest.mark.parametrize("virtual_stages", [1, 3])
def test_many_micro_batches_are_carried_on_exactly(monkeypatch, virtual_stages):
    run = load("115b")
    if virtual_stages == 1:
        parallel = replace(run.parallel, num_virtual_stages_per_pipeline_rank=1, pipeline_model_parallel_layout=None)
        run = replace(run, parallel=parallel)
    run = replace(run, training=replace(run.training, global_batch_size=8 * 8 * 12))
    carried_on = []
    for limit in (10**6, 1):
        monkeypatch.setattr("megatron_telechat.planner.predict.MOST_OPS", limit)
        carried_on.append(predict(run, NPU))
    assert carried_on[0].makespan == pytest.approx(carried_on[1].makespan, rel=1e-9)
    assert len(carried_on[0].simulation.ops) > len(carried_on[1].simulation.ops)
    assert carried_on[0].bubble == pytest.approx(carried_on[1].bubble)


def test_prediction_adds_what_the_schedule_does_not_see():
    run = load("115b")
    prediction = predict(run, NPU)
    parts = prediction.makespan + prediction.messages + prediction.reduction + prediction.optimizer
    assert prediction.iteration == pytest.approx(parts)
    assert prediction.tokens_per_s_per_device == pytest.approx(64 * 8192 / 512 / prediction.iteration)
    exposed = predict(replace(run, parallel=replace(run.parallel, overlap_grad_reduce=False)), NPU)
    assert run.parallel.overlap_grad_reduce and prediction.reduction < exposed.reduction
    assert 0.1 < prediction.bubble < 0.3
