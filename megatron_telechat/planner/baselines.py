"""Assignments that others would choose, for comparison by the same simulator."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from typing import Iterator, Sequence

import numpy as np

from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.descent import Evaluator, starts
from megatron_telechat.planner.device_plans import DevicePlans
from megatron_telechat.planner.graph import makespans, op_graph
from megatron_telechat.planner.plan import Assignment, check_assignment
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import peak_bytes, simulate, stage_times


NEAR = 5
"""Layers a chunk by which a plain split's first and last stages are tried away from the even share."""


LAYOUT_STARTS = 6
"""Plain splits from which the search with a layout string starts, beside those it is given."""


@dataclass(frozen=True)
class Baseline:
    """What a plain way of splitting gives. `makespan` is None where it has no assignment that fits the memory."""

    name: str
    makespan: float | None
    assignment: Assignment | None


def baselines(problem: BalanceProblem) -> list[Baseline]:
    """Megatron's splits (best recompute flags for each), the best plain flags, and the surrogate objectives."""
    return [
        *megatron_splits(problem),
        surrogate(problem, "largest stage"),
        surrogate(problem, "all pairs of chunks"),
    ]


def megatron_splits(problem: BalanceProblem, strict: bool = False) -> list[Baseline]:
    """Megatron's splits (best recompute flags for each), and the best that plain flags without a layout string say.

    strict: recompute only as Megatron's flags can ask for it (see `_plain_modes`).
    """
    splits = _flag_splits(problem)
    best_flags = _best(problem, (one for counts in splits for one in _plain_modes(problem, *counts, strict)))
    return [
        _named("uniform split", problem, uniform_counts(problem), strict),
        _named("account_for_embedding/loss", problem, accounted_counts(problem), strict),
        Baseline("best plain flags", *best_flags),
    ]


def _named(name: str, problem: BalanceProblem, counts: tuple[int, ...] | None, strict: bool = False) -> Baseline:
    place = problem.mtp_places()[-1] if problem.mtp_places() else None
    if counts is None:
        return Baseline(name, None, None)
    return Baseline(name, *_best(problem, _plain_modes(problem, counts, place, strict)))


def uniform_counts(problem: BalanceProblem) -> tuple[int, ...] | None:
    """num_layers / (P V) layers on each virtual stage; None where that is not whole, which Megatron refuses."""
    share, rest = divmod(problem.num_layers, problem.num_stages)
    return (share,) * problem.num_stages if not rest else None


def accounted_counts(problem: BalanceProblem) -> tuple[int, ...] | None:
    """--account-for-embedding-in-pipeline-split and --account-for-loss-in-pipeline-split: each counts as one layer."""
    share, rest = divmod(problem.num_layers + 2, problem.num_stages)
    if rest or share < 1 or problem.num_stages == 1 and share < 2:
        return None
    counts = [share] * problem.num_stages
    counts[0] -= 1
    counts[-1] -= 1
    return tuple(counts)


def _flag_splits(problem: BalanceProblem) -> Iterator[tuple[tuple[int, ...], int | None]]:
    """What plain flags can say: even, accounted, --decoder-first/last-pipeline-num-layers (V chunks alike)."""
    places = problem.mtp_places()
    if not places:
        return
    P, V, total = problem.P, problem.V, problem.num_layers
    found = {counts for counts in (uniform_counts(problem), accounted_counts(problem)) if counts}
    if P > 2:
        near = range(max(total // P - NEAR * V, 0), total // P + NEAR * V + 1)
        for first, last in itertools.product(near, repeat=2):
            rest = total - first - last
            if rest > 0 and not rest % (P - 2) and not (first % V or last % V or rest // (P - 2) % V):
                row = (first // V, *[rest // (P - 2) // V] * (P - 2), last // V)
                found.add(row * V)
    for counts in sorted(found):
        yield counts, places[-1]


def _plain_modes(
    problem: BalanceProblem, counts: tuple[int, ...], place: int | None, strict: bool = False
) -> Iterator[Assignment]:
    """One kind of recompute for all, on the first n layers of every virtual stage (--recompute-num-layers, block).

    strict: kinds other than full are taken on all layers alone, as Megatron's selective recompute is.
    """
    most = max(len(group.modes) for group in problem.groups)
    of_layer = [number for number, group in enumerate(problem.groups) for _ in range(group.count)]
    starts = np.concatenate([[0], np.cumsum(counts)])
    for mode in range(most):
        partly = any(group.modes[mode].name == "full" for group in problem.groups if mode < len(group.modes)) or not strict
        for first in [0] if mode == 0 else range(1 if partly else max(counts), max(counts) + 1):
            stages = []
            for stage, count in enumerate(counts):
                known = [
                    len(problem.groups[of_layer[layer]].modes) for layer in range(starts[stage], starts[stage + 1])
                ]
                stages.append(tuple(mode if at < first and mode < known[at] else 0 for at in range(count)))
            yield Assignment(tuple(stages), place)


def _best(problem: BalanceProblem, candidates: Iterator[Assignment]) -> tuple[float | None, Assignment | None]:
    fitting = []
    for assignment in dict.fromkeys(candidates):
        try:
            check_assignment(problem, assignment)
        except ConfigError:
            continue
        if max(peak_bytes(problem, assignment)) <= problem.mem_limit:
            fitting.append(assignment)
    if not fitting:
        return None, None
    times = np.array([stage_times(problem, assignment) for assignment in fitting], dtype=float)
    best = fitting[int(np.argmin(makespans(op_graph(problem.P, problem.V, problem.m), times, problem.p2p)))]
    return simulate(problem, best).makespan, best


def best_with_layout_string(problem: BalanceProblem, begin: Sequence[Assignment], time_limit_s: float) -> Baseline:
    """The best found of what --pipeline-model-parallel-layout with one set of recompute flags can say.

    One kind of recompute for all, on the first n layers of every virtual stage. For each of these settings single
    layers are moved between stages while that helps, from the splits of `begin` and from Megatron's own.
    """
    name = "layout string and plain recompute"
    deadline = time.perf_counter() + time_limit_s
    place = problem.mtp_places()[-1] if problem.mtp_places() else None
    splits = dict.fromkeys([one.counts for one in begin] + [counts for counts, _ in _flag_splits(problem)][:LAYOUT_STARTS])
    best = Baseline(name, None, None)
    for counts in splits:
        here = math.inf
        while True:
            near = [counts, *_moved(counts, problem.fewest_layers(place))]
            value, found = _best(problem, (one for split in near for one in _plain_modes(problem, split, place, True)))
            if value is None or found is None or value >= here * (1 - 1e-12):
                break
            here, counts = value, found.counts
            if best.makespan is None or value < best.makespan:
                best = Baseline(name, value, found)
            if time.perf_counter() > deadline:
                return best
    return best


def _moved(counts: tuple[int, ...], fewest: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Splits that differ by one layer on another stage."""
    for a, b in itertools.permutations(range(len(counts)), 2):
        if counts[a] > fewest[a]:
            near = list(counts)
            near[a] -= 1
            near[b] += 1
            yield tuple(near)


def surrogate(problem: BalanceProblem, kind: str) -> Baseline:
    """The assignment that a published surrogate of the makespan likes best, found by descent from several starts.

    kind: "largest stage": m times the largest time of a device, and one pass of all stages (the objective of
    planners for 1F1B, PipeDream and its successors); "all pairs of chunks": in the steady state every device runs
    a forward of one chunk beside a backward of another, so the sum over pairs of chunks of the largest such time of
    any device, times m / V, and one pass (the interleaved objective of SAPP-PPB, re-stated here).
    """
    evaluator = Evaluator(problem, DevicePlans(problem))
    best: tuple[float, Assignment] | None = None
    for place in problem.mtp_places():
        for start in starts(problem, place):
            counts = _surrogate_descent(evaluator, start, place, kind)
            if not math.isfinite(float(evaluator.spans(np.array([counts]), place)[0])):
                continue
            assignment = evaluator.assignment(counts, place)
            value = surrogate_value(problem, stage_times(problem, assignment), kind)
            if best is None or value < best[0]:
                best = value, assignment
    if best is None:
        return Baseline(f"surrogate: {kind}", None, None)
    return Baseline(f"surrogate: {kind}", simulate(problem, best[1]).makespan, best[1])


def surrogate_value(problem: BalanceProblem, times: Sequence[float], kind: str) -> float:
    """The surrogate of the makespan for these stage times (forward, then backward)."""
    C, P, V = problem.num_stages, problem.P, problem.V
    forward, backward = np.array(times[:C]).reshape(V, P), np.array(times[C:]).reshape(V, P)
    one_pass = float(forward.sum() + backward.sum())
    if kind == "largest stage":
        return problem.m * float((forward.sum(axis=0) + backward.sum(axis=0)).max()) + one_pass / V
    pairs = (forward[:, None, :] + backward[None, :, :]).max(axis=2)
    return problem.m / V * float(pairs.sum()) + one_pass / V


def _surrogate_descent(evaluator: Evaluator, start: tuple[int, ...], place: int | None, kind: str) -> tuple[int, ...]:
    """Move single layers while the surrogate falls."""
    problem = evaluator.problem
    fewest = problem.fewest_layers(place)
    last = problem.num_stages if place is None else place + 1

    def value(counts: tuple[int, ...]) -> float:
        inside = evaluator.compositions(np.array([counts]))
        extra, fits = evaluator.extra(inside, place)
        if not fits[0]:
            return math.inf
        blocks = [problem.fixed_block(stage, place) for stage in range(problem.num_stages)]
        forward = inside[0] @ evaluator.f + [block.f for block in blocks]
        backward = inside[0] @ evaluator.b + [block.b for block in blocks] + extra[0]
        return surrogate_value(problem, [*forward, *backward], kind)

    here, cost = start, value(start)
    improved = True
    while improved:
        improved = False
        for a, b in itertools.permutations(range(last), 2):
            if here[a] <= fewest[a]:
                continue
            near = list(here)
            near[a] -= 1
            near[b] += 1
            found = value(tuple(near))
            if found < cost * (1 - 1e-12) or math.isinf(cost) and math.isfinite(found):
                here, cost, improved = tuple(near), found, True
    return here
