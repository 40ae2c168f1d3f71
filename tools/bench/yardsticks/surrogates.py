"""Published objectives that stand in for the makespan, each minimised exactly, to see what the stand-in costs.

Only the objective is another planner's. Layers, recompute, memory and rules are those of the problem, so whatever the
answer loses by the simulator is lost by the objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.assignment import Assignment, check_assignment
from megatron_telechat.planner.baselines import Baseline
from megatron_telechat.planner.count_program import Space
from megatron_telechat.planner.lp import INF
from megatron_telechat.planner.mip import program
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import peak_bytes, simulate

LARGEST_STAGE = "largest stage"
ALL_PAIRS = "all pairs of chunks"


@dataclass(frozen=True)
class Peak:
    """`weight` times the largest of `shares @ stage times + constants`; the stage times are forward, then backward."""

    weight: float
    shares: np.ndarray
    constants: np.ndarray


@dataclass(frozen=True)
class Objective:
    """`total` times the sum of all stage times, and peaks."""

    total: float
    peaks: tuple[Peak, ...]

    def value(self, times: Sequence[float]) -> float:
        """For the forward, then backward times of all virtual stages."""
        at = np.asarray(times, dtype=float)
        peaks = (peak.weight * float((peak.shares @ at + peak.constants).max()) for peak in self.peaks)
        return self.total * float(at.sum()) + sum(peaks)


def largest_stage(problem: BalanceProblem) -> Objective:
    """Sum of all stage times + (m - 1) x the largest stage time: the latency of a pipeline in Alpa (Zheng et al.,
    OSDI 2022, equation 2), whose second term is PipeDream's objective.

    They know no virtual stages. With several, each of them is a stage here and its device's time is V times its own:
    sums over a device would leave open how its virtual stages share the layers.
    """
    stages = np.array([_row(problem, [stage]) for stage in range(problem.num_stages)])
    return Objective(1.0, (Peak((problem.m - 1.0) * problem.V, stages, np.zeros(len(stages))),))


def all_pairs(problem: BalanceProblem) -> Objective:
    """Sum of all stage times + (m - 2) x the largest forward of a virtual stage plus backward of one of the same
    device, over all pairs of its virtual stages: MindSpore's SAPP-PPB (mindformers,
    toolkit/pipeline_balance/sapp/sapp_solver.py).

    For m = P and several virtual stages it has another one (its default level of optimisation): the largest backward
    of any of them, plus the largest when forwards of a device's last virtual stage count in part as well (the share
    that runs between backwards, none in the first half of the devices). Embedding and output layer count whole in both.
    """
    P, V, m = problem.P, problem.V, problem.m
    by_device = [range(device, problem.num_stages, P) for device in range(P)]
    if V == 1 or m != P:
        pairs = np.array([_row(problem, [one], [other]) for stages in by_device for one in stages for other in stages])
        return Objective(1.0, (Peak(max(m - 2.0, 0.0), pairs, np.zeros(len(pairs))),))
    shares, constants = [], []
    for stage in range(problem.num_stages):
        row, device = _row(problem, [], [stage]), stage % P
        between = abs(P - 1 - 2 * device) / m if stage >= P * (V - 1) and device >= P // 2 else 0.0
        row[stage] = between
        shares.append(row)
        constants.append(problem.fixed_block(stage, None).f * (1 - between))
    early = P * (V - 1)
    return Objective(0.0, (
        Peak(1.0, np.array(shares[:early]), np.array(constants[:early])),
        Peak(1.0, np.array(shares), np.array(constants)),
    ))  # fmt: skip


def _row(problem: BalanceProblem, forward: Sequence[int], backward: Sequence[int] | None = None) -> np.ndarray:
    row = np.zeros(2 * problem.num_stages)
    row[list(forward)] = 1.0
    row[[problem.num_stages + stage for stage in (forward if backward is None else backward)]] = 1.0
    return row


OBJECTIVES = {LARGEST_STAGE: largest_stage, ALL_PAIRS: all_pairs}


def surrogates(problem: BalanceProblem, time_limit_s: float = 20.0) -> list[Baseline]:
    """What each of the published objectives chooses."""
    return [surrogate(problem, kind, time_limit_s) for kind in OBJECTIVES]


def surrogate(problem: BalanceProblem, kind: str, time_limit_s: float = 20.0) -> Baseline:
    """The assignment that fits and has the least surrogate, with its makespan by the simulator.

    Args:
        kind: LARGEST_STAGE or ALL_PAIRS.
        time_limit_s: of the mixed-integer program; its best so far is taken then, and `proved` is False.
    """
    space = Space(problem, 1.0)
    objective = OBJECTIVES[kind](problem)
    milp = program(space, len(objective.peaks))
    milp.lo[0] = milp.hi[0] = 0.0  # the makespan has no part in it
    milp.cost[: space.size] = objective.total * space.times.sum(axis=0)
    rows, lows = [], []
    for column, peak in enumerate(objective.peaks, milp.continuous_from):
        milp.cost[column] = peak.weight
        for share, constant in zip(peak.shares, peak.constants, strict=True):
            row = np.zeros(len(milp.cost))
            row[: space.size], row[column] = -(share @ space.times), 1.0
            rows.append(row)
            lows.append(float(share @ space.fixed_times) + constant / space.time_unit)
    result = milp.with_rows(np.array(rows), np.array(lows), np.full(len(rows), INF)).minimise(time_limit_s)
    name = f"surrogate: {kind}"
    if result.x is None:
        return Baseline(name, None, None, result.optimal)
    x = np.rint(result.x[: space.size])
    assignment = Assignment(space.modes(x), space.place(x))
    try:
        check_assignment(problem, assignment)
    except ConfigError:
        return Baseline(name, None, None, False)
    if max(peak_bytes(problem, assignment)) > problem.mem_limit:
        return Baseline(name, None, None, False)
    return Baseline(name, simulate(problem, assignment).makespan, assignment, result.optimal)
