"""Good assignments, fast: round a point, then move single layers as long as that helps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence

import numpy as np

from megatron_telechat.planner.assignment import Assignment
from megatron_telechat.planner.device_plans import DevicePlans
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.rest import rest_seconds
from megatron_telechat.planner.slow_stage import worst_makespans


class Evaluator:
    """Makespan of many splits at once, each with the modes that fit and add the least time."""

    def __init__(self, problem: BalanceProblem, plans: DevicePlans):
        self.problem, self.plans = problem, plans
        self.ends = np.cumsum([group.count for group in problem.groups])
        self.f = np.array([group.f for group in problem.groups], dtype=float)
        self.b = np.array([group.b for group in problem.groups], dtype=float)
        self.w = np.array([group.w for group in problem.groups], dtype=float)
        first = [group.modes[0] for group in problem.groups]
        self.b0 = np.array([mode.extra_b for mode in first], dtype=float)
        self.act0 = np.array([mode.act for mode in first], dtype=float)
        self.ws0 = np.array([mode.ws for mode in first], dtype=float)
        self.mode0_is_fastest = all(
            group.modes[0].extra_b == min(mode.extra_b for mode in group.modes) for group in problem.groups
        )

    def compositions(self, counts: np.ndarray) -> np.ndarray:
        """[K, C] layers of the stages -> [K, C, G] layers of each group."""
        upper = np.cumsum(counts, axis=1)[:, :, None]
        lower = upper - counts[:, :, None]
        starts = self.ends - np.diff(self.ends, prepend=0)
        return np.maximum(np.minimum(upper, self.ends) - np.maximum(lower, starts), 0)

    def spans(self, counts: np.ndarray, place: int | None) -> np.ndarray:
        """Makespan of each row of [K, C]; inf where nothing fits."""
        problem = self.problem
        inside = self.compositions(counts)
        blocks = [problem.fixed_block(stage, place) for stage in range(problem.num_stages)]
        forward = inside @ self.f + [block.f for block in blocks]
        backward = inside @ self.b + [block.b for block in blocks]
        extra, fits = self.extra(inside, place)
        out = np.full(len(counts), math.inf)
        if fits.any():
            times = np.concatenate([forward, backward + extra], axis=1)[fits]
            out[fits] = worst_makespans(problem, times) + rest_seconds(problem, inside[fits], times)
        return out

    def extra(self, inside: np.ndarray, place: int | None) -> tuple[np.ndarray, np.ndarray]:
        """For compositions [K, C, G]: (time that the best fitting modes add to each stage [K, C], which rows fit)."""
        problem, plans = self.problem, self.plans
        extra = inside @ self.b0
        fits = np.ones(len(inside), dtype=bool)
        blocks = [problem.fixed_block(stage, place) for stage in range(problem.num_stages)]
        act = inside @ self.act0 + [block.act for block in blocks]
        weight = inside @ self.w + [block.w for block in blocks]
        transient = np.maximum(np.max((inside > 0) * self.ws0, axis=2), [block.ws for block in blocks])
        for device in range(problem.P):
            stages = slice(device, None, problem.P)
            most = act[:, stages] @ plans.held[device].T
            for at, virtual_stage in enumerate(plans.backward[device]):
                if virtual_stage is not None:
                    most[:, at] += transient[:, virtual_stage * problem.P + device]
            tight = problem.const_mem + weight[:, stages].sum(axis=1) + most.max(axis=1) > problem.mem_limit * (
                1 - 1e-12
            )
            if not self.mode0_is_fastest:
                tight[:] = True
            mtp_virtual_stage = None if place is None or place % problem.P != device else place // problem.P
            rows = np.flatnonzero(tight & fits)
            kinds, of_row = np.unique(inside[rows, stages], axis=0, return_inverse=True)
            for at, kind in enumerate(kinds.tolist()):
                same = rows[of_row.ravel() == at]
                plan = plans.best(device, tuple(map(tuple, kind)), mtp_virtual_stage)
                if plan is None:
                    fits[same] = False
                else:
                    extra[same, stages] = plan.extra
        return extra, fits

    def assignment(self, counts: Sequence[int], place: int | None) -> Assignment:
        """The split with its modes, improved device by device among all plans that fit."""
        problem, plans = self.problem, self.plans
        inside = self.compositions(np.array([counts]))[0]
        chosen, options = [], []
        for device in range(problem.P):
            mtp_virtual_stage = None if place is None or place % problem.P != device else place // problem.P
            key = (device, tuple(map(tuple, inside[device :: problem.P].tolist())), mtp_virtual_stage)
            chosen.append(plans.best(*key))
            alone = problem.V == 1 or not any(chosen[-1].extra) or plans.many(key[1])
            options.append([chosen[-1]] if alone else plans.all(*key))
        blocks = [problem.fixed_block(stage, place) for stage in range(problem.num_stages)]
        base = np.concatenate(
            [inside @ self.f + [one.f for one in blocks], inside @ self.b + [one.b for one in blocks]]
        )
        improved = any(len(option) > 1 for option in options)
        best = math.inf
        while improved:
            improved = False
            trials = [(device, plan) for device in range(problem.P) for plan in options[device][:200]]
            times = np.repeat(base[None], len(trials), axis=0)
            for row, (device, plan) in enumerate(trials):
                for other in range(problem.P):
                    times[row, problem.num_stages + other :: problem.P] += (
                        plan if other == device else chosen[other]
                    ).extra
            spans = worst_makespans(problem, times)
            spans += rest_seconds(problem, np.repeat(inside[None], len(times), axis=0), times)
            at = int(np.argmin(spans))
            if spans[at] < best * (1 - 1e-12):
                best, improved = float(spans[at]), True
                chosen[trials[at][0]] = trials[at][1]
        return Assignment(
            tuple(chosen[stage % problem.P].modes[stage // problem.P] for stage in range(problem.num_stages)), place
        )


def round_counts(
    problem: BalanceProblem, point: Sequence[float] | np.ndarray, place: int | None
) -> tuple[int, ...] | None:
    """Whole layer counts near `point` that keep the rules; None if there are none."""
    fewest = problem.fewest_layers(place)
    last = problem.num_stages if place is None else place + 1
    if sum(fewest) > problem.num_layers:
        return None
    counts, run, given = [], 0.0, 0
    for stage in range(problem.num_stages):
        run += point[stage] if stage < last else 0.0
        take = max(fewest[stage], round(run) - given) if stage < last else 0
        counts.append(take)
        given += take
    while given != problem.num_layers:
        step = 1 if given < problem.num_layers else -1
        free = [stage for stage in range(last) if step > 0 or counts[stage] > fewest[stage]]
        stage = max(free, key=lambda one: step * (point[one] - counts[one]))
        counts[stage] += step
        given += step
    return tuple(counts)


def descend(
    evaluator: Evaluator,
    counts: tuple[int, ...],
    place: int | None,
    deadline: float,
    patience: int = 3,
    most_steps: int | None = None,
) -> tuple[float, tuple[int, ...]]:
    """Move one layer at a time to the best neighbour not seen before; stop after `patience` steps without gain, or
    `most_steps`.

    Returns:
        (makespan, layers of the stages); the makespan is inf if nothing that fits was met.
    """
    problem = evaluator.problem
    fewest = np.array(problem.fewest_layers(place))
    last = problem.num_stages if place is None else place + 1
    here, idle, seen = counts, 0, {counts}
    best = (float(evaluator.spans(np.array([counts]), place)[0]), counts)
    while idle < patience and time.perf_counter() < deadline:
        if most_steps is not None and len(seen) > most_steps:
            break
        rows = np.array(here)
        giving = [stage for stage in range(last) if rows[stage] > fewest[stage]]
        moves = [(a, b) for a in giving for b in range(last) if a != b]
        near = np.repeat(rows[None], len(moves), axis=0)
        at = np.arange(len(moves))
        if not moves:
            break
        near[at, [a for a, _ in moves]] -= 1
        near[at, [b for _, b in moves]] += 1
        spans = evaluator.spans(near, place)
        for row in np.argsort(spans, kind="stable"):
            found = tuple(near[row].tolist())
            if found not in seen:
                break
        else:
            break
        if not math.isfinite(spans[row]):
            break
        seen.add(found)
        here = found
        if spans[row] < best[0] * (1 - 1e-12):
            best, idle = (float(spans[row]), found), 0
        else:
            idle += 1
    return best


def starts(problem: BalanceProblem, place: int | None) -> Iterable[tuple[int, ...]]:
    """Splits to begin with: even layers, even times, and ones that favour later devices (fewer activations)."""
    last = problem.num_stages if place is None else place + 1
    total = problem.num_layers
    seen = set()
    mean = sum(group.count * (group.f + group.b) for group in problem.groups) / max(total, 1) or 1.0
    fixed = [problem.fixed_block(stage, place) for stage in range(last)]
    taken = np.array([(block.f + block.b) / mean for block in fixed])
    level = (total + taken.sum()) / last
    for slope in (0.0, 0.5, 1.0):
        tilt = np.array([1 + slope * (stage % problem.P - (problem.P - 1) / 2) / problem.P for stage in range(last)])
        for point in (np.full(last, total / last) * tilt, np.maximum(level - taken, 0) * tilt):
            point = np.concatenate([point * total / max(point.sum(), 1e-12), np.zeros(problem.num_stages - last)])
            counts = round_counts(problem, point, place)
            if counts is not None and counts not in seen:
                seen.add(counts)
                yield counts
