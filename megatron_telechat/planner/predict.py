"""Predicted time and memory of one iteration of a run as it is configured."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.devices import DeviceSpec
from megatron_telechat.costs.memory import stage_parameters
from megatron_telechat.costs.time import Software, TimeModel
from megatron_telechat.planner.build import assignment_of, balance_problem, kinds_of
from megatron_telechat.planner.plan import Assignment
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import SimResult, simulate


@dataclass(frozen=True)
class Prediction:
    """Seconds of one iteration.

    Attributes:
        problem, assignment, simulation: the pipeline; its makespan is `simulation.makespan`.
        reduction: gradient reduction and weight gathering that the backward does not cover, of the slowest stage.
        optimizer: optimizer step of the stage with the most parameters.
        constant: the rest of an iteration; measured, or 0.
        tokens: tokens of one iteration.
        ranks: ranks that share them.
    """

    problem: BalanceProblem
    assignment: Assignment
    simulation: SimResult
    reduction: float
    optimizer: float
    constant: float
    tokens: int
    ranks: int

    @property
    def iteration(self) -> float:
        """Seconds of the whole iteration."""
        return self.simulation.makespan + self.reduction + self.optimizer + self.constant

    @property
    def tokens_per_s_per_device(self) -> float:
        return self.tokens / self.iteration / self.ranks

    @property
    def bubble(self) -> float:
        """Share of the makespan in which the busiest stage waits."""
        busy = [0.0] * self.problem.P
        for op in self.simulation.ops:
            busy[op.device] += op.end - op.start
        return 1 - max(busy) / self.simulation.makespan


def predict(run: RunConfig, device: DeviceSpec, software: Software = Software()) -> Prediction:
    """One iteration of this run: its own layout and recompute, on Megatron-Core's schedule, then the optimizer.

    With `overlap_grad_reduce` one micro-batch's backward hides the reduction (the others run before it may start).

    Raises:
        ConfigError: layout or recompute do not fit the model; no times for this device at these shapes.
    """
    problem = balance_problem(run, device, kinds_of(run), software=software)
    assignment = assignment_of(run, problem)
    simulation = simulate(problem, assignment)
    times = TimeModel(run, device, software)
    counts = stage_parameters(run)
    hidden = [0.0] * problem.P
    if run.parallel.overlap_grad_reduce:
        for op in simulation.ops:
            if op.kind == "B" and op.microbatch == problem.m - 1:
                hidden[op.device] += op.end - op.start
    return Prediction(
        problem=problem,
        assignment=assignment,
        simulation=simulation,
        reduction=max(max(0.0, times.gradient_reduction(count) - cover) for count, cover in zip(counts, hidden)),
        optimizer=max(times.optimizer_step(count) for count in counts),
        constant=times.step_constant(),
        tokens=run.training.global_batch_size * run.training.seq_length,
        ranks=max(run.parallel.world_size, 1),
    )
