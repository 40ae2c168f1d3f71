"""Assignments that others would choose, for comparison by the same simulator."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_telechat.config.split import SplitFlags, split_counts
from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.assignment import Assignment, check_assignment
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import peak_bytes, simulate, stage_times
from megatron_telechat.planner.slow_stage import worst_makespans

NEAR = 5
"""Layers a virtual stage by which a plain split's first and last stages are tried away from the even share."""


LAYOUT_STARTS = 6
"""Plain splits from which the search with a layout string starts, beside those it is given."""


@dataclass(frozen=True)
class Baseline:
    """What another way of splitting gives. `makespan` is None where it has no assignment that fits the memory.

    `proved`: False where a search for it was cut short. `why`: what keeps it from being one, where that is not memory.
    """

    name: str
    makespan: float | None
    assignment: Assignment | None
    proved: bool = True
    why: str = ""


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
    return _split(problem, SplitFlags(embedding=True, loss=True))


def _split(problem: BalanceProblem, split: SplitFlags) -> tuple[int, ...] | None:
    try:
        return split_counts(problem.num_layers, problem.P, problem.V, split)
    except ConfigError:
        return None


def _flag_splits(problem: BalanceProblem) -> Iterator[tuple[tuple[int, ...], int | None]]:
    """What plain flags can say: even, embedding or loss or both counted, --decoder-first/last-pipeline-num-layers."""
    places = problem.mtp_places()
    if not places:
        return
    share, V = problem.num_layers // problem.P, problem.V
    near = [None, *range(max(share - NEAR * V, 1), share + NEAR * V + 1)]
    splits = [SplitFlags(first, last) for first, last in itertools.product(near, repeat=2)]
    splits += [
        SplitFlags(embedding=embedding, loss=loss) for embedding, loss in itertools.product((False, True), repeat=2)
    ]
    found = {_split(problem, split) for split in splits}
    for counts in sorted(counts for counts in found if counts is not None):
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
        partly = (
            any(group.modes[mode].name == "full" for group in problem.groups if mode < len(group.modes)) or not strict
        )
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
    best = fitting[int(np.argmin(worst_makespans(problem, times)))]
    return simulate(problem, best).makespan, best


def best_with_layout_string(problem: BalanceProblem, begin: Sequence[Assignment], time_limit_s: float) -> Baseline:
    """The best found of what --pipeline-model-parallel-layout with one set of recompute flags can say.

    One kind of recompute for all, on the first n layers of every virtual stage. For each of these settings single
    layers are moved between stages while that helps, from the splits of `begin` and from Megatron's own.
    """
    name = "layout string and plain recompute"
    deadline = time.perf_counter() + time_limit_s
    place = problem.mtp_places()[-1] if problem.mtp_places() else None
    splits = dict.fromkeys(
        [one.counts for one in begin] + [counts for counts, _ in _flag_splits(problem)][:LAYOUT_STARTS]
    )
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
