"""Random small clusters whose whole space of layouts exhaustive search can finish."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_telechat.config import load_run_config
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.devices import device_spec
from megatron_telechat.costs.software import Software
from megatron_telechat.planner.assignment import Assignment
from megatron_telechat.planner.plan import Question
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import peak_bytes, simulate
from megatron_telechat.planner.space import Layout, layouts


@dataclass(frozen=True)
class Cluster:
    """A run on some ranks, and its whole space."""

    question: Question
    load: Callable[..., RunConfig]
    space: list[Layout]


def cluster(
    words: str, device: str, memory_gib: float | None = None, offload: bool = True, slow_stage: float = 0.0
) -> Cluster:
    """The space of a run on a device."""

    def load(*changes: str) -> RunConfig:
        return load_run_config([*words.split(), "--dry-run"], {}, planning=True, changes=changes).run

    spec, run = device_spec(device), load()
    assert spec is not None
    memory = None if memory_gib is None else memory_gib * 2**30
    question = Question(
        run, spec, ("core_attn", "full"), memory_bytes=memory, software=Software.of(run), slow_stage=slow_stage
    )
    return Cluster(question, load, layouts(question, load, {}, offload))


def small_cluster(seed: int) -> Cluster:
    """One of any kind: dense and experts, one to eight ranks, long rows, little and much memory, with and without
    overlap, sharding and a slow stage."""
    rng = random.Random(seed)
    ranks = rng.choice([2, 4, 4, 8])
    preset = rng.choice(["telechat2-7b", "telechat2-39b-a12b", "telechat2-35b"])
    words = f"--preset {preset} --num-layers {rng.choice([2, 3, 4])} --world-size {ranks} --ranks-per-node "
    words += str(rng.choice([ranks, max(ranks // 2, 1)]))
    words += " --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1"
    words += f" --global-batch-size {ranks * rng.choice([1, 2])}"
    if preset == "telechat2-39b-a12b":
        words += " --num-experts 4 --moe-router-topk 2 --expert-model-parallel-size 1"
    if rng.random() < 0.3:
        words += " --seq-length 32768"
    words += rng.choice(["", " --no-overlap-param-gather --no-overlap-grad-reduce", " --loss-chunk-rows 2048"])
    if rng.random() < 0.3:
        words += " --no-overlap-param-gather --no-use-distributed-optimizer"
    device, memory = rng.choice(["h100-80g", "a100-40g"]), rng.choice([None, 16, 24, 32, 48])
    return cluster(words, device, memory, slow_stage=rng.choice([0.0, 0.0, 0.1]))


def assignments(problem: BalanceProblem) -> Iterator[Assignment]:
    """Every split, and every choice of modes up to the order of like layers."""
    of_layer = [group for group in problem.groups for _ in range(group.count)]
    stages, total = problem.num_stages, problem.num_layers
    fewest = problem.fewest_layers(None)
    for cuts in itertools.combinations_with_replacement(range(total + 1), stages - 1):
        edges = (0, *cuts, total)
        parts = [of_layer[low:high] for low, high in itertools.pairwise(edges)]
        if any(len(part) < least for part, least in zip(parts, fewest, strict=True)):
            continue
        choices = []
        for part in parts:
            alike = [list(same) for _, same in itertools.groupby(part)]
            some = [itertools.combinations_with_replacement(range(len(one[0].modes)), len(one)) for one in alike]
            choices.append([sum(chosen, ()) for chosen in itertools.product(*some)])
        for modes in itertools.product(*choices):
            yield Assignment(modes)


def exhaustive(problem: BalanceProblem) -> tuple[float, Assignment | None]:
    """Seconds of the fastest step that fits."""
    best, plan = math.inf, None
    for one in assignments(problem):
        if max(peak_bytes(problem, one)) <= problem.mem_limit:
            seconds = simulate(problem, one).total
            if seconds < best:
                best, plan = seconds, one
    return best, plan
