"""Seconds of an iteration beside the pipeline (`BalanceProblem.rest`), of whole splits and of points of the LP."""

from __future__ import annotations

import numpy as np

from megatron_telechat.planner.problem import BalanceProblem, DeviceCost


def rest_seconds(problem: BalanceProblem, inside: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Of many splits at once, [K].

    Args:
        inside: [K, C, G] layers of each group on each virtual stage.
        times: [K, 2 C] forward, then backward times of the virtual stages.
    """
    total = np.zeros(len(inside))
    if not problem.rest:
        return total
    P, C = problem.P, problem.num_stages
    layers = np.stack([inside[:, device::P].sum(axis=1) for device in range(P)], axis=1)
    forward, backward = (
        np.stack([part[:, device::P].sum(axis=1) for device in range(P)], axis=1)
        for part in (times[:, :C], times[:, C:])
    )
    for costs in problem.rest:
        parts = []
        for cost in costs:
            seconds = layers @ np.array(cost.layers) + cost.forward * forward + cost.backward * backward + cost.constant
            seconds[:, 0] += cost.embed
            seconds[:, -1] += cost.head
            parts.append(seconds.max(axis=1))
        total += np.max(parts, axis=0)
    return total


def least_seconds(problem: BalanceProblem) -> float:
    """Less than the rest of any split: the fullest device has at least the mean of all."""
    groups, blocks = problem.groups, problem.blocks
    forward = sum(group.count * group.f for group in groups) + sum(block.f for block in blocks)
    backward = sum(group.count * group.b for group in groups) + sum(block.b for block in blocks)
    extra = [[group.count * mode.extra_b for mode in group.modes] for group in groups]

    def mean(cost: DeviceCost) -> float:
        held = sum(group.count * value for group, value in zip(groups, cost.layers, strict=True))
        again = sum(map(min if cost.backward > 0 else max, extra))
        work = cost.forward * forward + cost.backward * (backward + again)
        return cost.constant + (held + cost.embed + cost.head + work) / problem.P

    return sum(max(map(mean, costs)) for costs in problem.rest)


def most_seconds(problem: BalanceProblem) -> float:
    """More than the rest of any split."""
    extra = (group.count * max(mode.extra_b for mode in group.modes) for group in problem.groups)
    layers = sum(group.count * (group.f + group.b) for group in problem.groups) + sum(extra)
    work = layers + sum(block.f + block.b for block in problem.blocks)

    def most(cost: DeviceCost) -> float:
        held = sum(group.count * abs(value) for group, value in zip(problem.groups, cost.layers, strict=True))
        own = abs(cost.constant) + held + abs(cost.embed) + abs(cost.head)
        return own + (abs(cost.forward) + abs(cost.backward)) * work

    return sum(max(most(cost) for cost in costs) for costs in problem.rest)
