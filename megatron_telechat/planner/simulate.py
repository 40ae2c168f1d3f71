"""Exact time and memory of an assignment: the schedule is run op by op."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_telechat.costs.op_order import rank_ops
from megatron_telechat.planner.assignment import Assignment, check_assignment, stage_groups
from megatron_telechat.planner.op_graph import end_times, op_graph
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.rest import rest_seconds
from megatron_telechat.planner.slow_stage import time_factors, worst_case


@dataclass(frozen=True)
class TimedOp:
    """One op of the timeline. `virtual_stage` is counted on its device; `kind` is "F" or "B"."""

    device: int
    virtual_stage: int
    kind: str
    microbatch: int
    start: float
    end: float


@dataclass(frozen=True)
class SimResult:
    """What the schedule does; where one device may be slower, in the worst case.

    Attributes:
        makespan: end of the last op of any device.
        rest: seconds of the iteration beside it, where the problem has some.
        peak_bytes: of each device.
        ops: every op with its times, in the order of each device, device by device.
    """

    makespan: float
    peak_bytes: tuple[float, ...]
    ops: tuple[TimedOp, ...]
    rest: float = 0.0

    @property
    def total(self) -> float:
        """What a solver minimises."""
        return self.makespan + self.rest


def simulate(problem: BalanceProblem, assignment: Assignment) -> SimResult:
    """Run the schedule of Megatron-Core on an assignment, in the worst case of the problem; memory is not limited here.

    Raises:
        ConfigError: the assignment is none for this problem.
    """
    check_assignment(problem, assignment)
    graph = op_graph(*problem.schedule)
    nominal = stage_times(problem, assignment)
    cases = time_factors(problem) * np.array(nominal)
    times = cases[worst_case(graph, cases, problem.p2p)].tolist()
    ends = end_times(graph, times, problem.p2p)
    ops = [
        TimedOp(
            device=kind % problem.num_stages % problem.P,
            virtual_stage=kind % problem.num_stages // problem.P,
            kind="F" if kind < problem.num_stages else "B",
            microbatch=graph.microbatch[op],
            start=ends[op] - times[kind],
            end=ends[op],
        )
        for op, kind in enumerate(graph.kind)
        if op
    ]
    ops.sort(key=lambda op: op.device)
    rest = 0.0
    if problem.rest:
        inside = np.array([stage_groups(problem, assignment.counts)], dtype=float)
        rest = float(rest_seconds(problem, inside, np.array([nominal]))[0])
    return SimResult(float(max(ends)), peak_bytes(problem, assignment), tuple(ops), rest)


def stage_times(problem: BalanceProblem, assignment: Assignment) -> list[float]:
    """Forward times of all virtual stages, then backward times."""
    forward, backward = [], []
    for stage, (in_group, modes) in enumerate(
        zip(stage_groups(problem, assignment.counts), assignment.modes, strict=True)
    ):
        fixed = problem.fixed_block(stage, assignment.mtp_stage)
        groups = [group for group, count in zip(problem.groups, in_group, strict=True) for _ in range(count)]
        forward.append(math.fsum([fixed.f, *(group.f for group in groups)]))
        backward.append(
            math.fsum(
                [fixed.b, *(group.b + group.modes[mode].extra_b for group, mode in zip(groups, modes, strict=True))]
            )
        )
    return forward + backward


@dataclass(frozen=True)
class InFlight:
    """One moment of a device that can be its peak: micro-batches held of each of its virtual stages, and the one in its
    backward."""

    held: tuple[int, ...]
    backward: int | None


@lru_cache(maxsize=512)
def in_flight(P: int, V: int, m: int, group: int | None = None) -> tuple[tuple[InFlight, ...], ...]:
    """For each device the moments that no other moment covers (at least as many of each virtual stage, and the same
    backward), in groups of so many micro-batches (unset: P).

    An op's own micro-batch counts from the start of its forward to the end of its backward.
    """
    out = []
    for rank in range(P):
        held = [0] * V
        seen: dict[tuple[int | None, tuple[int, ...]], None] = {}
        for op in rank_ops(rank, P, V, m, group):
            held[op.virtual_stage] += op.forward
            seen[None if op.forward else op.virtual_stage, tuple(held)] = None
            held[op.virtual_stage] -= not op.forward
        moments = [InFlight(counts, backward) for backward, counts in seen]
        out.append(tuple(one for one, covered in zip(moments, _covered(moments), strict=True) if not covered))
    return tuple(out)


def _covered(moments: list[InFlight]) -> np.ndarray:
    """Which moments another one covers."""
    counts = np.array([one.held for one in moments])
    running = np.array([-1 if one.backward is None else one.backward for one in moments])
    more = (counts[:, None] >= counts[None]).all(axis=2)  # [other, one]
    more &= (running[None] == -1) | (running[:, None] == running[None])
    np.fill_diagonal(more, False)
    return more.any(axis=0)


def peak_bytes(problem: BalanceProblem, assignment: Assignment) -> tuple[float, ...]:
    """Most bytes in use on each device: constants, weights, activations in flight, working set of a backward."""
    weights, kept, transient = [], [], []
    for stage, (in_group, modes) in enumerate(
        zip(stage_groups(problem, assignment.counts), assignment.modes, strict=True)
    ):
        fixed = problem.fixed_block(stage, assignment.mtp_stage)
        groups = [group for group, count in zip(problem.groups, in_group, strict=True) for _ in range(count)]
        used = [group.modes[mode] for group, mode in zip(groups, modes, strict=True)]
        weights.append(math.fsum([fixed.w, *(group.w for group in groups)]))
        kept.append(math.fsum([fixed.act, *(mode.act for mode in used)]))
        transient.append(max([fixed.ws, *(mode.ws for mode in used)]))
    out = []
    for device, moments in enumerate(in_flight(*problem.schedule)):
        stages = range(device, problem.num_stages, problem.P)
        most = max(
            math.fsum(count * kept[stage] for count, stage in zip(moment.held, stages, strict=True))
            + (0.0 if moment.backward is None else transient[stages[moment.backward]])
            for moment in moments
        )
        out.append(float(problem.const_mem + math.fsum(weights[stage] for stage in stages) + most))
    return tuple(out)
