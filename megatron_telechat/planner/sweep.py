"""Parallel layouts of a cluster, each with its best pipeline, ranked by tokens a second."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.context import KEEP, SIZE, SPLIT, context_sizes, ways
from megatron_telechat.planner.plan import Plan, Question, make_plan
from megatron_telechat.planner.problem import BalanceProblem

MOST_VIRTUAL_STAGES = 4
FIRST_LOOK_S, FIRST_LOOK_GAP = 0.15, 0.02
"""Search for one candidate; the best few get the time that is left."""
FIRST_LOOK_SHARE = 0.6
"""Of the time limit, for first looks."""
FLAGS = {
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    SIZE: "--context-parallel-size",
    "num_virtual_stages_per_pipeline_rank": "--num-virtual-stages-per-pipeline-rank",
    "expert_model_parallel_size": "--expert-model-parallel-size",
    "micro_batch_size": "--micro-batch-size",
}
"""Sizes that a sweep varies, and how to ask for them."""
VARIED = (*FLAGS, *SPLIT, KEEP)
"""All that a sweep varies, unless it is fixed."""


@dataclass(frozen=True)
class Candidate:
    """One parallel layout. `bound_s`: no split of it runs the pipeline in less; `guess_s`: what it may take."""

    flags: tuple[str, ...]
    question: Question
    problem: BalanceProblem
    bound_s: float
    guess_s: float


@dataclass(frozen=True)
class Ranking:
    """What a sweep found.

    Attributes:
        plans: fastest first, with the flags of each.
        tried: layouts that were solved; no_fit: of them, those that do not fit the memory.
        skipped: layouts that cannot be among the best, by a bound, and were not solved.
        unseen: layouts for which there was no time.
    """

    plans: tuple[tuple[tuple[str, ...], Plan], ...]
    tried: int
    no_fit: int
    skipped: int
    unseen: int


def candidates(question: Question, load: Callable[..., RunConfig], fixed: Mapping[str, Any]) -> list[Candidate]:
    """All layouts of the run's ranks that the configuration takes, most promising first.

    Args:
        load: the run with some flags added; raises ConfigError where they do not go together.
        fixed: those of VARIED that keep their value.
    """
    found: list[Candidate] = []
    for sizes in _sizes(question.run, fixed):
        flags = tuple(word for name, size in sizes.items() for word in (FLAGS[name], str(size)))
        try:
            run = load(*flags)
            run = replace(run, training=replace(run.training, device=question.run.training.device))
            if run.num_microbatches < 1:
                continue
            for more, way in ways(run, question.device, question.software, fixed, question.plain):
                asked = replace(question, run=way)
                problem = asked.problem()
                found.append(Candidate((*flags, *more), asked, problem, work_bound(problem), guess(problem)))
        except ConfigError:
            continue
    return sorted(found, key=lambda one: one.guess_s)


def _sizes(run: RunConfig, fixed: Mapping[str, Any]) -> Iterator[dict[str, int]]:
    parallel, model = run.parallel, run.model
    world = parallel.world_size
    node = parallel.node_size
    batch = run.training.global_batch_size

    def choices(name: str, values: Sequence[int]) -> Sequence[int]:
        return [fixed[name]] if name in fixed else values

    tensors = choices(
        "tensor_model_parallel_size", [size for size in _divisors(node) if model.num_attention_heads % size == 0]
    )
    stages = choices("pipeline_model_parallel_size", [size for size in _divisors(world) if size <= model.num_layers])
    virtual_stages = choices("num_virtual_stages_per_pipeline_rank", range(1, MOST_VIRTUAL_STAGES + 1))
    experts = choices("expert_model_parallel_size", _divisors(model.num_experts)) if model.num_experts else [0]
    micro = choices("micro_batch_size", [size for size in (1, 2, 4, 8) if batch % size == 0])
    contexts = choices(SIZE, context_sizes(run))
    for tensor, stage, context, virtual_stage, expert, size in itertools.product(
        tensors, stages, contexts, virtual_stages, experts, micro
    ):
        shared = tensor * stage * context
        if world % shared or (stage == 1 and virtual_stage > 1) or stage * virtual_stage > model.num_layers:
            continue
        data = world // shared
        if batch % (data * size) or (virtual_stage > 1 and batch // (data * size) % stage):
            continue
        # half of both is as many tokens on a rank, and less traffic
        if context % 2 == 0 and size % 2 == 0 and not {SIZE, "micro_batch_size"} & {*fixed}:
            continue
        sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": stage}
        if contexts != [1] or parallel.context_parallel_size > 1:
            sizes |= {SIZE: context}
        sizes |= {"num_virtual_stages_per_pipeline_rank": virtual_stage, "micro_batch_size": size}
        yield sizes | ({"expert_model_parallel_size": expert} if expert else {})


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def work_bound(problem: BalanceProblem) -> float:
    """Seconds below which no split can run: the work of all stages, without recompute, shared by all devices; the
    fullest device has at least the mean."""
    layers = math.fsum(group.count * (group.f + group.b) for group in problem.groups)
    ends = math.fsum((problem.embed.f, problem.embed.b, problem.head.f, problem.head.b))
    return problem.m * (layers + ends) / problem.P


def guess(problem: BalanceProblem) -> float:
    """Seconds that an even split may take, to order candidates by: work, bubble, and the recompute that makes stage 0
    fit."""
    layers, stages = problem.num_layers, problem.P * problem.V
    in_flight = min(problem.m, problem.P + (problem.P - 1) / problem.V)
    leanest = [min(group.modes, key=lambda mode: mode.act) for group in problem.groups]
    kept = sum(group.count * group.modes[0].act for group in problem.groups) / problem.P * in_flight
    saved = (
        kept
        - sum(group.count * mode.act for group, mode in zip(problem.groups, leanest, strict=True))
        / problem.P
        * in_flight
    )
    resident = sum(group.count * group.w for group in problem.groups) / problem.P + max(problem.embed.w, problem.head.w)
    over = problem.const_mem + resident + kept - problem.mem_limit
    share = max(over, 0.0) / saved if saved else math.inf * (over > 0)
    extra = (
        problem.m
        / problem.P
        * sum(group.count * mode.extra_b for group, mode in zip(problem.groups, leanest, strict=True))
    )
    bubble = (problem.P - 1) / (problem.V * problem.m)
    uneven = -(-layers // stages) * stages / layers
    return (work_bound(problem) + extra * share) * (1 + bubble) * uneven * (1 if share <= 1 else 1e3)


def sweep(found: Sequence[Candidate], top: int, time_limit_s: float) -> Ranking:
    """Solve the candidates, most promising first, those left out that a bound says cannot be among the `top` best; then
    search longer for the best."""
    deadline = time.perf_counter() + time_limit_s
    looks_until = deadline - (1 - FIRST_LOOK_SHARE) * time_limit_s
    best: list[tuple[Candidate, Plan]] = []
    tried = no_fit = skipped = 0
    for one in found:
        worst = best[top - 1][1].prediction.iteration if len(best) >= top else math.inf
        if one.bound_s >= worst:
            skipped += 1
            continue
        if time.perf_counter() > looks_until:
            continue
        tried += 1
        plan = _solved(one, FIRST_LOOK_S, FIRST_LOOK_GAP)
        if plan is None:
            no_fit += 1
            continue
        best.append((one, plan))
        best.sort(key=lambda pair: pair[1].prediction.iteration)
        del best[max(top, 1) * 2 :]
    refined = []
    for number, (one, plan) in enumerate(best[:top]):
        left = deadline - time.perf_counter()
        share = left / (min(len(best), top) - number)
        again = (
            _solved(one, min(share, one.question.time_limit_s), one.question.gap)
            if plan.gap > 1e-6 and share > FIRST_LOOK_S
            else None
        )
        refined.append((one.flags, again if again is not None and again.makespan <= plan.makespan else plan))
    refined.sort(key=lambda pair: pair[1].prediction.iteration)
    return Ranking(tuple(refined), tried, no_fit, skipped, len(found) - tried - skipped)


def _solved(one: Candidate, time_limit_s: float, gap: float) -> Plan | None:
    plan, _, _ = make_plan(replace(one.question, time_limit_s=max(time_limit_s, 0.05), gap=gap), one.problem)
    return plan
