"""Rows from the whole plans of a device hold for every plan that fits, whatever fractional point they cut off."""

from __future__ import annotations

import random

import numpy as np

from megatron_telechat.planner.assignment import Assignment
from megatron_telechat.planner.count_program import Space
from megatron_telechat.planner.device_hull import device_hulls
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import simulate
from tests.planner.small_problems import binding_problem


def random_assignment(problem: BalanceProblem, rng: random.Random) -> Assignment:
    counts = list(problem.fewest_layers(None))
    while sum(counts) < problem.num_layers:
        counts[rng.randrange(len(counts))] += 1
    share = rng.random()
    return Assignment(tuple(tuple(int(rng.random() < share) for _ in range(count)) for count in counts))


def test_rows_hold_for_all_that_fits_and_cut_off_points_between():
    rows = plans = 0
    for seed in range(20):
        rng, problem = random.Random(seed), binding_problem(seed)
        space = Space(problem, 1e9)
        tried = [random_assignment(problem, rng) for _ in range(40)]
        fitting = [one for one in tried if max(simulate(problem, one).peak_bytes) <= problem.mem_limit]
        whole = np.zeros((len(fitting), space.size))
        for row, one in zip(whole, fitting, strict=True):
            row[space.n] = [[stage.count(0), stage.count(1)] for stage in one.modes]
        hulls = device_hulls(
            space, space.lo, space.hi, lambda row: (space.row_lo[row], space.row_hi[row]), float("inf")
        )
        for device, hull in enumerate(hulls):
            own = whole[:, hull.columns]
            plans += len(own)
            assert all((hull.points == plan).all(axis=1).any() for plan in own), (seed, device)
            for _ in range(4):
                x = np.zeros(space.size)
                some = hull.points[[rng.randrange(len(hull.points)) for _ in range(3)]]
                x[hull.columns] = some.mean(axis=0)
                assert hull.separate(x) is None, (seed, device)  # between plans: nothing may cut it off
                x[hull.columns[1::2]] *= 0.7  # less recompute than any of them may have
                found = hull.separate(x)
                if found is not None:
                    rows += 1
                    assert (hull.points @ found[0] >= found[1]).all() and x[hull.columns] @ found[0] < found[1]
    assert rows > 50 and plans > 100, (rows, plans)
