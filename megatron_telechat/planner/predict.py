"""Predicted time and memory of one iteration of a run as it is configured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.devices import DeviceSpec
from megatron_telechat.costs.memory import stage_parameters
from megatron_telechat.costs.time import Software, TimeModel
from megatron_telechat.planner.assignment import Assignment
from megatron_telechat.planner.build import assignment_of, balance_problem, kinds_of
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import SimResult, simulate, stage_times
from megatron_telechat.planner.slowdown import expected_makespan

MOST_OPS = 16384
"""Forwards and backwards that a prediction simulates; a schedule with more is carried on from its start."""
MIN_ROUNDS = 8
"""Groups of P micro-batches that are simulated in any case: the pipeline is full after two."""


@dataclass(frozen=True)
class Prediction:
    """Seconds of one iteration.

    Attributes:
        problem, assignment: the pipeline.
        makespan: from its first forward to the end of its last backward.
        pace: of the makespan, the factor for waiting neighbours and varying ops; 1 where no calibration measured them.
        simulation: its ops; of the first micro-batches alone where there are very many.
        reduction: gradient reduction and weight gathering that the backward does not cover, of the slowest stage.
        optimizer: optimizer step of the stage with the most parameters.
        constant: the rest of an iteration; measured, or 0.
        tokens: tokens of one iteration.
        ranks: ranks that share them.
    """

    problem: BalanceProblem
    assignment: Assignment
    makespan: float
    pace: float
    simulation: SimResult
    reduction: float
    optimizer: float
    constant: float
    tokens: int
    ranks: int

    @property
    def iteration(self) -> float:
        """Seconds of the whole iteration."""
        return self.makespan + self.reduction + self.optimizer + self.constant

    @property
    def tokens_per_s_per_device(self) -> float:
        """Tokens per second and device."""
        return self.tokens / self.iteration / self.ranks

    @property
    def bubble(self) -> float:
        """Share of the makespan in which the busiest stage waits, by the schedule alone."""
        times = stage_times(self.problem, self.assignment)
        stages, size = self.problem.num_stages, self.problem.P
        busy = [sum(times[rank:stages:size]) + sum(times[stages + rank :: size]) for rank in range(size)]
        return 1 - max(busy) * self.problem.m * self.pace / self.makespan


def simulated(problem: BalanceProblem, assignment: Assignment) -> tuple[float, SimResult]:
    """Makespan, and the simulation it comes from.

    Where the ops are more than MOST_OPS, a shorter run of two lengths is simulated and its growth carried on: once the
    pipeline is full, every further group of P micro-batches takes the busiest device's time for it.
    """
    group = problem.P
    rounds = max(MOST_OPS // (2 * problem.num_stages * group), MIN_ROUNDS)
    if problem.m <= rounds * group:
        result = simulate(problem, assignment)
        return result.makespan, result
    short = rounds * group + problem.m % group
    before, result = (simulate(replace(problem, m=m), assignment) for m in (short - group, short))
    growth = result.makespan - before.makespan
    return result.makespan + growth * ((problem.m - short) // group), result


def _pace(
    run: RunConfig, times: TimeModel, problem: BalanceProblem, assignment: Assignment, simulation: SimResult
) -> float:
    """What waiting neighbours and varying ops do to the makespan, where a calibration measured them."""
    if times.measured is None or problem.P == 1:
        return 1.0
    ops = max(op.microbatch for op in simulation.ops) + 1
    on_one_node = run.parallel.world_size <= run.parallel.node_size
    alone = times.measured.alone if on_one_node else 1.0
    together = run.parallel.ranks_per_stage
    expected = expected_makespan(
        replace(problem, m=ops), stage_times(problem, assignment), alone, times.measured.jitter, together
    )
    return expected / simulation.makespan


def predict(run: RunConfig, device: DeviceSpec, software: Software | None = None) -> Prediction:
    """One iteration of this run: its own layout and recompute, on Megatron-Core's schedule, then the optimizer.

    With `overlap_grad_reduce` one micro-batch's backward hides the reduction (the others run before it may start).

    Raises:
        ConfigError: layout or recompute do not fit the model; no times for this device at these shapes.
    """
    problem = balance_problem(run, device, kinds_of(run), software=software)
    assignment = assignment_of(run, problem)
    makespan, simulation = simulated(problem, assignment)
    times = TimeModel(run, device, software)
    pace = _pace(run, times, problem, assignment, simulation)
    counts = stage_parameters(run)
    hidden = [0.0] * problem.P
    if run.parallel.overlap_grad_reduce:
        for op in simulation.ops:
            if op.kind == "B" and op.microbatch == 0:
                hidden[op.device] += op.end - op.start
    return Prediction(
        problem=problem,
        assignment=assignment,
        makespan=makespan * pace,
        pace=pace,
        simulation=simulation,
        reduction=times.tied_embedding()
        + max(max(0.0, times.gradient_reduction(count) - cover) for count, cover in zip(counts, hidden, strict=True)),
        optimizer=max(times.optimizer_step(count) for count in counts),
        constant=times.step_constant(),
        tokens=run.training.global_batch_size * run.training.seq_length,
        ranks=max(run.parallel.world_size, 1),
    )
