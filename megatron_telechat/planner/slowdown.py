"""What a real pipeline adds to the simulation of medians: ranks that run faster while others wait, and ops that vary.

Both come from a calibration (`costs.devices.Measured`: `alone`, `jitter`); where nothing was measured they change
nothing. The solver does not know them: it balances the times of ranks that all work at once.
"""

from __future__ import annotations

import math

import numpy as np

from megatron_telechat.planner.op_graph import end_times, makespans, op_graph
from megatron_telechat.planner.problem import BalanceProblem

ROUNDS = 6
"""Repeats of pace <- waits <- pace; the pace moves in the third digit after two."""
DRAWS = 64
"""Simulations with varied ops that are averaged, in pairs with opposite variations."""


def expected_makespan(
    problem: BalanceProblem, times: list[float], alone: float, jitter: float, together: int = 1
) -> float:
    """Mean makespan of a pipeline whose ops take `times` in the median when all ranks work at once.

    Args:
        times: of each forward, then each backward, as `planner.simulate.stage_times` gives them.
        alone: time of an op while all other ranks wait, as a share of its time beside them, 0 < alone <= 1.
        jitter: standard deviation of an op over its mean, independent from rank to rank.
        together: ranks of one stage, which work at the same time.
    """
    paced = np.array(times) * np.tile(device_pace(problem, times, alone, together), 2 * problem.V)
    graph = op_graph(*problem.schedule)
    if jitter <= 0:
        return float(makespans(graph, paced[None], problem.p2p)[0])
    # log-normal: never below 0, and with the long side that interruptions have; its mean is 1
    spread = math.sqrt(math.log1p(jitter**2))
    draws = np.random.default_rng(0).normal(0.0, spread, (len(graph.kind), DRAWS // 2))
    factors = np.exp(np.concatenate([draws, -draws], axis=1) - spread**2 / 2)
    return float(makespans(graph, np.repeat(paced[None], DRAWS, axis=0), problem.p2p, factors).mean())


def device_pace(problem: BalanceProblem, times: list[float], alone: float, together: int = 1) -> np.ndarray:
    """[P] factor on the ops of each device: between `alone`, and 1 where all others work whenever it does."""
    pace = np.ones(problem.P)
    if alone >= 1 or problem.P == 1:
        return pace
    graph = op_graph(*problem.schedule)
    kinds = np.array(graph.kind[1:])
    devices = kinds % problem.num_stages % problem.P
    for _ in range(ROUNDS):
        paced = np.array(times) * np.tile(pace, 2 * problem.V)
        ends = np.array(end_times(graph, paced.tolist(), problem.p2p))[1:]
        starts = ends - paced[kinds]
        busy = np.zeros((problem.P, problem.P))  # share of the work of one during which the other works
        for other in range(problem.P):
            own = devices == other
            edges = np.stack([starts[own], ends[own]], axis=1).ravel()
            done = np.repeat(np.cumsum(ends[own] - starts[own]), 2)
            done[::2] -= ends[own] - starts[own]
            beside = np.interp(ends, edges, done) - np.interp(starts, edges, done)
            for device in range(problem.P):
                mine = devices == device
                busy[device, other] = beside[mine].sum() / max((ends - starts)[mine].sum(), 1e-300)
        np.fill_diagonal(busy, 0.0)
        working = (together - 1 + together * busy.sum(axis=1)) / (together * problem.P - 1)
        pace = alone + (1 - alone) * working
    return pace
