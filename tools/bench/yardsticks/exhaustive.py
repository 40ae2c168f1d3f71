"""Exhaustive search of small balance problems: the yardstick of the solver, plain on purpose."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator

import numpy as np

from megatron_telechat.planner.assignment import Assignment, Solution, stage_groups
from megatron_telechat.planner.op_graph import makespans, op_graph
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import in_flight, simulate, stage_times

BATCH = 4096
"""Assignments that are simulated at once."""


def solve_exhaustively(problem: BalanceProblem) -> Solution:
    """Try every split of the layers and every choice of modes.

    For a split, a device's choices of modes that another choice of it beats in every backward time (and that fits too)
    are left out: the makespan never falls when an op takes longer. Ties go to the first found.

    Raises:
        ConfigError: the schedule of P, V, m cannot run.
    """
    started = time.perf_counter()
    graph = op_graph(*problem.schedule)
    best, plan = math.inf, None
    least = math.inf  # bytes over the limit, of the best assignment that does not fit
    possible = False
    for batch in _batches(_assignments(problem)):
        fitting = []
        for lacking, assignment in batch:
            possible = True
            least = min(least, lacking)
            if assignment is not None:
                fitting.append(assignment)
        if not fitting:
            continue
        times = np.array([stage_times(problem, one) for one in fitting], dtype=float)
        spans = makespans(graph, times, problem.p2p)
        for device in range(problem.P if problem.slow_stage else 0):
            slower = times.copy()
            slower[:, device :: problem.P] *= 1 + problem.slow_stage
            spans = np.maximum(spans, makespans(graph, slower, problem.p2p))
        at = int(np.argmin(spans))
        if spans[at] < best:
            best, plan = float(spans[at]), fitting[at]
    seconds = time.perf_counter() - started
    if plan is None:
        reason = "no assignment fits the memory limit" if possible else "the stages need more layers than there are"
        return Solution("infeasible", seconds=seconds, shortfall=least if possible else None, reason=reason)
    result = simulate(problem, plan)
    return Solution("optimal", result.makespan, result.makespan, 0.0, plan, result.peak_bytes, seconds)


def _batches(items: Iterator) -> Iterator[list]:
    while batch := list(itertools.islice(items, BATCH)):
        yield batch


def splits(problem: BalanceProblem) -> Iterator[tuple[int | None, tuple[int, ...]]]:
    """(MTP stage, layers of each virtual stage) for all that the rules allow."""
    for place in problem.mtp_places():
        fewest = problem.fewest_layers(place)
        last = problem.num_stages if place is None else place + 1
        for counts in _compositions(problem.num_layers, fewest[:last]):
            yield place, counts + (0,) * (problem.num_stages - last)


def _compositions(total: int, fewest: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if len(fewest) == 1:
        if total >= fewest[0]:
            yield (total,)
        return
    for first in range(fewest[0], total - sum(fewest[1:]) + 1):
        for rest in _compositions(total - first, fewest[1:]):
            yield (first, *rest)


def _assignments(problem: BalanceProblem) -> Iterator[tuple[float, Assignment | None]]:
    """For each split: (bytes over the limit in the best case, an assignment or None), all that can be the best."""
    cache: dict[tuple, tuple[float, list[tuple[tuple[int, ...], ...]]]] = {}
    for place, counts in splits(problem):
        in_stage = stage_groups(problem, counts)
        plans, lacking = [], -math.inf
        for device in range(problem.P):
            stages = range(device, problem.num_stages, problem.P)
            key = (device, tuple(tuple(in_stage[stage]) for stage in stages), place if place in stages else None)
            if key not in cache:
                cache[key] = _device_plans(problem, device, in_stage, place)
            lacking = max(lacking, cache[key][0])
            plans.append(cache[key][1])
        if lacking > 0:
            yield lacking, None
            continue
        for chosen in itertools.product(*plans):
            yield (
                lacking,
                Assignment(tuple(chosen[stage % problem.P][stage // problem.P] for stage in range(len(counts))), place),
            )


def _device_plans(
    problem: BalanceProblem, device: int, in_stage: list[list[int]], place: int | None
) -> tuple[float, list[tuple[tuple[int, ...], ...]]]:
    """(least bytes over the limit, choices of modes of the device's virtual stages that fit and that no other
    beats)."""
    stages = range(device, problem.num_stages, problem.P)
    choices = [_stage_choices(problem, in_stage[stage]) for stage in stages]
    least = math.inf
    fitting: dict[tuple[float, ...], tuple[tuple[int, ...], ...]] = {}
    for chosen in itertools.product(*choices):
        lacking = _device_peak(problem, device, in_stage, chosen, place) - problem.mem_limit
        least = min(least, lacking)
        if lacking <= 0:
            fitting.setdefault(
                tuple(_extra(problem, in_stage[stage], modes) for stage, modes in zip(stages, chosen, strict=True)),
                chosen,
            )
    kept = [
        chosen
        for extra, chosen in fitting.items()
        if not any(other != extra and all(a <= b for a, b in zip(other, extra, strict=True)) for other in fitting)
    ]
    return least, kept


def _stage_choices(problem: BalanceProblem, in_group: list[int]) -> list[tuple[int, ...]]:
    """Modes of the layers of a stage, up to the order of like layers."""
    per_group = [
        itertools.combinations_with_replacement(range(len(group.modes)), count)
        for group, count in zip(problem.groups, in_group, strict=True)
    ]
    return [sum(chosen, ()) for chosen in itertools.product(*per_group)]


def _extra(problem: BalanceProblem, in_group: list[int], modes: tuple[int, ...]) -> float:
    groups = [group for group, count in zip(problem.groups, in_group, strict=True) for _ in range(count)]
    return math.fsum(group.modes[mode].extra_b for group, mode in zip(groups, modes, strict=True))


def _device_peak(
    problem: BalanceProblem,
    device: int,
    in_stage: list[list[int]],
    chosen: tuple[tuple[int, ...], ...],
    place: int | None,
) -> float:
    stages = range(device, problem.num_stages, problem.P)
    weights, kept, transient = 0.0, [], []
    for stage, modes in zip(stages, chosen, strict=True):
        fixed = problem.fixed_block(stage, place)
        groups = [group for group, count in zip(problem.groups, in_stage[stage], strict=True) for _ in range(count)]
        weights += fixed.w + math.fsum(group.w for group in groups)
        kept.append(fixed.act + math.fsum(group.modes[mode].act for group, mode in zip(groups, modes, strict=True)))
        used = [group.modes[mode].ws for group, mode in zip(groups, modes, strict=True)]
        transient.append(max([fixed.ws, *used]))
    most = max(
        sum(count * size for count, size in zip(moment.held, kept, strict=True))
        + (0.0 if moment.backward is None else transient[moment.backward])
        for moment in in_flight(*problem.schedule)[device]
    )
    return problem.const_mem + weights + most
